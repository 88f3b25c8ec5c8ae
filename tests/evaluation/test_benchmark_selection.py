"""Benchmarks are selected by name or refused. A small index stands in for lmms-eval's unless it is installed."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from masters.common.errors import InputError
from masters.evaluation import benchmark_index
from masters.evaluation.benchmark_index import BenchmarkIndex
from masters.evaluation.benchmark_selection import PAPER, select_benchmarks

JUDGE_CODE = "from lmms_eval.llm_judge import get_server\n"
needs_lmms_eval = pytest.mark.skipif(
    not (benchmark_index.PACKAGES / "lmms_eval").is_dir(), reason="lmms-eval is not installed: make setup-benchmarks"
)


def write_task(folder: Path, name: str, text: str, code: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text)
    (folder / "utils.py").write_text(code)


@pytest.fixture
def builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tasks folder of an installed lmms-eval 9.9: a folder per task, of which mmvet's code asks a judge.

    Custom tasks are known by their files' names. `mmmu_pro` is a group whose second member takes over code from the
    folder `shared`; `usual` is a tag of two tasks.
    """
    packages = tmp_path / "packages"
    (packages / "lmms_eval-9.9.dist-info").mkdir(parents=True)
    (packages / "lmms_eval-9.9.dist-info" / "METADATA").write_text("Name: lmms-eval\nVersion: 9.9\n")
    tasks = packages / "lmms_eval/tasks"
    for task in PAPER.values():
        write_task(tasks / task, task, f"task: {task}\n", JUDGE_CODE if task == "mmvet" else "")
    write_task(tasks / "parts", "part", "task: part\n", "from lmms_eval.tasks.shared.utils import judge\n")
    (tasks / "shared").mkdir()
    groups = {"mmmu_pro": ["mmmu_pro", "parts"], "usual": ["ai2d", "mmvet"]}

    def read_index(names: Sequence[str], task_folders: Sequence[Path]) -> BenchmarkIndex:
        known = {task: [str(tasks / task)] for task in PAPER.values()}
        known |= {name: [str(tasks / folder) for folder in folders] for name, folders in groups.items()}
        for folder in task_folders:
            known |= {file.stem: [str(file.parent)] for file in folder.rglob("*.yaml")}
        return BenchmarkIndex(sorted(known), {name: known[name] for name in names if name in known}, str(tasks))

    monkeypatch.setattr(benchmark_index, "PACKAGES", packages)
    monkeypatch.setattr(benchmark_index, "read_index", read_index)
    return tasks


def test_the_papers_set_is_its_13(builtin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTERS_JUDGED_BENCHMARKS", "mmvet, another")
    selection = select_benchmarks(["Paper"])
    assert selection == select_benchmarks(list(PAPER)) == select_benchmarks(["paper", "ai2d", "MMSTAR"])
    assert selection.tasks == tuple(PAPER.values()) and len(selection.tasks) == 13
    assert (selection.version, selection.task_folders, selection.include_defaults) == ("9.9", {}, True)


def test_a_name_is_selected_once_and_in_order(builtin: Path) -> None:
    assert select_benchmarks(["mmmu_pro", "MMStar", "mmmu_pro"]).tasks == ("mmmu_pro", "mmstar")


def test_an_unknown_name_is_refused_with_similar_names(builtin: Path) -> None:
    with pytest.raises(InputError, match=r"lmms-eval 9\.9 has no task 'mmstarr' \(similar: mmstar.*'paper'"):
        select_benchmarks(["MMStar", "mmstarr"])


def test_a_missing_lmms_eval_is_reported(builtin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_index, "PACKAGES", tmp_path / "none")
    with pytest.raises(InputError, match="make setup-benchmarks"):
        select_benchmarks(["paper"])


def test_a_judged_task_is_refused_unless_it_is_allowed(builtin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task itself, a tag with such a task, and a group whose code imports another task's."""
    with pytest.raises(InputError, match="scoring mmvet, usual sends questions.*MASTERS_JUDGED_BENCHMARKS"):
        select_benchmarks(["AI2D", "mmvet", "usual"])
    assert select_benchmarks(["mmmu_pro"]).tasks == ("mmmu_pro",)
    (builtin / "shared" / "utils.py").write_text("import os\nkey = os.environ['OPENAI_API_KEY']\n")
    with pytest.raises(InputError, match="scoring mmmu_pro sends"):
        select_benchmarks(["mmmu_pro"])
    monkeypatch.setenv("MASTERS_JUDGED_BENCHMARKS", "mmmu_pro")
    assert select_benchmarks(["mmmu_pro"]).tasks == ("mmmu_pro",)


def test_custom_tasks_are_identified_by_content(builtin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    custom = tmp_path / "custom"
    write_task(custom / "shapes", "shapes", "task: shapes\n")
    with pytest.raises(InputError, match="no task 'shapes'"):
        select_benchmarks(["shapes"])
    monkeypatch.setenv("MASTERS_BENCHMARK_TASKS", str(custom))
    before = select_benchmarks(["shapes"])
    assert list(before.task_folders) == [str(custom / "shapes")] and not before.include_defaults
    assert select_benchmarks(["shapes", "ai2d"]).include_defaults
    (custom / "shapes" / "data.parquet").write_bytes(b"rows")
    assert select_benchmarks(["shapes"]).task_folders != before.task_folders
    monkeypatch.setenv("MASTERS_BENCHMARK_TASKS", str(tmp_path / "none"))
    with pytest.raises(InputError, match="expected folders"):
        select_benchmarks(["shapes"])


@pytest.mark.slow
@needs_lmms_eval
def test_lmms_eval_finds_included_files_and_members(tmp_path: Path) -> None:
    """Cover tasks, a group with a nested one, a tag and lmms-eval's own group."""
    custom = tmp_path.resolve() / "custom"
    write_task(custom / "base", "base", "task: base\ntag: shapes\n")
    write_task(custom / "heir", "heir", "include: ../base/base.yaml\ntask: heir\n")
    write_task(custom / "group", "group", "group: both\ntask:\n- base\n- task: heir\n")
    index = benchmark_index.read_index(("base", "heir", "both", "shapes", "mmmu_pro", "none"), (custom,))
    base, heir, group = (str(custom / name) for name in ("base", "heir", "group"))
    mmmu_pro = str(Path(index.builtin_folder) / "mmmu_pro")
    assert index.folders == {
        "base": [base],
        "heir": [base, heir],
        "both": [base, group, heir],
        "shapes": [base, heir],
        "mmmu_pro": [mmmu_pro],
    }
    assert {*PAPER.values(), "base"} <= set(index.names)


@pytest.mark.slow
@needs_lmms_eval
def test_tasks_that_lmms_eval_cannot_read_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "broken", "broken", "task: [\n")
    with pytest.raises(InputError, match="cannot index its tasks and those in the folders of MASTERS_BENCHMARK_TASKS"):
        benchmark_index.read_index(("broken",), (tmp_path,))


def test_a_command_reads_the_index_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line selects the benchmarks before the flow does, in one process."""
    tasks = tmp_path / "lmms_eval/tasks"
    tasks.mkdir(parents=True)
    (tmp_path / "lmms_eval/__init__.py").touch()
    reads = tmp_path / "reads"
    (tasks / "__init__.py").write_text(
        f"open({str(reads)!r}, 'a').write('x')\n"
        "class TaskManager:\n"
        "    def __init__(self, include_path):\n"
        "        self.task_index = {}\n"
    )
    monkeypatch.setattr(benchmark_index, "PACKAGES", tmp_path)
    for _ in range(2):
        index = benchmark_index.read_index(("mmstar",), ())
        assert (index.names, index.folders, index.builtin_folder) == ([], {}, str(tasks))
    assert reads.read_text() == "x"
