"""The result files, chosen rates, comparisons and report of a study."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.common.errors import InputError, MastersError
from masters.config.study_file import Study
from masters.evaluation.study_results import Cell, Result, ResultStore, encode_correct, make_questions
from masters.evaluation.study_runs import StudyRuns, compare_arms, summarize_arm
from masters.evaluation.study_statistics import difference
from masters.reporting.study_report import write_report
from masters.reporting.study_table import render_study

RATES = [1e-4, 2e-4, 5e-4]
IMAGES = {f"q{n}": f"image {n // 2}" for n in range(24)}
QUESTIONS = make_questions(IMAGES)


def make_study(**changes: object) -> Study:
    values = dict(
        name="s", results="unused", learning_rates=RATES, tuning_seeds=[0, 9], seeds=[1, 2, 3],
        arms={"a": {}, "b": {}, "one": dict(learning_rates=[1e-3], different_steps=True)},
        comparisons=[dict(better="a", than="b"), dict(better="one", than="b")],
    )  # fmt: skip
    return Study.model_validate(values | changes)


def make_result(cell: Cell, accuracy: float = 0.5, steps: int = 7, **changes: object) -> Result:
    right = np.random.default_rng(cell.seed + len(cell.arm)).permutation(24) < round(24 * accuracy)
    values = dict(
        arm=cell.arm, phase=cell.phase, learning_rate=cell.learning_rate, seed=cell.seed, settings="made of",
        steps=steps, accuracy=accuracy, standard_error=0.1, untrained=0.25, questions=QUESTIONS.digest, count=24,
        correct=encode_correct(dict(zip(sorted(IMAGES), right.tolist(), strict=True))), mlflow_run_id="r",
    )  # fmt: skip
    return Result.model_validate(values | changes)


def make_runs(validation: dict[str, list[float]], final: dict[tuple[str, int], float]) -> StudyRuns:
    """Make runs from validation accuracies by rate, and test accuracies by seed at the chosen rate, of each arm."""
    runs = StudyRuns(make_study())
    for arm, accuracies in validation.items():
        for rate, accuracy in zip(RATES, accuracies, strict=False):
            for seed in runs.study.tuning_seeds:
                cell = Cell("tuning", arm, rate, seed)
                runs.results[cell] = make_result(cell, accuracy)
    for (arm, seed), accuracy in final.items():
        cell = Cell("final", arm, runs.chosen_rate(arm) or 0.0, seed)
        runs.results[cell] = make_result(cell, accuracy)
    return runs


@given(st.dictionaries(st.text(max_size=4), st.booleans(), min_size=1, max_size=70))
def test_correct_answers_are_decoded_in_the_order_of_ids(correct: dict[str, bool]) -> None:
    packed = make_result(Cell("final", "a", 1e-4, 1), correct=encode_correct(correct), count=len(correct))
    assert packed.correct_Q.tolist() == [correct[question] for question in sorted(correct)]


@given(st.dictionaries(st.text(max_size=4), st.sampled_from("abcd"), min_size=1, max_size=70))
def test_questions_with_the_same_image_share_a_number(images: dict[str, str]) -> None:
    image_Q, ordered = make_questions(images).image_Q, [images[question] for question in sorted(images)]
    assert [[a == b for b in image_Q] for a in image_Q] == [[a == b for b in ordered] for a in ordered]


def test_the_digest_covers_questions_and_images() -> None:
    others = [IMAGES | {"q0": "other"}, IMAGES | {"q99": "image 1"}]
    assert len({make_questions(images).digest for images in [IMAGES, *others]}) == 3


def test_a_stored_result_is_found_and_one_of_other_settings_refused(tmp_path: Path) -> None:
    results, cell = ResultStore(tmp_path / "new"), Cell("final", "a", 1e-4, 1)
    assert results.find(cell, "made of") is None
    results.save(make_result(cell), QUESTIONS)
    assert results.find(cell, "made of") == make_result(cell)
    assert results.find(Cell("final", "a", 1e-4, 2), "made of") is None
    assert all(file.stat().st_size < 4096 for file in (tmp_path / "new").iterdir())
    with pytest.raises(InputError, match="result of other settings.*expected digest others, found made of"):
        results.find(cell, "others")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"arm": 1'])
def test_an_invalid_result_file_is_refused(content: str, tmp_path: Path) -> None:
    cell = Cell("final", "a", 1e-4, 1)
    (tmp_path / f"{cell.name}.json").write_text(content)
    with pytest.raises(InputError, match="is not a Result of a study"):
        ResultStore(tmp_path).find(cell, "made of")


@pytest.mark.parametrize("damage", [dict(correct="////"), dict(correct="AAAA"), dict(correct="/"), dict(count=25)])
def test_a_result_whose_answers_are_damaged_is_refused(damage: dict, tmp_path: Path) -> None:
    cell, results = Cell("final", "a", 1e-4, 1), ResultStore(tmp_path)
    results.save(make_result(cell), QUESTIONS)
    results.save(make_result(cell, **damage), QUESTIONS)
    with pytest.raises(InputError, match="damaged: move it away"):
        results.find(cell, "made of")


def test_a_result_whose_questions_are_damaged_is_refused(tmp_path: Path) -> None:
    cell, results = Cell("final", "a", 1e-4, 1), ResultStore(tmp_path)
    results.save(make_result(cell), QUESTIONS.model_copy(update=dict(images="AAAA")))
    with pytest.raises(InputError, match="damaged: move it away"):
        results.find(cell, "made of")


def test_a_result_without_its_questions_is_refused(tmp_path: Path) -> None:
    cell = Cell("final", "a", 1e-4, 1)
    ResultStore(tmp_path).save(make_result(cell), QUESTIONS)
    (tmp_path / f"questions-{QUESTIONS.digest}.json").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        ResultStore(tmp_path).find(cell, "made of")


@pytest.mark.parametrize(
    ("accuracies", "rate", "edge"),
    [
        ([0.1, 0.3, 0.2], 2e-4, False),
        ([0.1, 0.2, 0.3], 5e-4, True),
        ([0.3, 0.3, 0.2], 1e-4, True),
        ([0.1, 0.2], 2e-4, False),
    ],
)
def test_the_best_rate_is_chosen_and_the_smallest_of_equals(accuracies: list[float], rate: float, edge: bool) -> None:
    runs = make_runs({"a": accuracies}, {})
    assert (runs.chosen_rate("a"), runs.is_at_edge("a")) == (rate, edge)
    assert runs.chosen_rate("b") is None and runs.chosen_rate("one") == 1e-3 and not runs.is_at_edge("one")


def test_a_rate_that_failed_at_a_seed_is_not_chosen() -> None:
    runs = make_runs({"a": [0.1, 0.9, 0.2]}, {})
    del runs.results[Cell("tuning", "a", 2e-4, 9)]
    assert runs.chosen_rate("a") == 5e-4


def test_test_results_do_not_affect_the_choice() -> None:
    runs = make_runs({"a": [0.1, 0.3, 0.2]}, {})
    for rate in RATES:
        cell = Cell("final", "a", rate, 1)
        runs.results[cell] = make_result(cell, 1.0 if rate == 5e-4 else 0.0)
    assert runs.chosen_rate("a") == 2e-4 and [run.accuracy for run in runs.test_results("a").values()] == [0.0]


def test_an_arm_is_summarized_at_the_chosen_rate() -> None:
    row = summarize_arm(make_runs({"a": [0.1, 0.3, 0.2]}, {("a", 1): 0.5, ("a", 2): 0.75, ("a", 3): 1.0}), "a")
    assert row["seeds"] == 3 and row["accuracy"] == 0.75 and row["gain"] == 0.5 and row["standard_deviation"] == 0.25
    reach = 4.302653 * 0.25 / 3**0.5
    assert row["interval"] == pytest.approx((0.75 - reach, 0.75 + reach), abs=1e-6)


def complete() -> StudyRuns:
    final = {(arm, seed): accuracy for arm, accuracy in (("a", 0.75), ("b", 0.5), ("one", 0.25)) for seed in (1, 2, 3)}
    return make_runs({"a": [0.1, 0.3, 0.2], "b": [0.1, 0.3, 0.2]}, final)


def test_comparisons_are_paired_by_seed_and_corrected_together() -> None:
    runs = complete()
    rows = compare_arms(runs, {QUESTIONS.digest: QUESTIONS})
    for row, pair in zip(rows, [("a", "b"), ("one", "b")], strict=True):
        correct = [np.stack([runs.test_results(arm)[seed].correct_Q for seed in (1, 2, 3)]) for arm in pair]
        expected = difference(*correct, QUESTIONS.image_Q, level=0.975).as_dict()
        assert {name: row[name] for name in expected} == expected
        assert row["corrected"] >= row["p_value"]
    assert min(row["corrected"] for row in rows) == pytest.approx(2 * min(row["p_value"] for row in rows))


def test_a_comparison_without_runs_has_an_error_and_counts_in_the_correction() -> None:
    runs = complete()
    whole = compare_arms(runs, {QUESTIONS.digest: QUESTIONS})[0]
    for seed in (2, 3):
        del runs.results[Cell("final", "one", 1e-3, seed)]
    first, second = compare_arms(runs, {QUESTIONS.digest: QUESTIONS})
    assert "expected 2 seeds or more that both arms finished, found 1" in second["error"]
    assert first["corrected"] == min(1.0, 2 * whole["p_value"])


def test_unequal_steps_are_refused_unless_an_arm_allows_them() -> None:
    runs, cell = complete(), Cell("final", "one", 1e-3, 1)
    runs.results[cell] = make_result(cell, steps=99)
    runs.check_steps()
    runs.results[Cell("final", "b", 2e-4, 1)] = make_result(Cell("final", "b", 2e-4, 1), steps=8)
    with pytest.raises(MastersError, match="equal numbers of optimizer steps"):
        runs.check_steps()


def test_the_report_has_all_files(tmp_path: Path) -> None:
    runs, results, lost = complete(), ResultStore(tmp_path), Cell("final", "b", 2e-4, 3)
    for run in runs.results.values():
        results.save(run, QUESTIONS)
    del runs.results[lost]
    runs.errors[lost] = "no memory\nat all"
    report, folder = write_report(runs, results)
    assert report["failed"] == [dict(run=lost.name, error="no memory\nat all")] and report["status"] == "failed"
    assert "failed: final-b-0.0002-3: no memory at all" in report["markdown"]
    table = parquet.read_table(folder / "runs.parquet").to_pylist()
    assert len(table) == len(runs.results) + 1 and [row["error"] for row in table if row["error"]] == [
        "no memory\nat all"
    ]
    assert {row["split"] for row in table if row["phase"] == "tuning"} == {"validation"}
    assert {file.suffix for file in folder.iterdir()} == {".md", ".json", ".parquet", ".png"}


def test_an_edge_is_flagged_in_the_table() -> None:
    runs = make_runs({"a": [0.3, 0.2, 0.1], "b": [0.1, 0.3, 0.2]}, {("a", 1): 0.5})
    text = render_study([summarize_arm(runs, arm) for arm in ("a", "b")], [], {})
    assert "0.0001 \\*" in text and "0.0002 |" in text and "* a: the best learning rate lies at the edge" in text


def test_a_study_without_finished_runs_has_a_table(tmp_path: Path) -> None:
    report, folder = write_report(StudyRuns(make_study()), ResultStore(tmp_path))
    assert "none finished" in report["markdown"] and not list(folder.glob("*.png"))
