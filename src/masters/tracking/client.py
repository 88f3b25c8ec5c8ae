"""A client for MLflow that raises TrackingError, with a text of one line, when MLflow fails or does not answer."""

import os
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import httpx
import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE, ErrorCode
from sqlalchemy.exc import OperationalError

from masters.common.errors import InputError, TrackingError, Unreachable, one_line
from masters.common.redaction import DATABASES
from masters.tracking.database import create_tables, sqlite_file

# error codes of refused requests that callers handle
REFUSALS = {"RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}
UNAVAILABLE = ErrorCode.Name(TEMPORARILY_UNAVAILABLE)  # what MLflow makes of a database that does not answer
CHOOSE_ANOTHER = "start it, or choose another with runtime.mlflow_uri or MLFLOW_TRACKING_URI"
PUBLIC_URL = "MASTERS_MLFLOW_PUBLIC_URL"  # environment variable: MLflow's address for browsers


def client(uri: str) -> MlflowClient:
    """Return a client for `uri`. What exists already or does not exist still raises MlflowException.

    Raises InputError if the database at `uri` cannot be opened, Unreachable if its server does not answer.
    """
    try:
        create_tables(uri)
        return cast(MlflowClient, _Client(MlflowClient(uri)))
    except InputError:
        raise
    except Exception as error:  # MLflow's, the database driver's or the disk's
        if sqlite_file(uri) is None and _is_unavailable(error):
            raise Unreachable(f"{_does_not_answer(uri, error)}: {CHOOSE_ANOTHER}") from error
        raise InputError(f"MLflow at {redact_uri(uri)} cannot be opened: {one_line(error)}") from error


def _is_unavailable(error: Exception) -> bool:
    """Return whether an error means that a database does not answer, or broke off while it was used."""
    return isinstance(error, OperationalError) or getattr(error, "error_code", None) == UNAVAILABLE


def _does_not_answer(uri: str, error: Exception) -> str:
    return f"MLflow at {redact_uri(uri)} does not answer ({one_line(error)})"


class _Client:
    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return _wrap_errors(attribute, self._client.tracking_uri) if callable(attribute) else attribute


def _wrap_errors(call: Callable, uri: str) -> Callable:
    @wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:  # MLflow's, or one from the disk, the database or the network
            if isinstance(error, MlflowException) and error.error_code in REFUSALS:
                raise
            if sqlite_file(uri) is None and _is_unavailable(error):
                remedy = "run again once it answers, to continue from here"
                raise TrackingError(f"{_does_not_answer(uri, error)}: {remedy}") from error
            raise TrackingError(f"MLflow: {one_line(error)}") from error

    return wrapped


def check_server(uri: str) -> None:
    """Raise Unreachable if `uri` names a server that does not answer: MLflow's client would retry for minutes."""
    if not uri.startswith(("http://", "https://")):
        return
    name, password = (os.environ.get(f"MLFLOW_TRACKING_{part}", "") for part in ("USERNAME", "PASSWORD"))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    try:
        response = httpx.get(
            f"{uri.rstrip('/')}/health",
            timeout=10,
            auth=(name, password) if name else None,
            headers={"Authorization": f"Bearer {token}"} if token else None,
        )
        if response.status_code in (401, 403):
            raise InputError(
                f"MLflow at {redact_uri(uri)} refuses the credentials ({response.status_code}): set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Unreachable(f"{_does_not_answer(uri, error)}: {CHOOSE_ANOTHER}") from error


def browser_url(uri: str) -> str:
    """Return the address by which a browser reaches the server at `uri`."""
    return (os.environ.get(PUBLIC_URL) or redact_uri(uri)).rstrip("/")


def point_mlflow_at(uri: str) -> None:
    """Set the address for MLflow functions that take no client, and restore MLFLOW_TRACKING_URI.

    MLflow writes the address into that variable, where a later run would take it for the user's setting.
    """
    previous = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if previous is not None:
        os.environ["MLFLOW_TRACKING_URI"] = previous


def redact_uri(uri: str) -> str:
    """Return a tracking URI without user and password."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    server = rest if scheme.partition("+")[0] in DATABASES else re.split("[/?#]", rest, maxsplit=1)[0]
    return f"{scheme}://{rest[server.rfind('@') + 1 :]}"
