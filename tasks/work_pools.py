"""A stage on another work pool: a run of the deployment `stage/POOL`, asked for and waited for.

That run is a subflow: Prefect shows it below the run that asked, and cancels it with that run. A run that goes on
after its process was killed finds the stage's run again by its idempotency key, and waits on.
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
from masters.execution import pool_request as meeting
from masters.execution.pool_request import StageRequest, portable
from masters.store.storage import Storage
from masters.tasks.progress import log, warn
from masters.tracking.locations import default_uri, tracking_uri

FLOW = "stage"
POLL = 2.0  # seconds
PATIENCE = 600.0  # seconds that a Prefect server may be away
ASKED = 50  # times that a stage is asked for, by a run and all its attempts
AWAY = (httpx.HTTPError, PrefectHTTPStatusError)
ENTRY = ("name", "fingerprint", "uri", "outcome", "rows", "rejected", "seconds", "mlflow_run_id")  # the run's to say


def check(config: Config, storage: Storage) -> None:
    """Raises InputError if a pool of the configuration cannot do a stage of it, as far as that shows from here."""
    pools = config.runtime.pools.named
    if not pools:
        return
    if not storage.local and not storage.s3:
        raise InputError(f"store.root {storage.uri('')}: runtime.pools need a store that workers reach: a folder or S3")
    if not storage.local and tracking_uri(config, storage) == default_uri(storage):
        raise InputError(
            "runtime.pools need an MLflow that workers reach, and the default is a file in this working folder: "
            "set MLFLOW_TRACKING_URI, for the workers too"
        )
    with get_client(sync_client=True) as client:
        for pool in pools:
            _check_pool(client, pool)


def _check_pool(client: SyncPrefectClient, pool: str) -> None:
    try:
        client.read_deployment_by_name(f"{FLOW}/{pool}")
    except ObjectNotFound:
        raise InputError(
            f"runtime.pools: expected the deployment {FLOW}/{pool} at {client.api_url}, found none; name the pool in "
            "MASTERS_POOLS of `masters up`, and PREFECT_API_URL for this process"
        ) from None
    online = WorkerFilter.model_validate(dict(status=dict(any_=["ONLINE"])))
    if not client.read_workers_for_work_pool(pool, worker_filter=online):
        warn(f"no worker of pool {pool} is online: its stages wait for one (prefect worker start --pool {pool})")


def handed_over(config: Config, storage: Storage, pool: str, wanted: StageRequest) -> tuple[str, str, dict]:
    """Folder of the artifact that a worker of the pool has built, its outcome, and how it ran.

    Raises what the stage raised there; WorkerLost if its process was lost, so that the task tries again.
    """
    with get_client(sync_client=True) as client:
        keys = [digest(f"{flow_run.id} {wanted.key} {number}".encode())[:32] for number in range(ASKED)]
        key, live = _asked(_runs(client, keys), keys, wanted.stage)
        wanted = wanted.model_copy(update=dict(key=key))
        meeting.ask(storage, key)
        run = live or _start(config, storage, pool, wanted)
        try:
            run = _ended(client, run.id, pool)
            log("info", f"{wanted.stage} on pool {pool} ended as {run.state and run.state.name}")
            _judge(run.state, wanted.stage, pool)
            folder, done = meeting.answered(storage, key)
            workers = sum(begun.start_time is not None for begun in _runs(client, keys).values())
        except BaseException:
            _cancel(client, run.id)
            raise
        finally:
            with suppress(errors.StoreError):
                meeting.forget(storage, key)
    where = dict(pool=pool, workers=workers, flow_run_id=str(run.id), worker_seconds=done["seconds"])
    return folder, done["outcome"], {name: value for name, value in done.items() if name not in ENTRY} | where


def _runs(client: SyncPrefectClient, keys: list[str]) -> dict[str, FlowRun]:
    """What was asked for under these keys, by this attempt of ours and by earlier ones."""
    ours = FlowRunFilter.model_validate(dict(idempotency_key=dict(any_=keys)))
    found = client.read_flow_runs(flow_run_filter=ours, limit=len(keys))
    return {run.idempotency_key: run for run in found if run.idempotency_key}


def _asked(found: dict[str, FlowRun], keys: list[str], stage: str) -> tuple[str, FlowRun | None]:
    """The key for a stage, and its run where an earlier attempt of ours asked for one that still goes on."""
    for key, run in found.items():
        if run.state and not run.state.is_final() and not run.state.is_cancelling():
            return key, run
    free = [key for key in keys if key not in found]
    if not free:
        raise WorkerError(f"{stage} was asked for {ASKED} times: start another run")
    return free[0], None


def _start(config: Config, storage: Storage, pool: str, wanted: StageRequest) -> FlowRun:
    sent = portable(config, storage.uri(""))
    return run_deployment(  # pyright: ignore[reportReturnType]
        f"{FLOW}/{pool}", timeout=0, idempotency_key=wanted.key, flow_run_name=f"{config.name} {wanted.stage}",
        parameters=dict(config=sent.model_dump(mode="json"), assignment=wanted.model_dump(mode="json")),
    )  # fmt: skip


def _ended(client: SyncPrefectClient, run_id: UUID, pool: str) -> FlowRun:
    """The run, at its end. Its server may be away for a while."""
    answered, late = time.monotonic(), False
    while True:
        try:
            run = client.read_flow_run(run_id)
        except AWAY as error:
            if time.monotonic() - answered > PATIENCE:
                raise WorkerLost(f"the Prefect server has not answered for {PATIENCE:.0f} s: {error}") from error
        else:
            answered = time.monotonic()
            if run.state and run.state.is_final():
                return run
            if run.state and run.state.name == "Late" and not late:
                warn(f"pool {pool} has not begun {run.name} yet: it is busy, or has no worker")
                late = True
        time.sleep(POLL)


def _judge(state: State | None, stage: str, pool: str) -> None:
    """Raises what became of a stage that is not completed."""
    if state is None or state.is_completed():
        return
    said = " ".join((state.message or "it said nothing").split())
    if state.is_crashed():
        raise WorkerLost(f"{stage} on pool {pool} was lost: {said}")
    if state.is_cancelled():
        raise MastersError(f"{stage} on pool {pool} was cancelled")
    kind = getattr(errors, state.name or "", None)
    if not (isinstance(kind, type) and issubclass(kind, MastersError)):
        kind = WorkerError
    raise kind(f"{said} ({stage} on pool {pool})")


def _cancel(client: SyncPrefectClient, run_id: UUID) -> None:
    """Nobody waits for it any more: its engines end. A run that is over stays as it is."""
    with suppress(Exception):  # the server refuses for a run at its end, or is away; what counts is why we are here
        client.set_flow_run_state(run_id, Cancelling(message="the run that asked for it has ended"))
