"""MLflow's client. Where MLflow fails or does not answer, after its own tries, that is a TrackingError in one line."""

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from masters.errors import TrackingError

ANSWERS = {"RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}  # MLflow is well


def client(uri: str) -> MlflowClient:
    """A client for `uri`. What MLflow answers to a wrong question stays an MlflowException."""
    return cast(MlflowClient, _Client(MlflowClient(uri)))


class _Client:
    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        return _told(found) if callable(found) else found


def _told(call: Callable) -> Callable:
    @wraps(call)
    def told(*args: Any, **named: Any) -> Any:
        try:
            return call(*args, **named)
        except MlflowException as error:
            if error.error_code in ANSWERS:
                raise
            raise TrackingError(f"MLflow: {_one_line(error)}") from error
        except Exception as error:  # of the disk, the database or the network beneath
            raise TrackingError(f"MLflow: {_one_line(error)}") from error

    return told


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
