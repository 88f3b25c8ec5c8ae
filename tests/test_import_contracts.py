"""The import contracts of pyproject.toml hold, and each fails where an import breaks it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command(sys.argv[1:])"
# by contract: a module, and an import in it that the contract forbids
BROKEN = {
    "packages import downward only": ("common/errors.py", "import masters.flows.webhook"),
    "inside models": ("models/masking.py", "import masters.models.training.trainer"),
    "torch stays in models, checks and the reward formulas": ("store/artifacts.py", "import torch"),
    "vllm": ("models/training/trainer.py", "import vllm"),
    "ray": ("tasks/score.py", "import ray"),
    "mlflow": ("flows/distill.py", "import mlflow"),
    "prefect": ("reporting/plots.py", "import prefect"),
    "typer": ("tasks/mask.py", "import typer"),
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Lint the package below `folder`, which PYTHONPATH puts before the installed one."""
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache", "--no-logo"],
        env={"PYTHONPATH": ":".join([str(folder), *filter(None, sys.path)])}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def verdicts(printed: str) -> dict[str, str]:
    """Return KEPT or BROKEN by contract; long names are wrapped."""
    words = " ".join(printed.split())
    return {name: next(word for word in words.split(f"{name} ", 1)[1].split()) for name in BROKEN}


def test_the_contracts_hold() -> None:
    done = lint(ROOT / "src")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(verdicts(done.stdout).values()) == {"KEPT"} and "0 broken" in done.stdout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, its links as folders."""
    shutil.copytree(ROOT / "src/masters", tmp_path / "masters", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("contract", BROKEN)
def test_an_import_that_a_contract_forbids_breaks_it_alone(package: Path, contract: str) -> None:
    name, line = BROKEN[contract]
    with open(package / "masters" / name, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = lint(package)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [found for found, verdict in verdicts(done.stdout).items() if verdict == "BROKEN"] == [contract]


def test_a_package_that_no_contract_names_is_refused(package: Path) -> None:
    (package / "masters/helpers").mkdir()
    (package / "masters/helpers/__init__.py").touch()
    done = lint(package)
    assert done.returncode == 1 and "helpers" in done.stdout
