"""What a configuration may name on this machine: bounded by the machine's own environment, never by the configuration.

Each setting is a list separated by commas. A setting that is not there bounds nothing: on their own machine people
may name what they can reach. Set for a worker, it holds for whatever a form or the API asks that worker for.

MASTERS_ALLOWED_DATA        folders, hub ids (`org/name`, `org/*`)          data.source; digits and easyvqa come with us
MASTERS_ALLOWED_STORES      folders, s3://bucket/prefix                     store.root
MASTERS_ALLOWED_MODELS      folders, hub ids                                student, teachers, judge, models to evaluate
MASTERS_ALLOWED_JUDGES      host, host:port, or the beginning of a URL      rewards.judge where it is a URL
MASTERS_ALLOWED_MLFLOW      URLs, folders of SQLite files                   runtime.mlflow_uri
MASTERS_ALLOWED_RAY         host, host:port                                 runtime.ray_address
MASTERS_TRUST_REMOTE_CODE   folders, hub ids                                judges that may run code of their own
MASTERS_BENCHMARK_TASKS     folders                                         lmms-eval tasks of one's own, code and all
MASTERS_JUDGED_BENCHMARKS   names of lmms-eval tasks                        tasks that may ask a judge's API for scores

Folders are absolute; links are followed first, and what lies below a folder is allowed with it.
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
from masters.config import Config
from masters.config.fields import TEACHER
from masters.config.judge_url import api_base_url, is_url
from masters.config.schema import BUILT_IN_SOURCES

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
ON_DISK = re.compile(r"(sqlite:///|(file|local):(//(?=/))?)", re.IGNORECASE)


class Setting(StrEnum):
    """Each is read when it is asked for."""

    DATA = "MASTERS_ALLOWED_DATA"
    STORES = "MASTERS_ALLOWED_STORES"
    MODELS = "MASTERS_ALLOWED_MODELS"
    JUDGES = "MASTERS_ALLOWED_JUDGES"
    MLFLOW = "MASTERS_ALLOWED_MLFLOW"
    RAY = "MASTERS_ALLOWED_RAY"
    CODE = "MASTERS_TRUST_REMOTE_CODE"
    BENCHMARK_TASKS = "MASTERS_BENCHMARK_TASKS"
    JUDGED_BENCHMARKS = "MASTERS_JUDGED_BENCHMARKS"

    @property
    def entries(self) -> list[str]:
        return [entry for part in os.environ.get(self, "").split(",") if (entry := part.strip())]


def check_allowed(setting: Setting, field: str, value: str, *also: Path) -> None:
    """Raises InputError if `value`, a path, a URL or a hub id, is not allowed. `also`: folders allowed beside."""
    entries = setting.entries
    if entries and not any(_matches(value, entry) for entry in [*entries, *map(str, also)]):
        raise _refused(setting, field, value)


def check_config(config: Config) -> None:
    """Raises InputError if a configuration names what is not allowed, or a secret. Opens nothing."""
    models = [config.student.model, *(teacher.model for teacher in config.teachers)]
    for value in (config.store.root, config.data.source, *models):
        if contains_secret(value):
            raise InputError(
                f"{value!r:.200} holds a password or a key, and a configuration is kept with the run: take it out; "
                "keys of stores and hubs are read from the environment (AWS_*, HF_TOKEN)"
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
    """A store's root, a path as an absolute one: unlike a model's name it is one before it is there, too."""
    return root if URL.match(root) or ON_DISK.match(root) or "::" in root else str(Path(root).expanduser().absolute())


def check_model(model: str, store: str | None = None) -> None:
    """Raises InputError if a model is not allowed; students that our own runs made in an allowed store are."""
    own = [cache_folder() / "models", *([Path(store).absolute()] if store and not URL.match(store) else [])]
    check_allowed(Setting.MODELS, "model", model, *own)


def check_judge(url: str) -> None:
    """Raises InputError if the host of a judge's URL is not allowed. `url` holds no user, query or fragment."""
    entries = Setting.JUDGES.entries
    if entries and not any(_serves(url, entry) for entry in entries):
        raise _refused(Setting.JUDGES, "rewards.judge", url)


def check_ray(address: str) -> None:
    """Raises InputError if a Ray cluster is not allowed. `address`: HOST:PORT."""
    entries = Setting.RAY.entries
    if entries and not any(_serves(f"ray://{address}", entry) for entry in entries):
        raise _refused(Setting.RAY, "runtime.ray_address", address)


def may_run_code(*names: str) -> bool:
    """Whether the machine's owner trusts the code that a model brings along. Without the setting nobody does."""
    return any(_matches(name, entry) for name in names for entry in Setting.CODE.entries)


def _refused(setting: Setting, field: str, value: str) -> InputError:
    return InputError(
        f"{field}: {value!r:.200} is not allowed on this machine; {setting} allows {', '.join(setting.entries)}"
    )


def _matches(value: str, entry: str) -> bool:
    """Whether one entry allows a value: the folder it lies in, the URL it goes on from, or its name."""
    place = _place(value)
    if place is not None:
        root = _place(entry) if ON_DISK.match(entry) or Path(entry).expanduser().is_absolute() else None
        return root is not None and place.is_relative_to(root)
    if URL.match(value):
        return bool(URL.match(entry)) and _below(value, entry)
    return value == entry or (entry.endswith("/*") and value.count("/") == 1 and value.startswith(entry[:-1]))


def _place(value: str) -> Path | None:
    """The file or folder that is meant, links followed; None for a URL of another kind and for a name."""
    path = ON_DISK.sub("", value, count=1) if ON_DISK.match(value) else value
    if path == value and (URL.match(value) or "::" in value):
        return None
    try:
        there = Path(path).expanduser()
        if path == value and not there.is_absolute() and not path.startswith(".") and not there.exists():
            return None
        return there.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no possible name
        raise InputError(f"{value!r:.200} cannot be a path: {error}") from None


def _below(url: str, entry: str) -> bool:
    """Whether a URL is the entry's or goes on from it; ".." is resolved first, host and scheme are as they are."""
    ours, theirs = _parts(url), _parts(entry)
    return ours[:2] == theirs[:2] and f"{ours[2]}/".startswith(f"{theirs[2].rstrip('/')}/")


def _parts(url: str) -> tuple[str, str, str]:
    parts = urlsplit(url)
    scheme = {"s3a": "s3"}.get(parts.scheme.lower(), parts.scheme.lower())
    return scheme, parts.netloc, posixpath.normpath(f"/{parts.path}").replace("//", "/")


def _serves(url: str, entry: str) -> bool:
    if URL.match(entry):
        return _below(url.lower(), entry.lower())
    wanted, found = urlsplit(f"//{entry.lower()}"), urlsplit(url.lower())
    return wanted.hostname == found.hostname and wanted.port in (None, found.port)
