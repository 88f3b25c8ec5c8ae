"""Metrics on their way to MLflow: written in batches, kept while MLflow does not answer."""

import time

from mlflow import MlflowClient
from mlflow.entities import Metric

from masters.common.errors import TrackingError
from masters.tracking.run_lineage import mlflow_key

BATCH_SIZE = 200  # metrics in a request
MAX_PENDING = 100_000  # metrics kept for each run while MLflow does not answer
RETRY_PAUSE = 60.0  # seconds without a request after a failed one


class MetricBuffer:
    """Collects metrics by run and writes them in batches. `lost` counts those that MLflow did not take."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._pending: dict[str, list[Metric]] = {}  # by run id
        self._paused_until = 0.0
        self.lost = 0

    def add(self, run_id: str, values: dict[str, float], step: int) -> None:
        """Add metrics of a run, and write them once there are enough for a batch."""
        now, pending = time.time_ns() // 1_000_000, self._pending.setdefault(run_id, [])
        pending += [Metric(mlflow_key(name), float(value), now, step) for name, value in values.items()]
        if len(pending) >= BATCH_SIZE and time.monotonic() > self._paused_until:
            self.flush()

    def flush(self) -> None:
        """Write all pending metrics. After a failure they stay, up to `MAX_PENDING` a run; older ones are lost."""
        for run_id, pending in self._pending.items():
            try:
                while pending:
                    self._client.log_batch(run_id, metrics=pending[:BATCH_SIZE])
                    del pending[:BATCH_SIZE]
            except TrackingError:
                self._paused_until = time.monotonic() + RETRY_PAUSE
                self.lost += max(0, len(pending) - MAX_PENDING)
                del pending[:-MAX_PENDING]
                return

    def close(self) -> None:
        """Drop what is still pending and count it as lost."""
        self.lost += sum(map(len, self._pending.values()))
        self._pending.clear()
