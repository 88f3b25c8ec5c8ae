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

from masters.common.errors import InputError, TrackingError, Unreachable, one_line
from masters.common.redaction import DATABASES
from masters.tracking.database import create_tables

# error codes of refused requests that callers handle
REFUSALS = {"RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}
PUBLIC_URL = "MASTERS_MLFLOW_PUBLIC_URL"  # environment variable: MLflow's address for browsers


def client(uri: str) -> MlflowClient:
    """Return a client for `uri`. What exists already or does not exist still raises MlflowException.

    Raises InputError if the database at `uri` cannot be opened.
    """
    try:
        create_tables(uri)
        return cast(MlflowClient, _Client(MlflowClient(uri)))
    except Exception as error:  # MLflow's, the database driver's or the disk's
        raise InputError(f"MLflow at {redact_uri(uri)} cannot be opened: {one_line(error)}") from error


class _Client:
    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return _wrap_errors(attribute) if callable(attribute) else attribute


def _wrap_errors(call: Callable) -> Callable:
    @wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except MlflowException as error:
            if error.error_code in REFUSALS:
                raise
            raise TrackingError(f"MLflow: {one_line(error)}") from error
        except Exception as error:  # from the disk, the database or the network
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
        raise Unreachable(
            f"MLflow at {redact_uri(uri)} does not answer ({error}): start it, or choose another with "
            "runtime.mlflow_uri or MLFLOW_TRACKING_URI"
        ) from error


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
