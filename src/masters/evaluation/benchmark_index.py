"""lmms-eval's own index of benchmark tasks, read in a separate process: importing lmms-eval takes many seconds.

`python -m masters.evaluation.benchmark_index` reads the JSON [names, task folders] and writes a `BenchmarkIndex`.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from masters.common.errors import InputError
from masters.common.log_errors import find_error
from masters.config.allowlist import Setting

PACKAGES = Path(sys.prefix) / "benchmarks"  # where `make setup-benchmarks` installs lmms-eval


@dataclass(frozen=True)
class BenchmarkIndex:
    """The names that lmms-eval knows and where the requested ones are defined.

    names: every task, group and tag.
    folders: for each requested name that exists, the folders of its YAML file, of files that this one includes, and of
        all its members.
    builtin_folder: the folder of lmms-eval's own tasks.
    """

    names: list[str]
    folders: dict[str, list[str]]
    builtin_folder: str


def lmms_eval_environment() -> dict[str, str]:
    """Return the environment variables of a process that imports lmms-eval, without telemetry and plugins."""
    path = os.pathsep.join(part for part in (str(PACKAGES), os.environ.get("PYTHONPATH")) if part)
    return {
        "PYTHONPATH": path,
        "LMMS_IMAGE_ENCODE_FORMAT": "PNG",  # images reach the model without lossy compression
        "LMMS_EVAL_PLUGINS": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@cache
def read_index(names: tuple[str, ...], task_folders: tuple[Path, ...]) -> BenchmarkIndex:
    """Read lmms-eval's index with the tasks in `task_folders`, once in a process: it takes more than 10 s.

    Raises InputError if lmms-eval cannot read them.
    """
    process = subprocess.run(
        [sys.executable, "-m", "masters.evaluation.benchmark_index"],
        input=json.dumps([names, list(map(str, task_folders))]),
        env=os.environ | lmms_eval_environment(),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise InputError(
            f"benchmarks: lmms-eval cannot index its tasks and those in the folders of {Setting.BENCHMARK_TASKS}: "
            f"{find_error(process.stderr):.300}"
        )
    return BenchmarkIndex(**json.loads(process.stdout))


def main() -> None:
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not be read as the index
    names, task_folders = json.load(sys.stdin)
    from lmms_eval import tasks  # pyright: ignore[reportMissingImports]

    index = tasks.TaskManager(include_path=task_folders or None).task_index
    found = BenchmarkIndex(
        names=sorted(index),
        folders={name: _find_folders(name, index) for name in names if name in index},
        builtin_folder=str(Path(tasks.__file__).resolve().parent),
    )
    json.dump(vars(found), output)
    output.close()


def _find_folders(name: str, index: dict[str, dict]) -> list[str]:
    """Return the folders of all YAML files that lmms-eval reads for a task, group or tag."""
    from lmms_eval import utils  # pyright: ignore[reportMissingImports]

    folders: set[str] = set()
    load = utils.load_yaml_config

    def load_and_record(yaml_path: str, *args: object, **options: object) -> dict:
        folders.add(str(Path(yaml_path).resolve().parent))
        return load(yaml_path, *args, **options)

    utils.load_yaml_config = load_and_record  # lmms-eval calls it for included files too
    try:
        pending, seen = [name], set()
        while pending:
            if (name := pending.pop()) in seen or name not in index:
                continue
            seen.add(name)
            entry = index[name]
            if entry["type"] == "tag":
                pending += entry["task"]
                continue
            config = utils.load_yaml_config(entry["yaml_path"], mode="simple")
            if entry["type"] == "group":
                pending += _member_names(config["task"])
    finally:
        utils.load_yaml_config = load
    return sorted(folders)


def _member_names(member: object) -> list[str]:
    """Return the names in a group's list of members; a member is a name or a configuration with a task or a group."""
    if isinstance(member, dict):
        return _member_names(member.get("task", member.get("group")))
    if isinstance(member, list):
        return [name for part in member for name in _member_names(part)]
    return [member] if isinstance(member, str) else []


if __name__ == "__main__":
    main()
