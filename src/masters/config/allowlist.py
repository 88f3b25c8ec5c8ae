"""Allow lists: what a configuration may name on this machine, set by environment variables and not by configurations.

Each variable is a list separated by commas. A variable that is not set allows everything: on their own machine people
may name whatever they can reach. Variables set for a worker bound what a form or the API can ask that worker for.

MASTERS_ALLOWED_DATA        folders, hub ids (`org/name`, `org/*`)          data.source (digits, easyvqa: always)
MASTERS_ALLOWED_STORES      folders, s3://bucket/prefix                     store.root
MASTERS_ALLOWED_MODELS      folders, hub ids                                student, teachers, judge, models to evaluate
MASTERS_ALLOWED_JUDGES      host, host:port, or the beginning of a URL      rewards.judge where it is a URL
MASTERS_ALLOWED_IMAGE_HOSTS host, host:port, or the beginning of a URL      images of data.fetch_images
MASTERS_ALLOWED_MLFLOW      URLs, folders of SQLite files                   runtime.mlflow_uri
MASTERS_ALLOWED_RAY         host, host:port                                 runtime.ray_address
MASTERS_TRUST_REMOTE_CODE   folders, hub ids                                judges that may run code of their own
MASTERS_BENCHMARK_TASKS     folders                                         your own lmms-eval tasks, with their code
MASTERS_JUDGED_BENCHMARKS   names of lmms-eval tasks                        tasks that may call a judge's API for scores

Folders are absolute paths. Links are resolved first, and everything below an allowed folder is allowed too.
"""

import os
import posixpath
import re
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from masters.common.errors import InputError
from masters.common.machine import cache_folder
from masters.common.redaction import contains_secret
from masters.common.uri_scheme import URI_SCHEME
from masters.config import Config
from masters.config.fields import TEACHER
from masters.config.judge_url import api_base_url, is_url
from masters.config.schema import BUILT_IN_SOURCES

LOCAL_URL = re.compile(r"(sqlite:///|(file|local):(//(?=/))?)", re.IGNORECASE)


class Setting(StrEnum):
    """The environment variables with the allow lists. Each is read whenever it is needed."""

    DATA = "MASTERS_ALLOWED_DATA"
    STORES = "MASTERS_ALLOWED_STORES"
    MODELS = "MASTERS_ALLOWED_MODELS"
    JUDGES = "MASTERS_ALLOWED_JUDGES"
    IMAGE_HOSTS = "MASTERS_ALLOWED_IMAGE_HOSTS"
    MLFLOW = "MASTERS_ALLOWED_MLFLOW"
    RAY = "MASTERS_ALLOWED_RAY"
    CODE = "MASTERS_TRUST_REMOTE_CODE"
    BENCHMARK_TASKS = "MASTERS_BENCHMARK_TASKS"
    JUDGED_BENCHMARKS = "MASTERS_JUDGED_BENCHMARKS"

    @property
    def entries(self) -> list[str]:
        return [entry for part in os.environ.get(self, "").split(",") if (entry := part.strip())]


def check_allowed(setting: Setting, field: str, value: str, *extra_folders: Path) -> None:
    """Raise InputError if `value`, a path, URL or hub id, is neither on the allow list nor in an extra folder."""
    entries = setting.entries
    if entries and not any(_matches(value, entry) for entry in [*entries, *map(str, extra_folders)]):
        raise _not_allowed(setting, field, value)


def check_config(config: Config) -> None:
    """Raise InputError if a configuration contains a secret or names something that is not allowed. Opens nothing."""
    models = [config.student.model, *(teacher.model for teacher in config.teachers)]
    for value in (config.store.root, config.data.source, *models):
        if contains_secret(value):
            raise InputError(
                f"{value!r:.200} contains a password or a key, and the configuration is stored with the run: remove "
                "it; keys of stores and hubs are read from the environment (AWS_*, HF_TOKEN)"
            )
    check_allowed(Setting.STORES, "store.root", absolute_root(config.store.root))
    if config.runtime.mlflow_uri:
        check_allowed(Setting.MLFLOW, "runtime.mlflow_uri", config.runtime.mlflow_uri)
    if config.runtime.cluster:
        check_ray(config.runtime.cluster)
    if config.data.source not in BUILT_IN_SOURCES:
        check_allowed(Setting.DATA, "data.source", config.data.source)
    judge = config.rewards.judge
    if is_url(judge):
        check_judge(api_base_url(judge))
    elif judge != TEACHER:
        models.append(judge)
    for model in models:
        check_model(model, config.store.root)


def absolute_root(root: str) -> str:
    """Return a store's root, as an absolute path if it is a local folder, whether or not the folder exists yet."""
    is_url_or_absolute = URI_SCHEME.match(root) or LOCAL_URL.match(root) or "::" in root
    return root if is_url_or_absolute else str(Path(root).expanduser().absolute())


def check_model(model: str, store: str | None = None) -> None:
    """Raise InputError if a model is not allowed. Students that earlier runs built in the store `store` are allowed."""
    student_folders = [cache_folder() / "models"]
    if store and not URI_SCHEME.match(store):
        student_folders.append(Path(store).absolute())
    check_allowed(Setting.MODELS, "model", model, *student_folders)


def check_judge(url: str) -> None:
    """Raise InputError if the host of a judge's URL is not allowed. `url` has no user, query or fragment."""
    if not allows_host(Setting.JUDGES, url):
        raise _not_allowed(Setting.JUDGES, "rewards.judge", url)


def check_ray(address: str) -> None:
    """Raise InputError if a Ray cluster is not allowed. `address`: HOST:PORT."""
    if not allows_host(Setting.RAY, f"ray://{address}"):
        raise _not_allowed(Setting.RAY, "runtime.ray_address", address)


def allows_host(setting: Setting, url: str) -> bool:
    """Return whether a list of hosts allows the host of a URL; a list without entries allows every host."""
    return not setting.entries or any(_matches_host(setting, url, entry) for entry in setting.entries)


def may_run_code(*names: str) -> bool:
    """Return whether a model's own code is trusted under one of these names. By default none is."""
    return any(_matches(name, entry) for name in names for entry in Setting.CODE.entries)


def _not_allowed(setting: Setting, field: str, value: str) -> InputError:
    return InputError(
        f"{field}: {value!r:.200} is not allowed on this machine; {setting} allows {', '.join(setting.entries)}"
    )


def _matches(value: str, entry: str) -> bool:
    """Return whether an entry allows a value: a path in its folder, a URL below its URL, or its hub id."""
    path = _resolve_path(value)
    if path is not None:
        is_folder = LOCAL_URL.match(entry) or Path(entry).expanduser().is_absolute()
        folder = _resolve_path(entry) if is_folder else None
        return folder is not None and path.is_relative_to(folder)
    if URI_SCHEME.match(value):
        return bool(URI_SCHEME.match(entry)) and _is_below(value, entry)
    return value == entry or (entry.endswith("/*") and value.count("/") == 1 and value.startswith(entry[:-1]))


def _resolve_path(value: str) -> Path | None:
    """Return the file or folder that a value names, links resolved; None for other URLs and for hub ids."""
    is_local_url = bool(LOCAL_URL.match(value))
    path_text = LOCAL_URL.sub("", value, count=1) if is_local_url else value
    if not is_local_url and (URI_SCHEME.match(value) or "::" in value):
        return None
    try:
        path = Path(path_text).expanduser()
        if not is_local_url and not path.is_absolute() and not value.startswith(".") and not path.exists():
            return None  # a hub id
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # such as a null byte in a name
        raise InputError(f"{value!r:.200} cannot be a path: {error}") from None


def _is_below(url: str, entry: str) -> bool:
    """Return whether a URL equals or extends the entry's URL. ".." is resolved; scheme and host must be equal."""
    scheme, host, path = _split_url(url)
    entry_scheme, entry_host, entry_path = _split_url(entry)
    return (scheme, host) == (entry_scheme, entry_host) and f"{path}/".startswith(f"{entry_path.rstrip('/')}/")


def _split_url(url: str) -> tuple[str, str, str]:
    parts = urlsplit(url)
    scheme = {"s3a": "s3"}.get(parts.scheme.lower(), parts.scheme.lower())
    return scheme, parts.netloc, posixpath.normpath(f"/{parts.path}").replace("//", "/")


def _matches_host(setting: Setting, url: str, entry: str) -> bool:
    if URI_SCHEME.match(entry):
        return _is_below(url.lower(), entry.lower())
    actual = urlsplit(url.lower())
    try:
        allowed = urlsplit(f"//{entry.lower()}")
        return allowed.hostname == actual.hostname and allowed.port in (None, actual.port)
    except ValueError as error:  # of urllib, whose attributes parse the text
        raise InputError(f"{setting}: expected host or host:port, found {entry!r:.200} ({error})") from None
