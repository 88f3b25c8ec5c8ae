"""Which runs a study makes, in which order, on which split, and which it does not make again; runs are stood in for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from masters.checks.model_folder import LocalModel
from masters.checks.preflight import Resources
from masters.common.errors import InputError, MastersError
from masters.common.hashing import fingerprint
from masters.config import Train
from masters.config.loading import override_values, load
from masters.config.study_file import Study
from masters.evaluation.study_results import Cell, Result, packed_bits, questions_of
from masters.flows import study as flow
from masters.flows.study import StudyRunner, steps_taken
from masters.tasks.run_context import Context, Run

DEMO = load(Path(__file__).parents[2] / "configs/easyvqa.toml")
IMAGES = {f"q{n}": f"image {n}" for n in range(40)}
BEST = {"a": 2e-4, "b": 1e-4}  # by arm, the rate that is best on validation


class Runs:
    """Stands in for training and evaluation, and keeps what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Cell, Context]] = []
        self.broken: set[str] = set()
        self.steps = {"a": 7, "b": 7}
        resources: Any = SimpleNamespace(storage=None)
        monkeypatch.setattr(flow, "preflight", lambda config: resources)
        monkeypatch.setattr(flow, "settings_digest", lambda context: fingerprint(context.config.model_dump()))
        monkeypatch.setattr(flow.work_pools, "check", lambda config, storage: None)
        monkeypatch.setattr(flow, "study_reported", lambda name, rows: None)
        monkeypatch.setattr(StudyRunner, "_run", self._run())

    def _run(self):
        def run(conductor: StudyRunner, cell: Cell, context: Context, made_of: str, tracker: object) -> Result:
            self.made.append((cell, context))
            if cell.name in self.broken:
                raise RuntimeError("out of luck")
            return self._kept(conductor, cell, made_of)

        return run

    def _kept(self, conductor: StudyRunner, cell: Cell, made_of: str) -> Result:
        share = (0.9 if cell.learning_rate == BEST[cell.arm] else 0.5) if cell.phase == "tuning" else 0.5
        correct = {question: number < share * 40 for number, question in enumerate(sorted(IMAGES))}
        asked = questions_of(IMAGES)
        result = Result(
            arm=cell.arm, phase=cell.phase, learning_rate=cell.learning_rate, seed=cell.seed, settings=made_of,
            steps=self.steps[cell.arm], accuracy=share, standard_error=0.1, untrained=0.2, questions=asked.digest,
            count=40, correct=packed_bits(correct), mlflow_run_id="r",
        )  # fmt: skip
        conductor._results.keep(result, asked)
        return result

    def names(self) -> list[str]:
        found = [cell.name for cell, _ in self.made]
        self.made.clear()
        return found


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def conducted(folder: Path, **changes: object) -> dict:
    values = dict(
        name="s", results=str(folder), learning_rates=[2e-4, 1e-4], seeds=[5, 6],
        arms={"a": {}, "b": {"train.objective": "kd"}}, comparisons=[dict(better="a", than="b")],
    )  # fmt: skip
    tracker: Any = SimpleNamespace(files=lambda folder: None, metrics=lambda values, step: None)
    return StudyRunner(DEMO, Study.model_validate(values | changes)).conduct(tracker)


ALL = [
    "tuning-a-0.0001-0", "tuning-b-0.0001-0", "tuning-a-0.0002-0", "tuning-b-0.0002-0",
    "final-a-0.0002-5", "final-b-0.0001-5", "final-a-0.0002-6", "final-b-0.0001-6",
]  # fmt: skip


def test_rates_are_chosen_on_validation_questions_and_tested_at_other_seeds(runs: Runs, tmp_path: Path) -> None:
    conducted(tmp_path)
    for cell, context in runs.made:
        config = context.config
        assert config.evaluate.split == ("validation" if cell.phase == "tuning" else "test")
        assert config.data.validation_share == 0.1  # held out in both phases: they train on the same questions
        assert (config.train.seed, config.train.learning_rate) == (cell.seed, cell.learning_rate)
        assert config.train.objective == {"a": Train().objective, "b": "kd"}[cell.arm]
    assert runs.names() == ALL


def test_only_what_is_lost_is_made_again(runs: Runs, tmp_path: Path) -> None:
    first = conducted(tmp_path)
    assert runs.names() == ALL
    assert conducted(tmp_path) == first and runs.names() == []
    for name in (ALL[1], ALL[6]):
        (tmp_path / f"{name}.json").unlink()
    assert conducted(tmp_path) == first and runs.names() == [ALL[1], ALL[6]]


def test_more_seeds_and_arms_add_to_what_is_there(runs: Runs, tmp_path: Path) -> None:
    conducted(tmp_path, arms={"a": {}}, comparisons=[])
    runs.names()
    conducted(tmp_path, seeds=[5, 6, 7])
    assert runs.names() == [name for name in ALL if "-b-" in name] + ["final-a-0.0002-7", "final-b-0.0001-7"]


def test_results_of_other_settings_are_refused_before_anything_is_made(runs: Runs, tmp_path: Path) -> None:
    conducted(tmp_path)
    runs.names()
    (tmp_path / "tuning-a-0.0001-0.json").unlink()  # it would be the first to run
    with pytest.raises(InputError, match=r"tuning-b-0.0001-0.json is the result of other settings"):
        conducted(tmp_path, arms={"a": {}, "b": {"train.objective": "kd", "train.divergence": "kl"}})
    assert runs.names() == []


def test_a_run_that_fails_is_told_and_tried_again_next_time(runs: Runs, tmp_path: Path) -> None:
    runs.broken = {"final-a-0.0002-5", "tuning-b-0.0001-0"}
    report = conducted(tmp_path)
    assert {run["run"]: run["error"] for run in report["failed"]} == dict.fromkeys(runs.broken, "out of luck")
    assert {row["arm"]: row["learning_rate"] for row in report["arms"]} == {"a": 2e-4, "b": 2e-4}  # of those finished
    runs.broken, _ = set(), runs.names()
    whole = conducted(tmp_path)
    assert not whole["failed"] and set(runs.names()) == {
        "tuning-b-0.0001-0", "final-a-0.0002-5", "final-b-0.0001-5", "final-b-0.0001-6",
    }  # fmt: skip


def test_an_arm_of_which_no_rate_finished_has_no_final_run(runs: Runs, tmp_path: Path) -> None:
    runs.broken = {name for name in ALL if "tuning-b" in name}
    report = conducted(tmp_path)
    assert "final-b" not in " ".join(runs.names())
    assert "found 0" in report["comparisons"][0]["error"]


def test_an_arm_of_one_rate_has_nothing_to_choose(runs: Runs, tmp_path: Path) -> None:
    conducted(tmp_path, arms={"a": {}, "b": dict(learning_rates=[3e-4])})
    assert [name for name in runs.names() if "-b-" in name] == ["final-b-0.0003-5", "final-b-0.0003-6"]


def test_unequal_steps_end_the_study_with_the_first_run_that_shows_it(runs: Runs, tmp_path: Path) -> None:
    runs.steps["b"] = 8
    with pytest.raises(MastersError, match="expected equal numbers of optimizer steps in all arms, found a 7, b 8"):
        conducted(tmp_path)
    assert runs.names() == ALL[:2]
    conducted(tmp_path, arms={"a": {}, "b": {"train.objective": "kd", "different_steps": True}})


@pytest.mark.parametrize(
    ("changes", "same"),
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
def test_a_result_is_of_all_that_it_follows_from(changes: dict, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])

    def made_of(values: dict) -> str:
        config = override_values(DEMO, {"data.validation_share": 0.1} | values)
        models = [LocalModel(Path(m.model).name, Path(m.model), m.model) for m in (config.student, *config.teachers)]
        source: Any = SimpleNamespace(digest=lambda: "source")
        storage: Any = None
        return flow.settings_digest(Context(config, Resources(storage, source, models[0], models[1:], ())))

    assert (made_of(changes) == made_of({})) is same


def test_steps_of_all_rounds_count_but_those_taken_back() -> None:
    def made(**facts: object) -> SimpleNamespace:
        return SimpleNamespace(facts=facts)

    rounds = {
        "data": made(),
        "train": made(steps=7),
        "train-2": made(steps=9, rolled_back=dict(at=4)),
        "evaluate": made(),
    }
    assert steps_taken(cast(Run, SimpleNamespace(made=rounds))) == 11
    assert steps_taken(cast(Run, SimpleNamespace(made={"train": made(steps=7, rolled_back=None)}))) == 7
