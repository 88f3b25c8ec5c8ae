"""Every module of the package imports, engines and trainers included."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import masters

ROOT = Path(__file__).parents[1]


def test_every_module_imports() -> None:
    found = [module.name for module in pkgutil.walk_packages(masters.__path__, "masters.")]
    assert {
        "masters.models.generation.worker",
        "masters.flows.distill",
        "masters.tasks.train",
        "masters.infra.prefect_server",
    } <= set(found)
    for name in found:
        importlib.import_module(name)


def test_modules_that_are_named_in_strings_exist() -> None:
    """Workers are started by name; tags of MLflow, such as "masters.stage", have one dot."""
    found = {module.name for module in pkgutil.walk_packages(masters.__path__, "masters.")}
    named = {
        node.value
        for folder in ("flows", "tasks", "models", "rewards", "infra", "src/masters")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and re.fullmatch(r"masters(\.\w+){2,}", str(node.value))
    }
    assert len(named) > 10
    assert {name for name in named if not {name, name.rpartition(".")[0]} & found} == set()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("masters.models.masking", "magnitude_thresholds"),
        ("masters.models.schedule", "mask_ratio"),
        ("masters.models.losses", "jensen_shannon"),
        ("masters.rewards", "distillation_rewards"),
        ("masters.rewards", "group_advantages"),
    ],
)
def test_names_that_scripts_import_stay_where_they_are(module: str, name: str) -> None:
    assert callable(getattr(importlib.import_module(module), name))


# each takes seconds that a command which refuses its input would spend
HEAVY = {"torch.distributed.tensor", "transformers", "vllm", "ray", "mlflow", "prefect", "datasets"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("masters.cli.main", HEAVY | {"torch", "pyarrow"}),
        ("masters.checks.preflight", HEAVY),
        ("masters.flows.distill", {"vllm", "ray", "transformers", "torch.distributed.tensor"}),
    ],
)
def test_imports_that_a_process_may_do_without_are_made_where_they_are_used(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({heavy!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_functions_stay_short() -> None:
    long = [
        f"{file}:{node.lineno} {node.name}"
        for folder in ("flows", "tasks", "models", "rewards", "infra", "demo", "benchmarks", "examples", "src/masters")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50
    ]
    assert long == []
