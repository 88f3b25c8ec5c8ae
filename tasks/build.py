"""Build an artifact, or reuse the one that is there, with its timing and tracking: what all stages share."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from masters.common import machine
from masters.common.errors import ArtifactError, StoreError, TrackingError, WorkerLost
from masters.store import artifacts
from masters.store.artifacts import Artifact, Identity, Upstream
from masters.store.locks import exclusive_build
from masters.tasks.progress import CONSOLE, log, warn
from masters.tasks.run_context import Run
from masters.tasks.work_pools import handed_over

RETRIES = 2
BACKOFF = 10  # seconds before the first retry, twice that before the second
Build = Callable[[], tuple[dict[str, str], dict, dict]]  # files with digests, facts, how it ran


def retryable(_task: Task, _run: TaskRun, state: State) -> bool:
    """Whether another try may succeed: the store or a process failed, not the input or the code."""
    return isinstance(state.result(raise_on_failure=False), StoreError | TrackingError | WorkerLost)


# how every stage runs as a task: nothing of it is pickled; what a stage had finished before it failed is reused
STAGE: dict[str, Any] = dict(
    cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=exponential_backoff(BACKOFF),
    retry_condition_fn=retryable, persist_result=False,
)  # fmt: skip


def _discard(run: Run, identity: Identity, upstream: Upstream, forget: Callable[[], None]) -> None:
    """Make room for what is to be built again: what the run was asked to, once, however often it is cut short and goes
    on; and what was made from an input that was built again since and came out different.

    What another run built since this one began is as good.
    """
    mark = f"{identity.folder}/rebuilt-{run.key}"
    asked, found = run.rebuilds(identity) and not run.storage.exists(mark), None
    with suppress(ArtifactError):  # damaged: a reason to build again where that was asked for, else told
        found = artifacts.find(run.storage, identity)
    outdated = found is not None and artifacts.find(run.storage, identity, upstream) is None
    if not outdated and (not asked or (found and found.created > run.began)):
        return
    for version in run.tracker.registry.made_from(identity.fingerprint):
        warn(
            f"{identity.stage} of {version} is built again: if other bytes come of it, the lineage of that version no "
            "longer holds (`masters lineage` tells)"
        )
    artifacts.discard(run.storage, identity)
    if asked:
        forget()
        run.storage.write(mark, b"")


def _built(run: Run, build: Build) -> tuple[dict[str, str], dict, dict]:
    """What `build` gives. Raises StoreError, and so may try again, where something of the store is gone."""
    try:
        return build()
    except FileNotFoundError as error:
        raise StoreError(
            f"store {run.storage.uri('')}: {' '.join(str(error).split())} is not there any more"
        ) from error


def _build_locally(
    run: Run, identity: Identity, upstream: Upstream, build: Build, forget: Callable[[], None]
) -> tuple[Artifact, str, dict]:
    """The artifact, built in this process, its outcome and how it ran; another run may have been first."""
    what = f"builds {identity.stage} of {run.config.name}: waiting for it"
    with exclusive_build(run.storage, identity.folder, run.work(identity), lambda who: warn(f"{who} {what}")) as check:
        _discard(run, identity, upstream, forget)
        if artifact := artifacts.find(run.storage, identity, upstream):  # it was built while this run waited
            return artifact, "reused", {}
        run.storage.sweep(identity.folder)
        files, facts, how = _built(run, build)
        check()
        return artifacts.commit(run.storage, identity, files, facts, upstream), "built", how


def build_or_reuse(
    run: Run, identity: Identity, upstream: Upstream, build: Build,
    forget: Callable[[], None] = lambda: None, ahead: bool = False,
) -> Artifact:  # fmt: skip
    """The artifact of this identity: found, or built, committed and tracked. Its outcome joins the run's stages.

    What is not there is built in this process, or by a worker of the stage's pool, which gets `ahead` passed on.

    `upstream` is everything that the stage reads: it goes into the record and into MLflow. Of the outcome, `peak_mib`
    is that of the building process while the stage ran, `children_peak_mib` that of the processes it started. `forget`:
    removes what lies elsewhere and would not be made again otherwise, when the stage is to be rebuilt.
    """
    began = time.monotonic()
    machine.forget_peak()
    artifact = None if run.rebuilds(identity) else artifacts.find(run.storage, identity, upstream)
    how, outcome = {}, "reused"
    with run.tracker.stage(identity, upstream) as tracked:
        if artifact is None and (pool := run.pool(identity.kind)):
            wanted = run.assignment(identity, upstream, ahead)
            folder, outcome, how = handed_over(run.config, run.storage, pool, wanted)
            artifact = artifacts.load(run.storage, folder)
        elif artifact is None:
            artifact, outcome, how = _build_locally(run, identity, upstream, build, forget)
        done = dict(
            name=identity.stage, fingerprint=artifact.fingerprint, uri=artifact.uri, outcome=outcome,
            rows=artifact.facts.get("rows", 0), rejected=artifact.facts.get("rejected", 0),
            seconds=round(time.monotonic() - began, 2), peak_mib=round(machine.peak_mib()),
        ) | how  # fmt: skip
        done["mlflow_run_id"] = tracked(artifact, done)
    run.stages.append(done)
    run.made[identity.stage] = artifact
    line = f"{identity.stage:<12} {outcome:<7} {done['rows']:>8} rows {done['seconds']:>8.1f} s"
    CONSOLE.print(line, highlight=False)
    log("info", f"{' '.join(line.split())}: {artifact.uri}")
    return artifact
