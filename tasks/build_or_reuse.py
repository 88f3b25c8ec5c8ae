"""Build the artifact of a stage or reuse the finished one, with timing and tracking. All stages share this."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from masters.common import disk_space, machine
from masters.common.errors import ArtifactError, StoreError, TrackingError, WorkerLost
from masters.common.hashing import digest
from masters.store import artifacts
from masters.store.artifacts import Artifact, Identity, Upstream
from masters.store.locks import exclusive_build
from masters.store.storage import Storage
from masters.tasks.progress import CONSOLE, log, warn
from masters.tasks.run_context import Run
from masters.tasks.training_signal import report_signal
from masters.tasks.work_pools import run_on_pool

RETRIES = 2
RETRY_DELAY = 10  # seconds before the first retry, twice that before the second


def is_retryable(_task: Task, _run: TaskRun, state: State) -> bool:
    """Return whether a retry may succeed: the store or a process failed, not input or code, and no disk is full."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StoreError | TrackingError | WorkerLost) and not disk_space.is_full(error)


# Options of every stage's Prefect task. Results are not pickled: a retry reuses what the store holds.
TASK_OPTIONS: dict[str, Any] = dict(
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(RETRY_DELAY),
    retry_condition_fn=is_retryable,
    persist_result=False,
)


@dataclass(frozen=True)
class StageResult:
    """Return value of a stage's build function.

    `files`: SHA-256 by file name below the artifact's folder. `facts`: counts and scores for the artifact's record,
    with the shares of `training_signal` under `signal`. `execution`: how the build ran (engines, workers, processes),
    for the summary of the run alone.
    """

    files: dict[str, str]
    facts: dict = field(default_factory=dict)
    execution: dict = field(default_factory=dict)


@dataclass(frozen=True)
class StageOutcome:
    """The artifact of a stage, whether it was "built" or "reused", and how the build ran."""

    artifact: Artifact
    outcome: str
    execution: dict = field(default_factory=dict)


BuildFunction = Callable[[], StageResult]


class RebuildDecision(Enum):
    """Whether a finished artifact is removed before its stage is built, and why."""

    KEEP = "no reason to rebuild"
    REQUESTED = "the run was asked to rebuild the stage"
    OUTDATED = "an input was rebuilt and its content changed"


def decide_rebuild(is_requested: bool, is_outdated: bool, is_newer_than_run: bool) -> RebuildDecision:
    """Decide whether to remove the finished artifact of a stage.

    `is_requested`: the run was asked to rebuild the stage and has not done so yet. `is_outdated`: an input was rebuilt
    and its content changed. `is_newer_than_run`: another run built the artifact since this run started, which serves
    the request as well.
    """
    if is_requested and (is_outdated or not is_newer_than_run):
        return RebuildDecision.REQUESTED
    return RebuildDecision.OUTDATED if is_outdated else RebuildDecision.KEEP


def build_or_reuse(
    run: Run,
    identity: Identity,
    upstream: Upstream,
    build: BuildFunction,
    delete_stored: Callable[[], None] = lambda: None,
    prefetch_evaluation: bool = False,
    check_before: Callable[[], None] = lambda: None,
) -> Artifact:
    """Return the artifact of this identity: the finished one, or one that is built, committed and tracked now.

    A missing artifact is built by this process, or by a worker of the stage's pool. Adds an entry to `run.stages`. Its
    `peak_mib` is this process's peak memory during the stage, its `children_peak_mib` that of the child processes.

    `upstream`: everything that the stage reads; it goes into the record and into MLflow. `delete_stored`: called
    before a requested rebuild to delete results outside the artifact, which the build would reuse otherwise.
    `prefetch_evaluation`: passed on to the pool's worker. `check_before`: called in this process if the artifact is
    missing, wherever it is built; an error that it raises stops the stage.
    """
    started = time.monotonic()
    machine.reset_peak_memory()
    finished = None if run.must_rebuild(identity) else artifacts.find(run.storage, identity, upstream)
    with run.tracker.stage(identity, upstream) as record_artifact:
        if finished is not None:
            stage = StageOutcome(finished, "reused")
        else:
            check_before()
            stage = _build(run, identity, upstream, build, delete_stored, prefetch_evaluation)
        entry = _summary_entry(identity, stage, time.monotonic() - started)
        entry["mlflow_run_id"] = record_artifact(stage.artifact, entry)
        report_signal(run.tracker, identity.stage, entry.get("signal", {}))
    run.stages.append(entry)
    run.artifacts[identity.stage] = stage.artifact
    line = f"{identity.stage:<12} {stage.outcome:<7} {entry['rows']:>8} rows {entry['seconds']:>8.1f} s"
    CONSOLE.print(line, highlight=False)
    log("info", f"{' '.join(line.split())}: {stage.artifact.uri}")
    return stage.artifact


def _build(
    run: Run,
    identity: Identity,
    upstream: Upstream,
    build: BuildFunction,
    delete_stored: Callable[[], None],
    prefetch_evaluation: bool,
) -> StageOutcome:
    """Build the artifact on the stage's pool, or in this process."""
    if pool := run.pool_for(identity.kind):
        request = run.stage_request(identity, upstream, prefetch_evaluation)
        folder, outcome, execution = run_on_pool(run.config, run.storage, pool, request)
        return StageOutcome(artifacts.load(run.storage, folder), outcome, execution)
    return _build_locally(run, identity, upstream, build, delete_stored)


def write_file(storage: Storage, identity: Identity, name: str, content: bytes) -> dict[str, str]:
    """Write a file below the artifact's folder. Returns {name: SHA-256}, to merge into `StageResult.files`."""
    storage.write(f"{identity.folder}/{name}", content)
    return {name: digest(content)}


def _summary_entry(identity: Identity, stage: StageOutcome, seconds: float) -> dict:
    """Make the stage's entry of the run's summary, without its MLflow run."""
    facts = stage.artifact.facts
    entry = dict(
        name=identity.stage,
        fingerprint=stage.artifact.fingerprint,
        uri=stage.artifact.uri,
        outcome=stage.outcome,
        rows=facts.get("rows", 0),
        rejected=facts.get("rejected", 0),
        seconds=round(seconds, 2),
        peak_mib=round(machine.peak_memory_mib()),
    )
    signal = {"signal": facts["signal"]} if facts.get("signal") else {}
    return entry | stage.execution | signal


def _build_locally(
    run: Run, identity: Identity, upstream: Upstream, build: BuildFunction, delete_stored: Callable[[], None]
) -> StageOutcome:
    """Build and commit the artifact in this process, unless another run finishes it while this run waits."""

    def on_wait(holder: str) -> None:
        warn(f"{holder} builds {identity.stage} of {run.config.name}: waiting for it to finish")

    with exclusive_build(run.storage, identity.folder, run.work_folder(identity), on_wait) as check_exclusive:
        _remove_for_rebuild(run, identity, upstream, delete_stored)
        if artifact := artifacts.find(run.storage, identity, upstream):
            return StageOutcome(artifact, "reused")
        run.storage.remove_unfinished_writes(identity.folder)
        try:
            result = build()
        except FileNotFoundError as error:  # retried: the store lost a file that it had listed
            missing = " ".join(str(error).split())
            raise StoreError(f"store {run.storage.uri('')}: a file is missing: {missing}") from error
        check_exclusive()
        artifact = artifacts.commit(run.storage, identity, result.files, result.facts, upstream)
        return StageOutcome(artifact, "built", result.execution)


def _remove_for_rebuild(run: Run, identity: Identity, upstream: Upstream, delete_stored: Callable[[], None]) -> None:
    """Remove the finished artifact if `decide_rebuild` says so, and warn if a model version was made from it.

    A marker file in the artifact's folder makes a run rebuild a stage only once, however often the run is retried.
    """
    marker = f"{identity.folder}/rebuilt-{run.key}"
    finished = None
    with suppress(ArtifactError):  # damaged: a requested rebuild removes it, any other build reports it
        finished = artifacts.find(run.storage, identity)
    decision = decide_rebuild(
        is_requested=run.must_rebuild(identity) and not run.storage.exists(marker),
        is_outdated=finished is not None and artifacts.find(run.storage, identity, upstream) is None,
        is_newer_than_run=finished is not None and finished.created > run.started_at,
    )
    if decision is RebuildDecision.KEEP:
        return
    for version in run.tracker.registry.versions_made_from(identity.fingerprint):
        warn(
            f"{identity.stage}, from which {version} was made, is built again ({decision.value}): if its content "
            "changes, the recorded lineage of that version is broken (`masters lineage` shows it)"
        )
    artifacts.remove(run.storage, identity.folder)
    if decision is RebuildDecision.REQUESTED:
        delete_stored()
        run.storage.write(marker, b"")
