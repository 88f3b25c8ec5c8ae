"""Faults put into the code under test, by replacing a piece of a function's own source."""

import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType

import pytest

from masters.config import mask_schedule
from masters.models import masking
from masters.models.losses import formulas
from masters.models.packing import packed_batch, prefix_tree
from masters.models.training import first_difference, objective, oom_retry, trainer
from masters.rewards import advantages, distillation

MODULES = (
    first_difference,
    oom_retry,
    formulas,
    masking,
    objective,
    packed_batch,
    mask_schedule,
    trainer,
    prefix_tree,
    advantages,
    distillation,
)
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
