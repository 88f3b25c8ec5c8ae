"""Warnings of a run that collapses: on tiny models, and for each limit with made-up means."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from masters.common.hashing import digest
from masters.models.packing.prefix_tree import TokenCounts
from masters.models.training import history, run_warnings, trainer
from masters.models.training.groups import Step
from masters.models.training.history import HistoryWriter
from masters.models.training.job import RoundPart
from masters.models.training.run_warnings import LIMITS, RunWarnings
from masters.store import artifacts
from masters.store.artifacts import Identity
from masters.store.storage import Storage
from tests.models.paper import paper_train
from tests.models.tiny_contexts import make_context

STEPS = 100
HEALTHY = {
    "log_pi_right_teacher": -2.0,
    "log_pi_right_student": -1.0,
    "rare_negatives_gradient": 0.1,
    "entropy": 2.0,
    "greedy_end": 0.9,
}
WRONG = {
    "log_pi_right_teacher": -2.6,
    "log_pi_right_student": -1.6,
    "rare_negatives_gradient": 0.6,
    "entropy": 0.19,
    "greedy_end": 0.4,
}


def train_and_collect(folder: Path, **train: Any) -> list[Any]:
    """Return the warnings of a run of 100 steps on the tiny models."""
    events: list[Any] = []
    base = make_context("qwen3_vl")
    context = replace(
        base,
        student=copy.deepcopy(base.student),
        reference=base.student,
        train=paper_train(**train),
        steps=[Step(0, 0, tuple(range(8)))] * STEPS,
        storage=Storage(str(folder)),
        checkpoints="c",
        checkpoint_steps=1000,
        report=events.append,
        history=HistoryWriter(),
        token_counts=TokenCounts(),
    )
    trainer.fit(context)
    return [event for event in events if event.event == "warning"]


def test_a_collapsing_run_warns_at_the_end_of_its_first_tenth(tmp_path: Path) -> None:
    found = train_and_collect(tmp_path, learning_rate=0.05, negatives="full", beta=0.0)
    assert found and found[0].step == STEPS // 10
    assert len({event.name for event in found}) == len(found)  # each once


def test_a_healthy_run_has_no_warnings(tmp_path: Path) -> None:
    assert train_and_collect(tmp_path, learning_rate=1e-4) == []


def warnings_for(
    steps: int, rows: list[dict], done: int = 0, storage: Any = None, histories: Sequence[str] = ()
) -> list[Any]:
    """Return the warnings for steps with these means.

    The first `done` steps are read from the history of a resumed run, or from artifacts of the round's earlier parts.
    """
    events: list[Any] = []
    context = SimpleNamespace(
        round_steps=steps,
        report=events.append,
        storage=storage,
        checkpoints="c",
        part=RoundPart(earlier_parts=histories),
    )
    warnings = RunWarnings(cast(Any, context), done)
    for number, row in enumerate(rows[done:], done + 1):
        warnings.add_step(number, row)
    return events


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.column)
def test_each_limit_is_reported_once_at_the_end_of_a_tenth(limit: run_warnings.Limit) -> None:
    wrong = HEALTHY | {limit.column: WRONG[limit.column]}
    found = warnings_for(100, [HEALTHY] * 13 + [wrong] * 50)
    assert [(event.step, event.name) for event in found] == [(20, limit.column)]
    assert limit.message in found[0].text and f"{WRONG[limit.column]:.3g} now" in found[0].text


def test_a_step_without_the_mean_does_not_count() -> None:
    assert warnings_for(100, [{}, {"entropy": None}, HEALTHY, *[{}] * 97]) == []  # type: ignore[list-item]
    found = warnings_for(40, [HEALTHY, *[{}] * 10, WRONG])
    assert {event.name for event in found} == HEALTHY.keys()


def test_a_limit_on_the_latest_steps_needs_no_mean_of_the_first() -> None:
    found = warnings_for(200, [{}] * 20 + [{"rare_negatives_gradient": 0.9, "entropy": 0.0}] * 20)
    assert [event.name for event in found] == ["rare_negatives_gradient"]
    assert "(not known in the first steps, 0.9 now)" in found[0].text


def test_a_short_run_is_not_judged_by_single_steps() -> None:
    assert warnings_for(9, [HEALTHY, *[WRONG] * 8]) == []
    assert {event.step for event in warnings_for(12, [HEALTHY] * 5 + [WRONG] * 7)} == {10}


def test_a_resumed_run_compares_with_its_earlier_steps(tmp_path: Path) -> None:
    storage, writer = Storage(str(tmp_path)), HistoryWriter()
    rows = [HEALTHY] * 13 + [WRONG | {"entropy": 2.0}] * 10 + [WRONG] * 17
    for number, row in enumerate(rows[:25], 1):
        writer.begin_step(number, 0, 0, 0.2)
        writer.end_step(8, row)
        if number in (7, 25):
            writer.write(storage, "c", 0)
    assert warnings_for(100, rows, 25, storage) == warnings_for(100, rows) != []


def test_a_part_of_a_round_compares_with_earlier_parts_and_reports_only_new_warnings(tmp_path: Path) -> None:
    storage, writer, folders = Storage(str(tmp_path)), HistoryWriter(), []
    rows = [HEALTHY] * 13 + [WRONG | {"entropy": 2.0}] * 12 + [WRONG] * 15
    for number, row in enumerate(rows[:25], 1):
        writer.begin_step(number, 0, 0, 0.2)
        writer.end_step(8, row)
        if number in (8, 25):
            writer.write(storage, f"part-{number}", 0)
            made_of = Identity("train", number, {}, {})
            content = next(history.files(storage, f"part-{number}", "history"))
            storage.write(f"{made_of.folder}/history/0.parquet", content)
            folders.append(artifacts.commit(storage, made_of, {"history/0.parquet": digest(content)}, {}).folder)
    found = warnings_for(100, rows)
    assert {event.name for event in found} > {"entropy"}
    assert warnings_for(100, rows, 25, storage, folders) == [event for event in found if event.step > 25] != []
