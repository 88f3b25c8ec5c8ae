"""Selection of lmms-eval's tasks by name. Wrong names are refused before work starts.

lmms-eval lies in a folder that only its own processes see (docs/benchmarks.md), so its index is read by such a process.
"""

import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import DistributionFinder, MetadataPathFinder
from pathlib import Path

from masters.common.errors import InputError
from masters.common.hashing import folder_digest
from masters.config.allowlist import Setting
from masters.evaluation import benchmark_index
from masters.evaluation.benchmark_index import BenchmarkIndex

PAPER_SET = "paper"
PAPER = {  # the 13 benchmarks of arXiv 2512.22238 and lmms-eval's names of their usual splits
    "AI2D": "ai2d",
    "ChartQA": "chartqa",
    "MathVista": "mathvista_testmini",
    "MMB": "mmbench_en_dev",
    "MMB-CN": "mmbench_cn_dev",
    "MM-Vet": "mmvet",
    "MMMU": "mmmu_val",
    "MMMU-Pro": "mmmu_pro",
    "MMStar": "mmstar",
    "BLINK": "blink",
    "SEED": "seedbench",
    "SEED2+": "seedbench_2_plus",
    "RealWorldQA": "realworldqa",
}
# in the code of a task that asks a judge
JUDGE_CODE = re.compile(r"llm_judge|API_KEY|requests\.post|openai", re.IGNORECASE)
USED_MODULE = re.compile(r"lmms_eval\.tasks\.([\w.]+)")  # modules of other tasks that a task's code imports
# tasks that match JUDGE_CODE but ask no judge: in 0.7.3 the verifier in mmmu_val's code serves mmmu_val_reasoning only
NOT_JUDGED = {"mmmu_val"}


@dataclass(frozen=True)
class BenchmarkSelection:
    """Tasks to run, each once and in order.

    version: lmms-eval's version.
    task_folders: digests by folder, of the folders from outside of lmms-eval that define selected tasks.
    include_defaults: whether tasks of lmms-eval itself are selected too; to index all of these takes it 20 s.
    """

    tasks: tuple[str, ...]
    version: str
    task_folders: dict[str, str]
    include_defaults: bool = True


def select_benchmarks(names: list[str]) -> BenchmarkSelection:
    """Select tasks by name: "paper", one of `PAPER` in any case, or lmms-eval's name of a task, group or tag.

    Raises InputError if lmms-eval is not installed or does not know a name, or if scoring sends answers to a judge's
    API and this machine's owner has not named the task in MASTERS_JUDGED_BENCHMARKS.
    """
    version = _installed_version()
    if version is None:
        raise InputError("benchmarks: expected lmms-eval, found none; run `make setup-benchmarks`")
    tasks = tuple(dict.fromkeys(task for name in names for task in _expand(name)))
    index = benchmark_index.read_index(tasks, _custom_task_folders())
    _check_known(tasks, index, version)
    _check_judged(tasks, index)
    folders = {Path(folder) for task in tasks for folder in index.folders[task]}
    custom = sorted(folder for folder in folders if not folder.is_relative_to(index.builtin_folder))
    digests = {str(folder): folder_digest(folder) for folder in custom}
    return BenchmarkSelection(tasks, version, digests, len(custom) < len(folders))


def _installed_version() -> str | None:
    context = DistributionFinder.Context(name="lmms-eval", path=[str(benchmark_index.PACKAGES), *sys.path])
    return next((found.version for found in MetadataPathFinder.find_distributions(context)), None)


def _custom_task_folders() -> tuple[Path, ...]:
    folders = tuple(Path(entry).expanduser().resolve() for entry in Setting.BENCHMARK_TASKS.entries)
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{Setting.BENCHMARK_TASKS}: expected folders, found {folder}")
    return folders


def _expand(name: str) -> list[str]:
    if name.casefold() == PAPER_SET:
        return list(PAPER.values())
    by_name = {benchmark.casefold(): task for benchmark, task in PAPER.items()}
    return [by_name.get(name.casefold(), name)]


def _check_known(tasks: Iterable[str], index: BenchmarkIndex, version: str) -> None:
    unknown = [task for task in tasks if task not in index.folders]
    if unknown:
        similar = difflib.get_close_matches(unknown[0], [*PAPER, *index.names], 3)
        raise InputError(
            f"benchmarks: lmms-eval {version} has no task {unknown[0]!r:.200}"
            f"{' (similar: ' + ', '.join(similar) + ')' if similar else ''}; expected {PAPER_SET!r}, one of "
            f"{', '.join(PAPER)}, or the name of a task of lmms-eval or in the folders of {Setting.BENCHMARK_TASKS}"
        )


def _check_judged(tasks: Iterable[str], index: BenchmarkIndex) -> None:
    allowed = {*NOT_JUDGED, *Setting.JUDGED_BENCHMARKS.entries}
    builtin = Path(index.builtin_folder)
    judged = [task for task in tasks if task not in allowed and _asks_judge(index.folders[task], builtin)]
    if judged:
        raise InputError(
            f"benchmarks: scoring {', '.join(judged)} sends questions and answers to a judge's API (OPENAI_API_URL), "
            f"and scores 0 or at random if none answers; the owner of this machine can allow that by naming them in "
            f"{Setting.JUDGED_BENCHMARKS}"
        )


def _asks_judge(folders: Iterable[str], builtin: Path) -> bool:
    """Return whether code beside a task, or code of lmms-eval's tasks that it imports, mentions a judge's API."""
    pending, seen = [file for folder in folders for file in Path(folder).glob("*.py")], set()
    while pending:
        if (file := pending.pop()) in seen:
            continue
        seen.add(file)
        code = file.read_text(errors="replace")
        if JUDGE_CODE.search(code):
            return True
        for module in USED_MODULE.findall(code):
            path = builtin.joinpath(*module.split("."))
            pending += path.glob("*.py") if path.is_dir() else [f for f in [path.with_suffix(".py")] if f.is_file()]
    return False
