"""Which tasks of lmms-eval are meant by a list of names: understood, and refused, before work starts.

lmms-eval is read and not imported: that takes it the better part of a minute, and its packages lie in a folder of their
own that only its process sees (docs/benchmarks.md). Its index is made as its own TaskManager does: a YAML file names a
task, a group (a task that lists tasks) and the tags that it is found by.
"""

import difflib
import re
import sys
from dataclasses import dataclass, field
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from pathlib import Path

import yaml

from masters.common.errors import InputError
from masters.common.hashing import folder_digest
from masters.config.allowlist import Setting

PACKAGES = Path(sys.prefix) / "benchmarks"  # where `make setup-benchmarks` puts them
SET = "paper"
PAPER = {  # the 13 benchmarks of arXiv 2512.22238 and what lmms-eval calls their usual split
    "AI2D": "ai2d", "ChartQA": "chartqa", "MathVista": "mathvista_testmini", "MMB": "mmbench_en_dev",
    "MMB-CN": "mmbench_cn_dev", "MM-Vet": "mmvet", "MMMU": "mmmu_val", "MMMU-Pro": "mmmu_pro", "MMStar": "mmstar",
    "BLINK": "blink", "SEED": "seedbench", "SEED2+": "seedbench_2_plus", "RealWorldQA": "realworldqa",
}  # fmt: skip
ASKS = re.compile(r"llm_judge|API_KEY|requests\.post|openai", re.IGNORECASE)  # in the code of a task that asks a judge
USES = re.compile(r"lmms_eval\.tasks\.([\w.]+)")  # modules of other tasks that it takes over
ASKS_NOBODY = {"mmmu_val"}  # read, in 0.7.3: the verifier that its code speaks of serves mmmu_val_reasoning alone


@dataclass(frozen=True)
class BenchmarkSelection:
    """Tasks to run, each once and in order, with the version of lmms-eval.

    `own`: digests of the folders that tasks from outside of lmms-eval lie in, by folder; `theirs`: whether there are
    others too (to read all of lmms-eval's takes it 20 s).
    """

    tasks: tuple[str, ...]
    version: str
    own: dict[str, str]
    theirs: bool = True


@dataclass
class _Entry:
    folders: set[Path] = field(default_factory=set)
    members: list[str] = field(default_factory=list)


class _Loader(yaml.CSafeLoader):
    """Reads YAML without the functions that it names."""


_Loader.add_multi_constructor("!", lambda *_: None)


def select_benchmarks(names: list[str]) -> BenchmarkSelection:
    """The tasks that the names stand for: "paper", one of `PAPER` in any case, or what lmms-eval calls one.

    Raises InputError where lmms-eval is not installed, does not have one, or scores one by sending answers away
    that this machine's owner has not named in MASTERS_JUDGED_BENCHMARKS.
    """
    found = _installed()
    if found is None:
        raise InputError("benchmarks: expected lmms-eval, found none; run `make setup-benchmarks`")
    theirs, own = Path(str(found.locate_file("lmms_eval/tasks"))), _own_folders()
    index = _indexed([theirs, *own])
    tasks = tuple(dict.fromkeys(task for name in names for task in _meant(name)))
    if unknown := [task for task in tasks if task not in index]:
        near = difflib.get_close_matches(unknown[0], [*PAPER, *index], 3)
        raise InputError(
            f"benchmarks: lmms-eval {found.version} has no task {unknown[0]!r:.200}"
            f"{' (near it: ' + ', '.join(near) + ')' if near else ''}; expected {SET!r}, one of {', '.join(PAPER)}, a "
            f"name of lmms-eval's, or of a task in the folders of {Setting.BENCHMARK_TASKS}"
        )
    folders = {task: _folders(index, task) for task in tasks}
    allowed = {*ASKS_NOBODY, *Setting.JUDGED_BENCHMARKS.entries}
    judged = [task for task in tasks if task not in allowed and _asks(folders[task], theirs)]
    if judged:
        raise InputError(
            f"benchmarks: scoring {', '.join(judged)} sends questions and answers to a judge's API (OPENAI_API_URL), "
            f"and scores 0 or at random where none answers; whoever runs this machine can allow that by naming them in "
            f"{Setting.JUDGED_BENCHMARKS}"
        )
    every = set().union(*folders.values())
    outside = sorted(folder for folder in every if not folder.is_relative_to(theirs))
    digests = {str(folder): folder_digest(folder) for folder in outside}
    return BenchmarkSelection(tasks, found.version, digests, len(outside) < len(every))


def _installed() -> Distribution | None:
    context = DistributionFinder.Context(name="lmms-eval", path=[str(PACKAGES), *sys.path])
    return next(iter(MetadataPathFinder.find_distributions(context)), None)


def _own_folders() -> list[Path]:
    folders = [Path(entry).expanduser().resolve() for entry in Setting.BENCHMARK_TASKS.entries]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{Setting.BENCHMARK_TASKS}: expected folders, found {folder}")
    return folders


def _meant(name: str) -> list[str]:
    if name.casefold() == SET:
        return list(PAPER.values())
    known = {said.casefold(): task for said, task in PAPER.items()}
    return [known.get(name.casefold(), name)]


def _indexed(roots: list[Path]) -> dict[str, _Entry]:
    """Tasks, groups and tags by name. As in lmms-eval, what comes first wins."""
    index: dict[str, _Entry] = {}
    for root in roots:
        here: dict[str, _Entry] = {}
        for file in sorted(root.rglob("*.yaml")):
            _enter(here, file)
        index = here | index
    return index


def _enter(index: dict[str, _Entry], file: Path) -> None:
    try:
        config, folders = _read(file)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):  # one that lmms-eval could not use either
        return
    task = config.get("task")
    if isinstance(task, list) and isinstance(config.get("group"), str):
        members = [m if isinstance(m, str) else str(m.get("task", m.get("group", ""))) for m in task]
        index[config["group"]] = _Entry(folders, members)
    elif isinstance(task, str):
        index[task] = _Entry(folders)
        for key in ("tag", "group"):
            tags = config.get(key) or []
            for tag in [tags] if isinstance(tags, str) else tags:
                index.setdefault(tag, _Entry()).members.append(task)


def _read(file: Path) -> tuple[dict, set[Path]]:
    """What a file says on top of the files that it includes, and the folders of all of them."""
    loader = _Loader(file.read_bytes())
    try:
        config, folders = dict(loader.get_single_data()), {file.parent}
    finally:
        loader.dispose()
    included = config.pop("include", [])
    for name in [included] if isinstance(included, str) else included:
        base, theirs = _read((file.parent / name).resolve())
        config, folders = base | config, folders | theirs
    return config, folders


def _folders(index: dict[str, _Entry], name: str) -> set[Path]:
    """Where the files of a task lie, and those of all that it consists of."""
    todo, seen, folders = [name], set(), set()
    while todo:
        if (name := todo.pop()) not in seen and name in index:
            folders |= index[name].folders
            todo += index[name].members
        seen.add(name)
    return folders


def _asks(folders: set[Path], theirs: Path) -> bool:
    """Whether code beside the tasks, or code of lmms-eval's tasks that it takes over, speaks of a judge's API."""
    todo, seen = [file for folder in folders for file in folder.glob("*.py")], set()
    while todo:
        if (file := todo.pop()) in seen:
            continue
        seen.add(file)
        code = file.read_text(errors="replace")
        if ASKS.search(code):
            return True
        for used in USES.findall(code):
            place = theirs.joinpath(*used.split("."))
            todo += place.glob("*.py") if place.is_dir() else [f for f in [place.with_suffix(".py")] if f.is_file()]
    return False
