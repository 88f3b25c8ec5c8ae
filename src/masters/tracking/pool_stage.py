"""Continues a stage's MLflow run on a worker of another pool."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException

from masters.common.errors import InputError
from masters.config import Config
from masters.execution.pool_request import StageRequest
from masters.store.artifacts import Identity, Upstream
from masters.store.storage import Storage
from masters.tracking.client import check_server, redact_uri
from masters.tracking.locations import tracking_uri
from masters.tracking.run_writer import RecordArtifact, RunWriter


class PoolStageWriter(RunWriter):
    """Writes metrics to the run that the requesting process opened, which writes everything else."""

    def __init__(self, config: Config, storage: Storage, request: StageRequest) -> None:
        """Find the opened run. Raises InputError if this process tracks in another MLflow."""
        uri = tracking_uri(config, storage)
        check_server(uri)
        self._connect(uri)
        self.key, self._request = request.run, request
        try:
            found = self._client.get_run(request.tracked)
        except MlflowException as error:
            raise InputError(
                f"MLflow at {redact_uri(self.uri)} has no run {request.tracked}: a pool's workers must track where the "
                "requesting run does; set runtime.mlflow_uri, or MLFLOW_TRACKING_URI on each worker"
            ) from error
        self.current_run_id = request.tracked
        self.run_id = found.data.tags.get("mlflow.parentRunId", request.tracked)

    @contextmanager
    def stage(self, identity: Identity, upstream: Upstream) -> Iterator[RecordArtifact]:
        """Write the stage's metrics. Raises InputError if its inputs differ from those in the request."""
        self._request.check_reads(upstream)
        try:
            yield lambda artifact, done: self.current_run_id
        finally:
            self._metrics.flush()
            self._metrics.close()
