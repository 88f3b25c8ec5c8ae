"""Names of benchmarks are understood, or refused, before lmms-eval is asked: a small one stands in for it here."""

from pathlib import Path

import pytest

from masters.common.errors import InputError
from masters.evaluation import benchmark_selection
from masters.evaluation.benchmark_selection import PAPER, select_benchmarks

JUDGE = "from lmms_eval.llm_judge import get_server\n"


def write(folder: Path, name: str, text: str, code: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text)
    (folder / "utils.py").write_text(code)


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tasks of an installed lmms-eval 9.9: the paper's (one is a group of two, one asks a judge) and two more."""
    packages = tmp_path / "packages"
    (packages / "lmms_eval-9.9.dist-info").mkdir(parents=True)
    (packages / "lmms_eval-9.9.dist-info" / "METADATA").write_text("Name: lmms-eval\nVersion: 9.9\n")
    tasks = packages / "lmms_eval/tasks"
    for task in PAPER.values():
        text = f"task: {task}\ntag: usual\ndoc_to_visual: !function utils.image\n"
        write(tasks / task, task, text, JUDGE if task == "mmvet" else "")
    write(tasks / "mmmu_pro", "mmmu_pro", "group: mmmu_pro\ntask:\n- a_part\n- task: other_part\n")
    write(tasks / "parts", "a_part", "task: a_part\n")
    write(tasks / "other", "other_part", "task: other_part\n", "from lmms_eval.tasks.shared.utils import judge\n")
    write(tasks / "shared", "broken", "task: [\n")
    monkeypatch.setattr(benchmark_selection, "PACKAGES", packages)
    return tasks


def test_the_papers_set_is_its_13(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTERS_JUDGED_BENCHMARKS", "mmvet, another")
    asked = select_benchmarks(["Paper"])
    assert asked == select_benchmarks(list(PAPER)) == select_benchmarks(["paper", "ai2d", "MMSTAR"])
    assert asked.tasks == tuple(PAPER.values()) and len(asked.tasks) == 13
    assert (asked.version, asked.own, asked.theirs) == ("9.9", {}, True)


@pytest.mark.parametrize("name", ["a_part", "usual", "mmmu_pro"])
def test_tasks_tags_and_groups_of_lmms_eval_are_known(
    theirs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:  # fmt: skip
    monkeypatch.setenv("MASTERS_JUDGED_BENCHMARKS", "usual")
    assert select_benchmarks([name, "MMStar", name]).tasks == (name, "mmstar")


def test_what_a_task_includes_is_its_own(theirs: Path) -> None:
    """Its name too, and the code beside what it includes."""
    write(theirs / "base", "base", "task: included\ntag: of_base\n", JUDGE)
    (theirs / "heir").mkdir()
    (theirs / "heir" / "heir.yaml").write_text("include: ../base/base.yaml\ntask: heir\n")
    for name in ("heir", "of_base"):
        with pytest.raises(InputError, match=f"scoring {name} sends"):
            select_benchmarks([name])


def test_an_unknown_name_is_refused_with_what_is_near(theirs: Path) -> None:
    with pytest.raises(InputError, match=r"lmms-eval 9\.9 has no task 'mmstarr' \(near it: mmstar.*'paper'"):
        select_benchmarks(["MMStar", "mmstarr"])


def test_what_is_not_installed_is_said(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_selection, "PACKAGES", tmp_path / "none")
    with pytest.raises(InputError, match="make setup-benchmarks"):
        select_benchmarks(["paper"])


def test_what_asks_a_judge_is_refused_unless_it_is_allowed(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Itself, as one of a tag, and through code that it takes over from another task."""
    with pytest.raises(InputError, match="scoring mmvet, usual sends questions.*MASTERS_JUDGED_BENCHMARKS"):
        select_benchmarks(["AI2D", "mmvet", "usual"])
    assert select_benchmarks(["mmmu_pro"]).tasks == ("mmmu_pro",)
    (theirs / "shared" / "utils.py").write_text("import os\nkey = os.environ['OPENAI_API_KEY']\n")
    with pytest.raises(InputError, match="scoring mmmu_pro sends"):
        select_benchmarks(["mmmu_pro"])
    monkeypatch.setenv("MASTERS_JUDGED_BENCHMARKS", "mmmu_pro")
    assert select_benchmarks(["mmmu_pro"]).tasks == ("mmmu_pro",)


def test_ones_own_tasks_are_known_by_their_content(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    own = tmp_path / "own"
    write(own / "mine", "mine", "task: mine\n")
    with pytest.raises(InputError, match="no task 'mine'"):
        select_benchmarks(["mine"])
    monkeypatch.setenv("MASTERS_BENCHMARK_TASKS", str(own))
    before = select_benchmarks(["mine"])
    assert list(before.own) == [str(own / "mine")] and not before.theirs
    assert select_benchmarks(["mine", "ai2d"]).theirs
    (own / "mine" / "data.parquet").write_bytes(b"rows")
    assert select_benchmarks(["mine"]).own != before.own
    monkeypatch.setenv("MASTERS_BENCHMARK_TASKS", str(tmp_path / "none"))
    with pytest.raises(InputError, match="expected folders"):
        select_benchmarks(["mine"])
