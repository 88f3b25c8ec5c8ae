"""One night: what is new is answered and trained on, the candidate is held against the champion, and told about."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from prefect import flow

from masters import artifacts, webhook
from masters.allowed import check_config
from masters.artifacts import RECORD, Artifact
from masters.config import Config, Model
from masters.errors import InputError
from masters.flows.attempts import attempt, patient
from masters.flows.distill import Distilled, pipeline, tracked
from masters.gate import Comparison, compare, objections, regressions
from masters.machine import cache
from masters.preflight import LocalModel, Ready, open_storage, preflight
from masters.registry import Registry
from masters.reuse import Earlier
from masters.stages import Stage
from masters.storage import Storage
from masters.tasks.evaluate import evaluate
from masters.tasks.report import night_reported
from masters.tasks.stage import Context, Run
from masters.tracking import check_answers, tracking_uri

NOTHING = dict(reasons=[], regressions=[])


@flow(name="nightly", flow_run_name="{config.name}", persist_result=False)
def nightly(config: Config) -> dict:
    """Distil what changed since the last night; promote the student only if it is better. Returns the summary.

    A failure and a regression are reported to the webhook that MASTERS_WEBHOOK_URL names.

    Args:
        config: What a TOML file holds; what this form accepts is what the file accepts.
    """
    with attempt():
        try:
            summary = night(config)
        except Exception as error:
            webhook.report(config.name, "failed", str(error))
            raise
        told = summary["nightly"]
        night_reported(config.name, told)
        if told["regressions"]:
            webhook.report(config.name, "regression", "; ".join(told["regressions"]))
    return summary


@dataclass(frozen=True)
class Champion:
    """The registered version that has the alias, and what it was made from."""

    version: int
    trained: Artifact
    questions: Artifact


def from_champion(config: Config, champion: Champion) -> Ready:
    """What preflight finds with the champion as the student: its train artifact, so that lineage goes on into it."""
    trained = champion.trained
    folder = trained.storage.download(f"{trained.folder}/model", cache() / "models" / trained.parts["model"][:32])
    ready = preflight(config.model_copy(update=dict(student=Model(model=str(folder)))))
    student = replace(ready.student, name=f"models:/{config.name}/{champion.version}", made=trained)
    return replace(ready, student=student)


def night(config: Config) -> dict:
    """The night without its reports."""
    check_config(config)
    storage = patient(lambda: open_storage(config.store.root))
    uri = tracking_uri(config, storage)
    patient(lambda: check_answers(uri))
    champion = champion_of(Registry(uri), config.name, storage)
    earlier = Earlier(storage, last_night(storage, config.name))
    if champion and config.nightly.start == "champion":
        context = Context(config, from_champion(config, champion), earlier, champion.questions)
    else:
        context = Context(config, preflight(config), earlier)
    with tracked(context) as (run, summary):
        done = pipeline(run, summary)
        if done:
            summary.night(judged(run, done, champion))
            keep(run)
        else:
            summary.night(dict(outcome="no change", champion=champion and champion.version) | NOTHING)
    return summary.written


def judged(run: Run, done: Distilled, champion: Champion | None) -> dict:
    """Promote the candidate, or say why not."""
    registry, name = run.tracker.registry, run.config.name
    built = any(stage["outcome"] == "built" for stage in run.stages)
    told: dict = dict(candidate=done.version, champion=done.version) | NOTHING
    if champion is None:
        told |= dict(outcome="promoted", reasons=["the first champion"])
    elif champion.version == done.version:
        told |= dict(outcome="kept" if built else "no change", reasons=["the champion itself"])
    else:
        found = against(run, done, champion)
        worse, reasons = regressions(found, run.config.nightly), objections(found, run.config.nightly)
        told |= dict(outcome="kept" if reasons else "promoted", reasons=reasons, comparison=found.as_dict())
        # a night in which nothing was built told of it before
        told |= dict(regressions=worse if built else [], champion=champion.version if reasons else done.version)
        told |= dict(outcome="no change") if reasons and not built else {}
    registry.judged(name, done.version, f"{told['outcome']}: {'; '.join(told['reasons'])}")
    if told["outcome"] == "promoted":
        registry.promote(name, done.version)
    return told


def against(run: Run, done: Distilled, champion: Champion) -> Comparison:
    """Candidate and champion on tonight's evaluation questions."""
    # the champion under the name it had as a candidate: what it answered then is not asked again
    theirs = evaluate(run, done.questions, [run.trained(champion.trained)], "evaluate-champion")
    rows = done.questions.rows("questions", ["question_id", "category"])
    category = {row["question_id"]: row["category"] for row in rows}
    return compare(_right(done.evaluated, done.student), _right(theirs, done.student), category)


def champion_of(registry: Registry, name: str, storage: Storage) -> Champion | None:
    """The champion, if there is one. Raises InputError if it does not lie in this store."""
    number = registry.champion(name)
    if number is None:
        return None
    target = registry.target_of_model(name, str(number))
    if target.store != storage.uri(""):
        raise InputError(f"{target.title}, the champion, lies in {target.store}, not in store.root {storage.uri('')}")
    try:
        (folder,) = target.folders
        trained = artifacts.load(storage, folder).upstream("train")
        questions = trained.upstream("data") if trained else None
    except FileNotFoundError as error:
        raise InputError(
            f"{target.title}, the champion, is not whole: {error}; try `masters rollback {name}`"
        ) from error
    if trained is None or questions is None:
        raise InputError(f"{target.title}, the champion, does not say what it was made from")
    return Champion(number, trained, questions)


def last_night(storage: Storage, name: str) -> Iterator[Artifact]:
    """What engines answered in the last night that came to its end, as far as it is still there."""
    if storage.exists(_notes(name)):
        for folder in json.loads(storage.read(_notes(name)))["answered"]:
            if storage.exists(f"{folder}/{RECORD}"):
                yield artifacts.load(storage, folder)


def keep(run: Run) -> None:
    """Note for the next night what engines answered."""
    kinds = (Stage.GENERATE, Stage.EVALUATE)
    answered = [artifact.folder for name, artifact in run.made.items() if name.split("-")[0] in kinds]
    run.storage.write(_notes(run.config.name), json.dumps(dict(answered=answered)).encode())


def _notes(name: str) -> str:
    return f"nights/{name}.json"


def _right(evaluated: Artifact, model: LocalModel) -> dict[str, bool]:
    """By question: whether the model was right."""
    rows = evaluated.rows("predictions", ["question_id", "model", "correct"])
    return {row["question_id"]: row["correct"] for row in rows if row["model"] == model.name}
