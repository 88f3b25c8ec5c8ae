"""Build a stage on another work pool: start a run of the deployment `stage/POOL` and wait for it.

The started run is a subflow: Prefect shows it below the requesting run and cancels both together. A requesting run that
is retried after its process was killed finds the subflow by its idempotency key and waits for it again.
"""

import time
from contextlib import suppress
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, WorkerFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.states import Cancelling

from masters.common import errors
from masters.common.errors import InputError, MastersError, WorkerError, WorkerLost
from masters.common.hashing import digest
from masters.config import Config
from masters.execution import pool_request
from masters.execution.pool_request import StageRequest, make_portable
from masters.store.storage import Storage
from masters.tasks.progress import log, warn
from masters.tracking.locations import default_uri, tracking_uri

FLOW = "stage"
POLL_SECONDS = 2.0
SERVER_TIMEOUT = 600.0  # seconds that a Prefect server may be unreachable
MAX_ATTEMPTS = 50  # subflows for one stage, by a run and all its retries
UNREACHABLE = (httpx.HTTPError, PrefectHTTPStatusError)
# fields of the worker's summary entry that the requesting run fills in by itself
OWN_FIELDS = ("name", "fingerprint", "uri", "outcome", "rows", "rejected", "seconds", "mlflow_run_id")


def check_pools(config: Config, storage: Storage) -> None:
    """Raise InputError if a pool of the configuration cannot build its stages, as far as this process can know."""
    pools = config.runtime.pools.names
    if not pools:
        return
    if not storage.local and not storage.s3:
        raise InputError(f"store.root {storage.uri('')}: runtime.pools need a store that workers reach: a folder or S3")
    if not storage.local and tracking_uri(config, storage) == default_uri(storage):
        raise InputError(
            "runtime.pools need an MLflow server that workers reach, but the default is a file in this working folder: "
            "set MLFLOW_TRACKING_URI here and on the workers"
        )
    with get_client(sync_client=True) as client:
        for pool in pools:
            _check_pool(client, pool)


def _check_pool(client: SyncPrefectClient, pool: str) -> None:
    """Raise InputError if a pool has no deployment, and warn if no worker is online."""
    try:
        client.read_deployment_by_name(f"{FLOW}/{pool}")
    except ObjectNotFound:
        raise InputError(
            f"runtime.pools: expected the deployment {FLOW}/{pool} at {client.api_url}, found none; name the pool in "
            "MASTERS_POOLS for `masters up`, and set PREFECT_API_URL for this process"
        ) from None
    online = WorkerFilter.model_validate(dict(status=dict(any_=["ONLINE"])))
    if not client.read_workers_for_work_pool(pool, worker_filter=online):
        warn(f"no worker of pool {pool} is online: its stages wait for one (prefect worker start --pool {pool})")


def run_on_pool(config: Config, storage: Storage, pool: str, request: StageRequest) -> tuple[str, str, dict]:
    """Have a worker of the pool build a stage. Returns the artifact's folder, its outcome, and how the build ran.

    Raises the error that the stage raised there, or WorkerLost if its process was lost, so that the task is retried.
    """
    with get_client(sync_client=True) as client:
        keys = [digest(f"{flow_run.id} {request.key} {number}".encode())[:32] for number in range(MAX_ATTEMPTS)]
        key, running = _choose_key(_find_subflows(client, keys), keys, request.stage)
        request = request.model_copy(update=dict(key=key))
        pool_request.write_note(storage, key)
        subflow = running or _start_subflow(config, storage, pool, request)
        try:
            subflow = _wait_for_end(client, subflow.id, pool)
            log("info", f"{request.stage} on pool {pool} ended as {subflow.state and subflow.state.name}")
            _raise_failure(subflow.state, request.stage, pool)
            folder, entry = pool_request.read_result(storage, key)
            workers = sum(run.start_time is not None for run in _find_subflows(client, keys).values())
        except BaseException:
            _cancel(client, subflow.id)
            raise
        finally:
            with suppress(errors.StoreError):
                pool_request.remove_note_and_result(storage, key)
    execution = {name: value for name, value in entry.items() if name not in OWN_FIELDS}
    execution |= dict(pool=pool, workers=workers, flow_run_id=str(subflow.id), worker_seconds=entry["seconds"])
    return folder, entry["outcome"], execution


def _find_subflows(client: SyncPrefectClient, keys: list[str]) -> dict[str, FlowRun]:
    """Find the subflows with these idempotency keys, which this attempt and earlier ones started."""
    with_key = FlowRunFilter.model_validate(dict(idempotency_key=dict(any_=keys)))
    runs = client.read_flow_runs(flow_run_filter=with_key, limit=len(keys))
    return {run.idempotency_key: run for run in runs if run.idempotency_key}


def _choose_key(subflows: dict[str, FlowRun], keys: list[str], stage: str) -> tuple[str, FlowRun | None]:
    """Return the key of a subflow that still runs, with that subflow, or else the next unused key."""
    for key, run in subflows.items():
        if run.state and not run.state.is_final() and not run.state.is_cancelling():
            return key, run
    unused = [key for key in keys if key not in subflows]
    if not unused:
        raise WorkerError(f"{stage} was started {MAX_ATTEMPTS} times without success: start another run")
    return unused[0], None


def _start_subflow(config: Config, storage: Storage, pool: str, request: StageRequest) -> FlowRun:
    portable = make_portable(config, storage.uri(""))
    return run_deployment(  # pyright: ignore[reportReturnType]
        f"{FLOW}/{pool}",
        timeout=0,
        idempotency_key=request.key,
        flow_run_name=f"{config.name} {request.stage}",
        parameters=dict(config=portable.model_dump(mode="json"), assignment=request.model_dump(mode="json")),
    )


def _wait_for_end(client: SyncPrefectClient, run_id: UUID, pool: str) -> FlowRun:
    """Wait until the subflow has ended, and return it. Its server may be unreachable for `SERVER_TIMEOUT` seconds."""
    last_answer, has_warned = time.monotonic(), False
    while True:
        try:
            run = client.read_flow_run(run_id)
        except UNREACHABLE as error:
            if time.monotonic() - last_answer > SERVER_TIMEOUT:
                raise WorkerLost(f"the Prefect server has not answered for {SERVER_TIMEOUT:.0f} s: {error}") from error
        else:
            last_answer = time.monotonic()
            if run.state and run.state.is_final():
                return run
            if run.state and run.state.name == "Late" and not has_warned:
                warn(f"pool {pool} has not started {run.name} yet: it is busy, or has no worker")
                has_warned = True
        time.sleep(POLL_SECONDS)


def _raise_failure(state: State | None, stage: str, pool: str) -> None:
    """Raise the error with which a stage failed on the pool. The name of a failed state is the error's class."""
    if state is None or state.is_completed():
        return
    message = " ".join((state.message or "no message").split())
    if state.is_crashed():
        raise WorkerLost(f"{stage} on pool {pool} was lost: {message}")
    if state.is_cancelled():
        raise MastersError(f"{stage} on pool {pool} was cancelled")
    error = getattr(errors, state.name or "", None)
    if not (isinstance(error, type) and issubclass(error, MastersError)):
        error = WorkerError
    raise error(f"{message} ({stage} on pool {pool})")


def _cancel(client: SyncPrefectClient, run_id: UUID) -> None:
    """Cancel the subflow, so that its engines end. A finished one stays as it is."""
    with suppress(Exception):  # the server refuses for a finished run, or is unreachable; the first error is raised
        client.set_flow_run_state(run_id, Cancelling(message="the requesting run has ended"))
