"""A stage that another process opened a run for in MLflow: what is built here is tracked there."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException

from masters.common.errors import InputError
from masters.config import Config
from masters.execution.pool_request import StageRequest
from masters.store.artifacts import Identity, Upstream
from masters.store.storage import Storage
from masters.tracking.client import check_answers, redact_uri
from masters.tracking.client import client as mlflow_client
from masters.tracking.locations import tracking_uri
from masters.tracking.registry import Registry
from masters.tracking.run_writer import RunWriter, Tracked


class PoolStageWriter(RunWriter):
    """Metrics go to the opened run; the rest of it is the opener's to write."""

    def __init__(self, config: Config, storage: Storage, wanted: StageRequest) -> None:
        """Raises InputError if this process tracks elsewhere."""
        self.uri, self.key, self._wanted = tracking_uri(config, storage), wanted.run, wanted
        check_answers(self.uri)
        self.registry, self._client, self._pending = Registry(self.uri), mlflow_client(self.uri), {}
        self.lost, self._pause = 0, 0.0
        try:
            found = self._client.get_run(wanted.tracked)
        except MlflowException as error:
            raise InputError(
                f"MLflow at {redact_uri(self.uri)} holds no run {wanted.tracked}: a pool's workers must track where "
                "the run that asks does; set runtime.mlflow_uri, or MLFLOW_TRACKING_URI for each of them"
            ) from error
        self._current = wanted.tracked
        self.run_id = found.data.tags.get("mlflow.parentRunId", wanted.tracked)

    @contextmanager
    def stage(self, identity: Identity, upstream: Upstream) -> Iterator[Tracked]:
        """Raises InputError if the stage would read something else than the opener wrote down."""
        self._wanted.check_reads(upstream)
        try:
            yield lambda artifact, done: self._current
        finally:
            self.flush()
            self.lost += sum(map(len, self._pending.values()))
