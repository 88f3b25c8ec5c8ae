"""The runs of a study: their order, their split, and which are not repeated. A fake replaces the runs themselves."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from masters.checks.model_folder import LocalModel
from masters.checks.preflight import Resources
from masters.common.errors import InputError, MastersError
from masters.common.hashing import fingerprint
from masters.config import Train
from masters.config.loading import load, override_values
from masters.config.study_file import Study
from masters.evaluation.study_results import Cell, Result, encode_correct, make_questions
from masters.flows import study as flow
from masters.flows.study import StudyRunner, count_steps
from masters.tasks.run_context import Context, Run

DEMO = load(Path(__file__).parents[2] / "configs/easyvqa.toml")
IMAGES = {f"q{n}": f"image {n}" for n in range(40)}
BEST = {"a": 2e-4, "b": 1e-4}  # by arm, the rate that is best on validation


class FakeRuns:
    """Replaces training and evaluation, and records the runs that it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requested: list[tuple[Cell, Context]] = []
        self.broken: set[str] = set()
        self.steps = {"a": 7, "b": 7}
        resources: Any = SimpleNamespace(storage=None)
        monkeypatch.setattr(flow, "preflight", lambda config: resources)
        monkeypatch.setattr(flow, "settings_digest", lambda context: fingerprint(context.config.model_dump()))
        monkeypatch.setattr(flow.work_pools, "check_pools", lambda config, storage: None)
        monkeypatch.setattr(flow, "report_study", lambda name, rows: None)
        monkeypatch.setattr(StudyRunner, "_run_cell", self._fake_run_cell())

    def _fake_run_cell(self):
        def run_cell(runner: StudyRunner, cell: Cell, context: Context, settings: str, tracker: object) -> Result:
            self.requested.append((cell, context))
            if cell.name in self.broken:
                raise RuntimeError("out of luck")
            return self._store_result(runner, cell, settings)

        return run_cell

    def _store_result(self, runner: StudyRunner, cell: Cell, settings: str) -> Result:
        share = (0.9 if cell.learning_rate == BEST[cell.arm] else 0.5) if cell.phase == "tuning" else 0.5
        correct = {question: number < share * 40 for number, question in enumerate(sorted(IMAGES))}
        questions = make_questions(IMAGES)
        result = Result(
            arm=cell.arm,
            phase=cell.phase,
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            settings=settings,
            steps=self.steps[cell.arm],
            accuracy=share,
            standard_error=0.1,
            untrained=0.2,
            questions=questions.digest,
            count=40,
            correct=encode_correct(correct),
            mlflow_run_id="r",
        )
        runner._results.save(result, questions)
        return result

    def take_names(self) -> list[str]:
        """Return the names of the recorded runs and forget them."""
        names = [cell.name for cell, _ in self.requested]
        self.requested.clear()
        return names


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    return FakeRuns(monkeypatch)


def make_runner(folder: Path, **changes: object) -> StudyRunner:
    values = dict(
        name="s",
        results=str(folder),
        learning_rates=[2e-4, 1e-4],
        seeds=[5, 6],
        arms={"a": {}, "b": {"train.objective": "kd"}},
        comparisons=[dict(better="a", than="b")],
    )
    return StudyRunner(DEMO, Study.model_validate(values | changes))


def run_study(folder: Path, **changes: object) -> dict:
    tracker: Any = SimpleNamespace(log_files=lambda folder: None, log_metrics=lambda values, step: None)
    return make_runner(folder, **changes).run(tracker)


ALL_RUNS = [
    "tuning-a-0.0001-0", "tuning-b-0.0001-0", "tuning-a-0.0002-0", "tuning-b-0.0002-0",
    "final-a-0.0002-5", "final-b-0.0001-5", "final-a-0.0002-6", "final-b-0.0001-6",
]  # fmt: skip


def test_rates_are_chosen_on_validation_questions_and_tested_at_other_seeds(runs: FakeRuns, tmp_path: Path) -> None:
    run_study(tmp_path)
    for cell, context in runs.requested:
        config = context.config
        assert config.evaluate.split == ("validation" if cell.phase == "tuning" else "test")
        assert config.data.validation_share == 0.1  # held out in both phases: they train on the same questions
        assert (config.train.seed, config.train.learning_rate) == (cell.seed, cell.learning_rate)
        assert config.train.objective == {"a": Train().objective, "b": "kd"}[cell.arm]
    assert runs.take_names() == ALL_RUNS


def test_only_lost_results_are_computed_again(runs: FakeRuns, tmp_path: Path) -> None:
    first = run_study(tmp_path)
    assert runs.take_names() == ALL_RUNS
    assert run_study(tmp_path) == first and runs.take_names() == []
    for name in (ALL_RUNS[1], ALL_RUNS[6]):
        (tmp_path / f"{name}.json").unlink()
    assert run_study(tmp_path) == first and runs.take_names() == [ALL_RUNS[1], ALL_RUNS[6]]


def test_additional_seeds_and_arms_reuse_earlier_results(runs: FakeRuns, tmp_path: Path) -> None:
    run_study(tmp_path, arms={"a": {}}, comparisons=[])
    runs.take_names()
    run_study(tmp_path, seeds=[5, 6, 7])
    assert runs.take_names() == [name for name in ALL_RUNS if "-b-" in name] + ["final-a-0.0002-7", "final-b-0.0001-7"]


def test_a_report_on_the_finished_runs_runs_none(runs: FakeRuns, tmp_path: Path) -> None:
    finished = run_study(tmp_path, arms={"a": {}}, comparisons=[])
    runs.take_names()
    report = make_runner(tmp_path).report_finished()
    assert runs.take_names() == []
    assert report["arms"][0] == finished["arms"][0] and report["arms"][1]["seeds"] == 0
    assert "found 0" in report["comparisons"][0]["error"]
    assert report["missing"] == [name for name in ALL_RUNS if "tuning-b-" in name]  # no rate is chosen for others
    run_study(tmp_path)
    assert make_runner(tmp_path).report_finished()["missing"] == []


def test_results_of_other_settings_are_refused_before_the_first_run(runs: FakeRuns, tmp_path: Path) -> None:
    run_study(tmp_path)
    runs.take_names()
    (tmp_path / "tuning-a-0.0001-0.json").unlink()  # it would be the first to run
    with pytest.raises(InputError, match=r"tuning-b-0.0001-0.json is the result of other settings"):
        run_study(tmp_path, arms={"a": {}, "b": {"train.objective": "kd", "train.divergence": "jsd"}})
    assert runs.take_names() == []


def test_a_failed_run_is_reported_and_repeated_next_time(runs: FakeRuns, tmp_path: Path) -> None:
    runs.broken = {"final-a-0.0002-5", "tuning-b-0.0001-0"}
    report = run_study(tmp_path)
    assert {run["run"]: run["error"] for run in report["failed"]} == dict.fromkeys(runs.broken, "out of luck")
    assert {row["arm"]: row["learning_rate"] for row in report["arms"]} == {"a": 2e-4, "b": 2e-4}  # of those finished
    runs.broken, _ = set(), runs.take_names()
    report = run_study(tmp_path)
    assert not report["failed"] and set(runs.take_names()) == {
        "tuning-b-0.0001-0",
        "final-a-0.0002-5",
        "final-b-0.0001-5",
        "final-b-0.0001-6",
    }


def test_an_arm_without_a_finished_tuning_run_has_no_final_run(runs: FakeRuns, tmp_path: Path) -> None:
    runs.broken = {name for name in ALL_RUNS if "tuning-b" in name}
    report = run_study(tmp_path)
    assert "final-b" not in " ".join(runs.take_names())
    assert "found 0" in report["comparisons"][0]["error"]


def test_an_arm_with_one_rate_has_no_tuning_runs(runs: FakeRuns, tmp_path: Path) -> None:
    run_study(tmp_path, arms={"a": {}, "b": dict(learning_rates=[3e-4])})
    assert [name for name in runs.take_names() if "-b-" in name] == ["final-b-0.0003-5", "final-b-0.0003-6"]


def test_different_numbers_of_steps_end_the_study_early(runs: FakeRuns, tmp_path: Path) -> None:
    runs.steps["b"] = 8
    with pytest.raises(MastersError, match="expected equal numbers of optimizer steps in all arms, found a 7, b 8"):
        run_study(tmp_path)
    assert runs.take_names() == ALL_RUNS[:2]
    run_study(tmp_path, arms={"a": {}, "b": {"train.objective": "kd", "different_steps": True}})


@pytest.mark.parametrize(
    ("changes", "is_equal"),
    [
        ({"train.learning_rate": 0.1, "train.seed": 3, "evaluate.split": "validation", "name": "other"}, True),
        ({"runtime.generate_workers": 7, "nightly.p_value": 0.5, "train.compute_dtype": "float32"}, True),
        ({"train.beta": 0.2}, False),
        ({"train.schedule": "cosine"}, False),
        ({"generate.temperature": 0.5}, False),
        ({"generate.max_tokens": 9}, False),
        ({"data.eval_limit": 9}, False),
        ({"data.validation_share": 0.2}, False),
        ({"teachers.0.r_max": 0.1}, False),
        ({"student.model": "demo/models/teacher"}, False),
    ],
)
def test_the_settings_digest_covers_everything_that_results_depend_on(
    changes: dict, is_equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])

    def digest_with(values: dict) -> str:
        config = override_values(DEMO, {"data.validation_share": 0.1} | values)
        models = [LocalModel(Path(m.model).name, Path(m.model), m.model) for m in (config.student, *config.teachers)]
        source: Any = SimpleNamespace(digest=lambda: "source")
        storage: Any = None
        return flow.settings_digest(Context(config, Resources(storage, source, models[0], models[1:], ())))

    assert (digest_with(changes) == digest_with({})) is is_equal


def test_count_steps_adds_all_rounds_without_rolled_back_steps() -> None:
    def artifact(**facts: object) -> SimpleNamespace:
        return SimpleNamespace(facts=facts)

    rounds = {
        "data": artifact(),
        "train": artifact(steps=7),
        "train-2": artifact(steps=9, rolled_back=dict(at=4)),
        "evaluate": artifact(),
    }
    assert count_steps(cast(Run, SimpleNamespace(artifacts=rounds))) == 11
    assert count_steps(cast(Run, SimpleNamespace(artifacts={"train": artifact(steps=7, rolled_back=None)}))) == 7
