"""Faults put into the code under test, by replacing a piece of a function's own source."""

import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType

import pytest

from masters.models import (
    first_difference,
    fitting,
    losses,
    masking,
    objective,
    packing,
    schedule,
    trainer,
    trees,
)
from masters.rewards import advantages, distillation

MODULES = (
    first_difference, fitting, losses, masking, objective, packing, schedule, trainer, trees, advantages, distillation,
)  # fmt: skip
Edit = tuple[ModuleType, str, str, str]  # module, function, piece of its source, what takes its place


def mutate(monkeypatch: pytest.MonkeyPatch, edits: list[Edit]) -> None:
    """Put the mutated functions in place of the real ones, in every module that holds them."""
    sources: dict[Callable, str] = {}  # of functions mutated already: a second edit adds to the first
    for module, name, piece, other in edits:
        original = getattr(module, name)
        source = sources.get(original) or textwrap.dedent(inspect.getsource(original))
        assert source.count(piece) == 1, f"{name} no longer holds {piece!r}: bring the mutation up to date"
        scope: dict[str, Callable] = {}
        exec(compile(source.replace(piece, other), f"<mutated {name}>", "exec"), vars(module), scope)
        sources[scope[name]] = source.replace(piece, other)
        for home in MODULES:
            if vars(home).get(name) is original:
                monkeypatch.setattr(home, name, scope[name])
