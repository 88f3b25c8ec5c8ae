"""Every module of the package imports, engines and trainers included."""

import importlib
import pkgutil

import masters


def test_every_module_imports() -> None:
    found = [module.name for module in pkgutil.walk_packages(masters.__path__, "masters.")]
    assert {
        "masters.models.engine_worker",
        "masters.flows.distill",
        "masters.tasks.train",
        "masters.infra.prefect_server",
    } <= set(found)
    for name in found:
        importlib.import_module(name)


def test_functions_stay_short() -> None:
    import ast
    from pathlib import Path

    root = Path(__file__).parents[1]
    long = [
        f"{file}:{node.lineno} {node.name}"
        for folder in ("flows", "tasks", "models", "rewards", "infra", "demo", "benchmarks", "src/masters")
        for file in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50
    ]
    assert long == []
