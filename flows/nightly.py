"""A nightly run: train on what is new, compare the candidate with the champion, and report the outcome."""

from collections.abc import Iterator
from dataclasses import dataclass

from prefect import Flow, State, flow
from prefect.client.schemas.objects import FlowRun
from pydantic import BaseModel

from masters.checks.model_folder import STUDENT_BEFORE
from masters.checks.preflight import preflight, preflight_from_student
from masters.common.errors import ArtifactError, InputError
from masters.config import Config
from masters.config.allowlist import check_config
from masters.config.stages import Stage
from masters.evaluation.candidate_comparison import Comparison, compare
from masters.evaluation.promotion_decision import GateDecision, GateInputs, decide, decide_without_training
from masters.flows import webhook
from masters.flows.distill import DistillationResult, close_crashed_run, run_pipeline, track_run
from masters.flows.missed_nights import cancel_missed_nights
from masters.flows.retries import flow_attempt, retry_unreachable
from masters.models.generation.shards import ShardCache
from masters.store import artifacts
from masters.store.artifacts import RECORD, Artifact
from masters.store.json_files import read_json
from masters.store.locks import machine_lock
from masters.store.storage import Storage, open_storage
from masters.tasks.evaluate import evaluate
from masters.tasks.judges import accuracy_metric
from masters.tasks.progress import warn
from masters.tasks.report import report_night
from masters.tasks.run_context import Context, Run
from masters.tracking.client import check_server
from masters.tracking.locations import tracking_uri
from masters.tracking.registry import Registry

MAX_TAG_LENGTH = 4000  # characters of an MLflow tag


def report_crash(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """Report a crashed night to the webhook. Called in the Prefect worker, because the night's process is gone."""
    config = Config.model_validate(flow_run.parameters["config"])
    cause = state.message or "its process is gone"
    webhook.send_report(config.name, "crashed", f"attempt {flow_run.run_count} of the night {flow_run.name}: {cause}")


@flow(name="nightly", flow_run_name="{config.name}", on_crashed=[close_crashed_run, report_crash], persist_result=False)
def nightly(config: Config) -> dict:
    """Distill on what changed since the last night; promote the student only if it is better. Returns the summary.

    Failures, crashes and regressions are reported to the webhook in MASTERS_WEBHOOK_URL.

    Args:
        config: The configuration, with the same keys and values as in a TOML file.
    """
    with flow_attempt():
        cancel_missed_nights()
        try:
            summary = run_night(config)
        except Exception as error:
            webhook.send_report(config.name, "failed", str(error))
            raise
        night = summary["nightly"]
        report_night(config.name, night, accuracy_metric(config))
        if night["regressions"]:
            storage = open_storage(config.store.root)
            report_regression(Registry(tracking_uri(config, storage)), config.name, night)
    return summary


def report_regression(registry: Registry, name: str, night: dict) -> None:
    """Report a regression to the webhook, unless an earlier night has done so. A tag remembers what was reported."""
    reason = "; ".join(night["regressions"])
    regression = f"against version {night['champion']}: {reason}"[:MAX_TAG_LENGTH]
    is_reported = registry.reported_regression(name, night["candidate"]) == regression
    if not is_reported and webhook.send_report(name, "regression", reason):
        registry.record_reported_regression(name, night["candidate"], regression)


class GeneratedList(BaseModel):
    """The file that a night writes for the next one: the folders of its artifacts with generated answers."""

    answered: list[str]


@dataclass(frozen=True)
class Champion:
    """The registered version with the alias champion, and the artifacts behind it."""

    version: int
    trained: Artifact
    questions: Artifact


def run_night(config: Config) -> dict:
    """Run a night without its reports. Nights of one name never overlap: each may change the champion."""
    check_config(config)
    storage = retry_unreachable(lambda: open_storage(config.store.root))
    message = f"another night of {config.name} is running on this machine: waiting for its end"
    with machine_lock(f"night {config.name} {storage.uri('')}", lambda: warn(message)):
        champion = find_champion(config, storage)
        with track_run(make_context(config, storage, champion)) as (run, summary):
            result = run_pipeline(run, summary)
            if result:
                decision = apply_gate(run, result, champion)
                save_generated(run)
            else:
                decision = decide_without_training(champion.version if champion else None)
            summary.set_night(decision.as_dict())
    return summary.content


def make_context(config: Config, storage: Storage, champion: Champion | None) -> Context:
    """Prepare a night: its student is the champion if the configuration says so, and the last shards are reused."""
    shard_cache = ShardCache(storage, read_generated(storage, config.name))
    if champion and starts_from_champion(config, champion):
        name = f"models:/{config.name}/{champion.version}"
        resources = preflight_from_student(config, champion.trained, name)
        return Context(config, resources, shard_cache, champion.questions)
    return Context(config, preflight(config), shard_cache)


def starts_from_champion(config: Config, champion: Champion | None) -> bool:
    """Return whether the student before training is the champion."""
    return champion is not None and config.nightly.start == "champion"


def apply_gate(run: Run, result: DistillationResult, champion: Champion | None) -> GateDecision:
    """Decide whether the candidate becomes champion, and record the decision in the registry."""
    registry, name, candidate = run.tracker.registry, run.config.name, result.version
    was_built = any(stage["outcome"] == "built" for stage in run.stages)
    comparison = None
    if champion and champion.version != candidate:
        comparison = compare_with_champion(run, result, champion)
    inputs = GateInputs(
        name=name,
        candidate=candidate,
        champion=champion.version if champion else None,
        last_champion=None if champion else registry.last_champion(name),
        comparison=comparison,
        with_untrained=None if starts_from_champion(run.config, champion) else compare_with_untrained(result),
        was_rolled_back=registry.was_rolled_back(name, candidate),
        is_new=was_built or not registry.has_verdict(name, candidate),
    )
    decision = decide(inputs, run.config.nightly)
    registry.record_verdict(name, candidate, f"{decision.outcome}: {'; '.join(decision.reasons)}")
    if decision.outcome == "promoted":
        registry.promote(name, candidate)
    return decision


def compare_with_champion(run: Run, result: DistillationResult, champion: Champion) -> Comparison:
    """Evaluate the champion on tonight's evaluation questions and compare the candidate with it."""
    # Both models have the same name in their predictions, so the champion's answers as a candidate are reused.
    evaluated = evaluate(run, result.questions, [run.load_student(champion.trained)], "evaluate-champion")
    return _compare_candidate(result, _read_correct(evaluated, result.student.name))


def compare_with_untrained(result: DistillationResult) -> Comparison:
    """Compare the candidate with the student before training, on tonight's evaluation questions."""
    return _compare_candidate(result, _read_correct(result.evaluated, STUDENT_BEFORE))


def _compare_candidate(result: DistillationResult, other_correct: dict[str, bool]) -> Comparison:
    rows = list(result.questions.rows("questions", ["question_id", "category", "image_digest"]))
    categories = {row["question_id"]: row["category"] for row in rows}
    images = {row["question_id"]: row["image_digest"] for row in rows}
    return compare(_read_correct(result.evaluated, result.student.name), other_correct, categories, images)


def find_champion(config: Config, storage: Storage) -> Champion | None:
    """Return the champion, if there is one. Raises InputError if it is incomplete or in another store."""
    uri, name = tracking_uri(config, storage), config.name
    retry_unreachable(lambda: check_server(uri))
    registry = retry_unreachable(lambda: Registry(uri))
    version = registry.champion(name)
    if version is None:
        return None
    target = registry.resolve_model(name, str(version))
    if target.store != storage.uri(""):
        raise InputError(
            f"the champion {target.title} is in the store {target.store}, not in store.root {storage.uri('')}"
        )
    try:
        (folder,) = target.folders
        registered = artifacts.load(storage, folder)
        if registered.record["digest"] != target.folders[folder]:
            raise ArtifactError(f"{registered.uri} was built again since, so it is another student")
        trained = registered.upstream("train")
        questions = trained.upstream("data") if trained else None
    except ArtifactError as error:
        raise InputError(
            f"the champion {target.title} is incomplete: {error}; try `masters rollback {name}`"
        ) from error
    if trained is None or questions is None:
        raise InputError(f"the record of the champion {target.title} does not name its training and its questions")
    return Champion(version, trained, questions)


def read_generated(storage: Storage, name: str) -> Iterator[Artifact]:
    """Load the artifacts that `save_generated` listed in the last completed night, if they still exist."""
    file = _generated_file(name)
    if storage.exists(file):
        listed = read_json(storage, file, GeneratedList, "remove it; the next night then generates its answers again")
        for folder in listed["answered"]:
            if storage.exists(f"{folder}/{RECORD}"):
                yield artifacts.load(storage, folder)


def save_generated(run: Run) -> None:
    """List the artifacts with generated answers for the next night."""
    stages = (Stage.GENERATE, Stage.EVALUATE)
    folders = [artifact.folder for name, artifact in run.artifacts.items() if name.split("-")[0] in stages]
    listed = GeneratedList(answered=folders).model_dump_json()
    run.storage.write(_generated_file(run.config.name), listed.encode())


def _generated_file(name: str) -> str:
    return f"nights/{name}.json"


def _read_correct(evaluated: Artifact, model: str) -> dict[str, bool]:
    """Return whether the model was right, by question."""
    rows = evaluated.rows("predictions", ["question_id", "model", "correct"])
    return {row["question_id"]: row["correct"] for row in rows if row["model"] == model}
