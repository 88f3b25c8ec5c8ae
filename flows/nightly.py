"""One night: what is new is answered and trained on, the candidate is held against the champion, and told about."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from prefect import Flow, State, flow
from prefect.client.schemas.objects import FlowRun

from masters.checks.model_folder import LocalModel
from masters.checks.preflight import Resources, preflight, preflight_from_student
from masters.common.errors import ArtifactError, InputError
from masters.config import Config
from masters.config.allowlist import check_config
from masters.config.stages import Stage
from masters.evaluation.promotion_gate import Comparison, compare, objections, regressions
from masters.flows import webhook
from masters.flows.distill import DistillationResult, close_crashed_run, run_pipeline, track_run
from masters.flows.retries import flow_attempt, retry_unreachable
from masters.models.generation.shards import ShardCache
from masters.store import artifacts
from masters.store.artifacts import RECORD, Artifact
from masters.store.locks import machine_lock
from masters.store.storage import Storage, open_storage
from masters.tasks.evaluate import evaluate
from masters.tasks.judges import accuracy_metric
from masters.tasks.progress import warn
from masters.tasks.report import report_night
from masters.tasks.run_context import Context, Run
from masters.tracking.client import check_answers
from masters.tracking.locations import tracking_uri
from masters.tracking.registry import Registry

NOTHING = dict(reasons=[], regressions=[])
UNTRAINED = dict(
    reasons=[
        "no training question that the champion does not know: a new teacher, withdrawn rows and other evaluation "
        "rows wait for one (nightly.start = champion)"
    ]
)
VACANT = "nobody has the alias champion, which version {last} had: give it with `masters rollback {name} --to VERSION`"
ROLLED_BACK = "version {version} was rolled back: only `masters rollback {name} --to {version}` makes it champion again"
TOLD_LENGTH = 4000  # characters of a tag


def report_crash(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """Runs in the worker: a night whose process is gone has told nobody."""
    config = Config.model_validate(flow_run.parameters["config"])
    why = state.message or "its process is gone"
    webhook.send_report(config.name, "crashed", f"attempt {flow_run.run_count} of the night {flow_run.name}: {why}")


@flow(name="nightly", flow_run_name="{config.name}", on_crashed=[close_crashed_run, report_crash], persist_result=False)
def nightly(config: Config) -> dict:
    """Distil what changed since the last night; promote the student only if it is better. Returns the summary.

    A failure, a crash and a regression are reported to the webhook that MASTERS_WEBHOOK_URL names.

    Args:
        config: What a TOML file holds; what this form accepts is what the file accepts.
    """
    with flow_attempt():
        try:
            summary = run_night(config)
        except Exception as error:
            webhook.send_report(config.name, "failed", str(error))
            raise
        told = summary["nightly"]
        report_night(config.name, told, accuracy_metric(config))
        if told["regressions"]:
            report_regression(Registry(tracking_uri(config, open_storage(config.store.root))), config.name, told)
    return summary


def report_regression(registry: Registry, name: str, told: dict) -> None:
    """Report a regression, unless it was: a night cut short before its report leaves that to the next."""
    said = "; ".join(told["regressions"])
    known = f"against version {told['champion']}: {said}"[:TOLD_LENGTH]
    if registry.told(name, told["candidate"]) != known and webhook.send_report(name, "regression", said):
        registry.tell(name, told["candidate"], known)


@dataclass(frozen=True)
class Champion:
    """The registered version that has the alias, and what it was made from."""

    version: int
    trained: Artifact
    questions: Artifact


def from_champion(config: Config, champion: Champion) -> Resources:
    """What preflight finds with the champion as the student: its train artifact, so that lineage goes on into it."""
    return preflight_from_student(config, champion.trained, f"models:/{config.name}/{champion.version}")


def run_night(config: Config) -> dict:
    """The night without its reports. A second one of this name waits: its champion is what the first one makes."""
    check_config(config)
    storage = retry_unreachable(lambda: open_storage(config.store.root))
    waiting = f"another night of {config.name} is under way on this machine: waiting for its end"
    with machine_lock(f"night {config.name} {storage.uri('')}", lambda: warn(waiting)):
        return _night(config, storage)


def _night(config: Config, storage: Storage) -> dict:
    uri = tracking_uri(config, storage)
    retry_unreachable(lambda: check_answers(uri))
    champion = champion_of(Registry(uri), config.name, storage)
    earlier = ShardCache(storage, last_night(storage, config.name))
    if champion and config.nightly.start == "champion":
        context = Context(config, from_champion(config, champion), earlier, champion.questions)
    else:
        context = Context(config, preflight(config), earlier)
    with track_run(context) as (run, summary):
        done = run_pipeline(run, summary)
        if done:
            summary.night(apply_gate(run, done, champion))
            keep(run)
        else:
            summary.night(dict(outcome="no change", champion=champion and champion.version) | NOTHING | UNTRAINED)
    return summary.written


def apply_gate(run: Run, done: DistillationResult, champion: Champion | None) -> dict:
    """Promote the candidate, or say why not."""
    registry, name = run.tracker.registry, run.config.name
    # a night in which nothing was built came to its verdict before, unless it was cut short
    news = any(stage["outcome"] == "built" for stage in run.stages) or not registry.is_judged(name, done.version)
    told: dict = dict(candidate=done.version, champion=done.version) | NOTHING
    if champion is None and (last := registry.last_champion(name)):
        told |= dict(outcome="kept", champion=None, reasons=[VACANT.format(name=name, last=last)])
    elif champion is None:
        told |= dict(outcome="promoted", reasons=["the first champion"])
    elif champion.version == done.version:
        told |= dict(outcome="kept" if news else "no change", reasons=["the champion itself"])
    else:
        found = compare_with_champion(run, done, champion)
        worse, reasons = regressions(found, run.config.nightly), objections(found, run.config.nightly)
        if registry.rolled_back(name, done.version):
            reasons.append(ROLLED_BACK.format(name=name, version=done.version))
        told |= dict(outcome="promoted", reasons=reasons, comparison=found.as_dict(), regressions=worse)
        if reasons:
            told |= dict(outcome="kept" if news else "no change", champion=champion.version)
    registry.judged(name, done.version, f"{told['outcome']}: {'; '.join(told['reasons'])}")
    if told["outcome"] == "promoted":
        registry.promote(name, done.version)
    return told


def compare_with_champion(run: Run, done: DistillationResult, champion: Champion) -> Comparison:
    """Candidate and champion on tonight's evaluation questions."""
    # the champion under the name it had as a candidate: what it answered then is not asked again
    theirs = evaluate(run, done.questions, [run.load_student(champion.trained)], "evaluate-champion")
    rows = list(done.questions.rows("questions", ["question_id", "category", "image_digest"]))
    category = {row["question_id"]: row["category"] for row in rows}
    image = {row["question_id"]: row["image_digest"] for row in rows}
    return compare(_right(done.evaluated, done.student), _right(theirs, done.student), category, image)


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
        registered = artifacts.load(storage, folder)
        if registered.record["digest"] != target.folders[folder]:
            raise ArtifactError(f"{registered.uri} was built again since: it is another student")
        trained = registered.upstream("train")
        questions = trained.upstream("data") if trained else None
    except (FileNotFoundError, ArtifactError) as error:
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
    answered = [artifact.folder for name, artifact in run.artifacts.items() if name.split("-")[0] in kinds]
    run.storage.write(_notes(run.config.name), json.dumps(dict(answered=answered)).encode())


def _notes(name: str) -> str:
    return f"nights/{name}.json"


def _right(evaluated: Artifact, model: LocalModel) -> dict[str, bool]:
    """By question: whether the model was right."""
    rows = evaluated.rows("predictions", ["question_id", "model", "correct"])
    return {row["question_id"]: row["correct"] for row in rows if row["model"] == model.name}
