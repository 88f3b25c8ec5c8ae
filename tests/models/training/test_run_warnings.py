"""Warnings of a run that goes wrong: on tiny models that are driven to it, and limit by limit."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from masters.common.hashing import digest
from masters.config import Train
from masters.models.packing.prefix_tree import Sizes
from masters.models.training import history, run_warnings, trainer
from masters.models.training.groups import Step
from masters.models.training.history import HistoryWriter
from masters.models.training.round_part import Part
from masters.models.training.run_warnings import LIMITS, RunWarnings
from masters.store import artifacts
from masters.store.artifacts import Identity
from masters.store.storage import Storage
from tests.models.tiny_jobs import make_job

STEPS = 100
HEALTHY = {
    "log_pi_right_teacher": -2.0, "log_pi_right_student": -1.0, "rare_negatives_gradient": 0.1, "entropy": 2.0,
    "greedy_end": 0.9,
}  # fmt: skip
WRONG = {
    "log_pi_right_teacher": -2.6, "log_pi_right_student": -1.6, "rare_negatives_gradient": 0.6, "entropy": 0.19,
    "greedy_end": 0.4,
}  # fmt: skip


def run(folder: Path, **train: Any) -> list[dict]:
    """Warnings of a run of 100 steps on the tiny models."""
    told: list[dict] = []
    base = make_job("qwen3_vl")
    job = replace(
        base, student=copy.deepcopy(base.student), reference=base.student, train=Train.model_validate(train),
        steps=[Step(0, 0, tuple(range(8)))] * STEPS, storage=Storage(str(folder)), checkpoints="c",
        checkpoint_steps=1000, report=lambda **line: told.append(line), ledger=HistoryWriter(), tally=Sizes(),
    )  # fmt: skip
    trainer.fit(job)
    return [line for line in told if line["event"] == "warning"]


def test_a_run_that_collapses_says_so_within_its_first_tenth(tmp_path: Path) -> None:
    said = run(tmp_path, learning_rate=0.05, negatives="full", beta=0.0)
    assert said and said[0]["step"] == STEPS // 10
    assert len({line["name"] for line in said}) == len(said)  # each once


def test_a_healthy_run_says_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, learning_rate=1e-4) == []


def watched(
    steps: int, rows: list[dict], done: int = 0, storage: Any = None, histories: Sequence[str] = ()
) -> list[dict]:
    """Warnings on steps with these means; the first `done` of them are in the history of a run that goes on, or in
    artifacts of the round's parts before."""
    told: list[dict] = []
    job = SimpleNamespace(
        round_steps=steps, report=lambda **line: told.append(line), storage=storage, checkpoints="c",
        part=Part(histories=histories),
    )  # fmt: skip
    warnings = RunWarnings(cast(Any, job), done)
    for number, row in enumerate(rows[done:], done + 1):
        warnings.look(number, row)
    return told


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.column)
def test_each_limit_is_said_once_at_the_end_of_the_tenth(limit: run_warnings.Limit) -> None:
    wrong = HEALTHY | {limit.column: WRONG[limit.column]}
    said = watched(100, [HEALTHY] * 13 + [wrong] * 50)
    assert [(line["step"], line["name"]) for line in said] == [(20, limit.column)]
    assert limit.says in said[0]["text"] and f"{WRONG[limit.column]:.3g} now" in said[0]["text"]


def test_a_step_that_lacks_a_mean_does_not_count() -> None:
    assert watched(100, [{}, {"entropy": None}, HEALTHY, *[{}] * 97]) == []  # type: ignore[list-item]
    said = watched(40, [HEALTHY, *[{}] * 10, WRONG])
    assert {line["name"] for line in said} == HEALTHY.keys()


def test_a_limit_without_regard_to_the_first_steps_holds_where_these_lack_the_mean() -> None:
    said = watched(200, [{}] * 20 + [{"rare_negatives_gradient": 0.9, "entropy": 0.0}] * 20)
    assert [line["name"] for line in said] == ["rare_negatives_gradient"]
    assert "(not known in the first steps, 0.9 now)" in said[0]["text"]


def test_a_short_run_is_not_judged_by_single_steps() -> None:
    assert watched(9, [HEALTHY, *[WRONG] * 8]) == []
    assert {line["step"] for line in watched(12, [HEALTHY] * 5 + [WRONG] * 7)} == {10}


def test_a_run_that_goes_on_compares_with_the_steps_before(tmp_path: Path) -> None:
    storage, ledger = Storage(str(tmp_path)), HistoryWriter()
    rows = [HEALTHY] * 13 + [WRONG | {"entropy": 2.0}] * 10 + [WRONG] * 17
    for number, row in enumerate(rows[:25], 1):
        ledger.begin(number, 0, 0, 0.2)
        ledger.end(8, row)
        if number in (7, 25):
            ledger.write(storage, "c", 0)
    assert watched(100, rows, 25, storage) == watched(100, rows) != []


def test_a_part_of_a_round_compares_with_the_parts_before_and_says_what_they_did_not(tmp_path: Path) -> None:
    storage, ledger, folders = Storage(str(tmp_path)), HistoryWriter(), []
    rows = [HEALTHY] * 13 + [WRONG | {"entropy": 2.0}] * 12 + [WRONG] * 15
    for number, row in enumerate(rows[:25], 1):
        ledger.begin(number, 0, 0, 0.2)
        ledger.end(8, row)
        if number in (8, 25):
            ledger.write(storage, f"part-{number}", 0)
            made_of = Identity("train", number, {}, {})
            content = next(history.files(storage, f"part-{number}", "history"))
            storage.write(f"{made_of.folder}/history/0.parquet", content)
            folders.append(artifacts.commit(storage, made_of, {"history/0.parquet": digest(content)}, {}).folder)
    said = watched(100, rows)
    assert {line["name"] for line in said} > {"entropy"}
    assert watched(100, rows, 25, storage, folders) == [line for line in said if line["step"] > 25] != []
