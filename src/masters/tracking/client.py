"""MLflow's client. Where MLflow fails or does not answer, after its own tries, that is a TrackingError in one line."""

import os
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import httpx
import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from masters.common.errors import InputError, TrackingError, Unreachable
from masters.common.redaction import DATABASES

ANSWERS = {"RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}  # MLflow is well
PUBLIC = "MASTERS_MLFLOW_PUBLIC_URL"  # where a browser finds MLflow, if not where runs do


def client(uri: str) -> MlflowClient:
    """A client for `uri`. What MLflow answers to a wrong question stays an MlflowException."""
    return cast(MlflowClient, _Client(MlflowClient(uri)))


class _Client:
    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        return _wrap_errors(found) if callable(found) else found


def _wrap_errors(call: Callable) -> Callable:
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


def check_answers(uri: str) -> None:
    """Raises Unreachable if an MLflow server is named and does not answer: its client would retry for minutes."""
    if not uri.startswith(("http://", "https://")):
        return
    name, password = (os.environ.get(f"MLFLOW_TRACKING_{part}", "") for part in ("USERNAME", "PASSWORD"))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    try:
        answer = httpx.get(
            f"{uri.rstrip('/')}/health", timeout=10, auth=(name, password) if name else None,
            headers={"Authorization": f"Bearer {token}"} if token else None,
        )  # fmt: skip
        if answer.status_code in (401, 403):
            raise InputError(
                f"MLflow at {redact_uri(uri)} refuses these credentials ({answer.status_code}): set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Unreachable(
            f"MLflow at {redact_uri(uri)} does not answer ({error}): start it, or choose another with "
            "runtime.mlflow_uri or MLFLOW_TRACKING_URI"
        ) from error


def browsed(uri: str) -> str:
    """Where a browser finds the server that runs reach at `uri`."""
    return (os.environ.get(PUBLIC) or redact_uri(uri)).rstrip("/")


def point_mlflow_at(uri: str) -> None:
    """For MLflow's functions that take no client.

    MLflow also writes the address into the environment, where it would pass for the user's wish in a later run.
    """
    named = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if named is not None:
        os.environ["MLFLOW_TRACKING_URI"] = named


def redact_uri(uri: str) -> str:
    """A tracking URI without the user and the password that it may hold."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    server = rest if scheme.partition("+")[0] in DATABASES else re.split("[/?#]", rest, maxsplit=1)[0]
    return f"{scheme}://{rest[server.rfind('@') + 1 :]}"
