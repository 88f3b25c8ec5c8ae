"""Mutations: faults put into the code under test by replacing a part of a function's source."""

import __future__

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
Edit = tuple[ModuleType, str, str, str]  # module, function, part of its source, replacement


def mutate(monkeypatch: pytest.MonkeyPatch, edits: list[Edit]) -> None:
    """Replace functions by mutated ones in every module that imports them."""
    sources: dict[Callable, str] = {}  # of mutated functions, so that a second edit adds to the first
    for module, name, part, replacement in edits:
        original = getattr(module, name)
        source = sources.get(original) or textwrap.dedent(inspect.getsource(original))
        assert source.count(part) == 1, f"{name} no longer contains {part!r}: update the mutation"
        scope: dict[str, Callable] = {}
        # annotations stay text, as in modules that import torch only for type checkers
        flags = __future__.annotations.compiler_flag
        exec(compile(source.replace(part, replacement), f"<mutated {name}>", "exec", flags), vars(module), scope)
        sources[scope[name]] = source.replace(part, replacement)
        for user in MODULES:
            if vars(user).get(name) is original:
                monkeypatch.setattr(user, name, scope[name])
