"""Shares of responses, questions and groups that teach little are counted, reported and warned of."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from masters.store import tables
from masters.store.storage import Storage
from masters.tasks import training_signal
from masters.tasks.training_signal import (
    LIMITS,
    QuestionVerdicts,
    advantage_shares,
    response_shares,
)
from tests import scoring_run
from tests.command_line import ROOT
from tests.handmade_run import make_run, read_stderr
from tests.shape_data import write_questions
from tests.tasks import test_prompts_too_long as engines

in_process = engines.in_process  # a fixture: a stand-in for vLLM answers in this process

SOURCES = st.sampled_from([("teacher", 0.2), ("teacher", 0.0), ("student", None)])
ROWS = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        SOURCES,
        st.sampled_from(["", " \n", "yes", "no"]),
        st.sampled_from(["stop", "length", tables.PROMPT_TOO_LONG]),
    ),
    max_size=12,
)


@given(ROWS)
def test_shares_of_responses_equal_those_counted_one_by_one(rows: list[tuple]) -> None:
    """The responses of a model to a question are in one file, as shards have them."""
    files: dict[tuple, list[dict]] = {}
    for question, (source, ratio), text, end in rows:
        row = dict(question_id=question, source=source, mask_ratio=ratio, text=text, finish_reason=end)
        files.setdefault((source, ratio), []).append(row)
    with TemporaryDirectory() as folder:
        storage = Storage(folder)
        for number, content in enumerate(files.values()):
            storage.write(f"{number}.parquet", tables.encode(content, tables.RESPONSES))
        found = response_shares(storage, [f"{number}.parquet" for number in range(len(files))])
    asked = [row for row in rows if row[3] != tables.PROMPT_TOO_LONG]
    expected: dict[str, float] = {}
    if asked:
        expected["truncated"] = sum(end == "length" for *_, end in asked) / len(asked)
        expected["empty"] = sum(not text.strip() for _, _, text, _ in asked) / len(asked)
    given, texts = Counter(row[:2] for row in asked), Counter(row[:3] for row in asked)
    if repeatable := [row for row in asked if given[row[:2]] > 1]:
        expected["identical"] = sum(texts[row[:3]] == given[row[:2]] for row in repeatable) / len(repeatable)
    assert found == pytest.approx(expected)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.sampled_from([0.0, 0.49, 0.5, 1.0])), max_size=12))
def test_shares_of_questions_equal_those_counted_one_by_one(rows: list[tuple[str, float | None]]) -> None:
    verdicts = QuestionVerdicts()
    for question, score in rows:
        verdicts.add(question, score)
    scores = [[s for q, s in rows if q == question and s is not None] for question in "abc"]
    judged = [of_question for of_question in scores if of_question]
    expected = {}
    if judged:
        expected["all_wrong"] = sum(max(of_question) < 0.5 for of_question in judged) / len(judged)
        expected["all_right"] = sum(min(of_question) >= 0.5 for of_question in judged) / len(judged)
    assert verdicts.shares == pytest.approx(expected)


def test_the_share_without_advantage_is_a_mean_over_questions() -> None:
    steps = [dict(questions=4, questions_with_advantage=0.5), dict(questions=1, questions_with_advantage=0.0)]
    assert advantage_shares(steps) == pytest.approx({"no_advantage": 3 / 5})
    assert advantage_shares([dict(questions=4, questions_with_advantage=None)]) == advantage_shares([]) == {}


@pytest.mark.parametrize("name", LIMITS)
def test_a_share_at_its_limit_is_no_warning_and_one_above_is(name: str) -> None:
    limit = LIMITS[name]
    assert training_signal.crossed_limits({name: limit.share}) == {}
    assert f"(limit {limit.share:.0%})" in training_signal.crossed_limits({name: limit.share + 0.01})[name]


def test_every_share_is_documented_with_its_limit() -> None:
    page = (ROOT / "docs/watching.md").read_text()
    for name, limit in LIMITS.items():
        assert f"| `{name}` |" in page and f"| {limit.share:.0%} |" in page.split(f"| `{name}` |")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("texts", "signal"),
    [
        (dict(q1=["no", "no"], q2=["nope", ""]), dict(all_wrong=1.0, all_right=0.0)),
        (dict(q1=["yes", "Yes."], q2=["yes", "yes"]), dict(all_wrong=0.0, all_right=1.0)),
        (dict(q1=["yes", "no"], q2=["yes", "no"]), dict(all_wrong=0.0, all_right=0.0)),
    ],
)
def test_questions_that_are_all_wrong_or_all_right_are_reported(
    texts: dict, signal: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions: scoring_run.Questions = dict(q1=("is it red?", "yes"), q2=("is it round?", "yes"))
    for outcome in ("built", "reused"):
        run = scoring_run.make_run(tmp_path, accuracy="rules")
        _, _, entry = scoring_run.run_scoring(run, questions, texts)
        assert (entry["outcome"], entry["signal"]) == (outcome, signal)
        assert run.tracker.metrics == {f"signal_{name}": share for name, share in signal.items()}  # pyright: ignore
        crossed = {name for name, share in signal.items() if share == 1}
        assert run.tracker.warnings.keys() == {f"signal_{name}" for name in crossed}  # pyright: ignore
        stderr = read_stderr(capsys)
        assert ("100.0% of the questions" in stderr) == bool(crossed)


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        ("", "stop", dict(truncated=0.0, empty=1.0, identical=1.0)),
        ("yes", "length", dict(truncated=1.0, empty=0.0, identical=1.0)),
    ],
)
def test_degenerate_responses_are_in_the_summary_in_mlflow_and_warned_of(
    text: str, end: str, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    class DegenerateEngine(engines.FakeEngine):
        def _generate(self, prompts: list[dict], params: list, use_tqdm: bool) -> list:
            outputs = super()._generate(prompts, params, use_tqdm)
            for answer in (answer for output in outputs for answer in output.outputs):
                answer.text, answer.finish_reason = text, end
            return outputs

    monkeypatch.setattr(engines.worker, "Engine", DegenerateEngine)
    source = write_questions(tmp_path / "data", 8, bad=False)
    for outcome in ("built", "reused"):
        run = make_run(tmp_path / "store", source, generate=dict(max_tokens=engines.ANSWER, responses=4))
        engines.run_generate(run)
        entry = run.stages[-1]
        assert (entry["outcome"], entry["signal"]) == (outcome, expected)
        stage = MlflowClient(run.tracker.uri).get_run(entry["mlflow_run_id"]).data
        run.tracker.finish("FINISHED")
        assert {name: stage.metrics[f"signal_{name}"] for name in expected} == expected
        stderr = read_stderr(capsys)
        for name, share in expected.items():
            assert (f"masters.warning.signal_{name}" in stage.tags) == (share == 1)
            assert (f"generate: {LIMITS[name].message(1.0)}" in stderr) == (share == 1)
