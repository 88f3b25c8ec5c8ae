"""Evaluation by a judge: its verdicts decide what is right; what it cannot be asked about is never a silent 0."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from masters.common.errors import WorkerError
from masters.config.stages import Stage
from masters.flows.plan import settings
from masters.models.judging import batches
from masters.rewards import verifiers
from masters.store import tables
from masters.store.artifacts import Artifact
from masters.tasks import evaluate, generate
from masters.tasks.data import data
from masters.tasks.judges import evaluation_judge, metric_of
from masters.tasks.register import card
from masters.tasks.run_context import Run
from tests import fake_judge
from tests.fake_judge import FakeJudge, inside, serve
from tests.handmade_run import first_round, made_run, told
from tests.shape_data import write_questions

TEXTS = ["blue", "a blue shape", "no idea"]  # what the student says, in turn


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("source"), 24, bad=False)


@pytest.fixture
def judge() -> Iterator[FakeJudge]:
    with serve(say=generous) as there:
        yield there


def generous(user: str) -> tuple[int, object]:
    """Right is what has more than one word: nothing that a rule would say."""
    if "<overall_summary>" in user:
        return 200, fake_judge.verdict(user)
    return 200, f"It looks. <answer>{int(len(inside(user, 'generated_text').split()) > 1)}</answer>"


def judged_run(store: Path, source: Path, url: str, accuracy: str = "llm") -> Run:
    rewards, evaluation = dict(accuracy="rules", judge=url), dict(accuracy=accuracy)
    return made_run(store, source, rewards=rewards, evaluate=evaluation)


def answered(run: Run, questions: Artifact, too_long: bool = False) -> None:
    """The shards of the student's predictions, as if an engine had answered in each way of `TEXTS` in turn."""
    for order in evaluate.orders(run, questions, [run.ready.student]):
        rows = [
            dict(question_id=ref.question_id, model=order.answerer.name, text=TEXTS[at % len(TEXTS)],
                 finish_reason=tables.PROMPT_TOO_LONG if too_long and at % 2 else "stop")
            for at, ref in enumerate(order.shard.refs)
        ]  # fmt: skip
        run.storage.create(order.file, tables.encode(rows, tables.PREDICTED))


def evaluated(run: Run, questions: Artifact) -> Artifact:
    return evaluate.evaluate.fn(run, questions, [run.ready.student])


def test_the_judge_decides_and_what_it_said_is_kept(tmp_path: Path, source: Path, judge: FakeJudge) -> None:
    run = judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    answered(run, questions)
    made = evaluated(run, questions)
    rows = list(made.rows("predictions"))
    assert {(row["text"], row["correct"]) for row in rows} == {(text, text != "blue") for text in TEXTS}
    (score,) = made.facts["scores"].values()
    assert score["accuracy"] == sum(row["correct"] for row in rows) / len(rows) and score["n"] == len(rows)
    said = {(row["question"], row["reference"], row["text"]): row["score"] for row in made.rows("judgements")}
    assert len(said) == len(judge.first_calls()) == len(set(judge.first_calls()))
    assert {(text, said_of) for (*_, text), said_of in said.items()} == {(t, float(t != "blue")) for t in TEXTS}
    assert made.record["upstream"]["judge"]["uri"] == judge.url
    assert tables.read(run.storage, made.files("predictions")[0]).schema.equals(tables.PREDICTIONS)

    asked = len(judge.asked)
    assert evaluated(judged_run(tmp_path, source, judge.url), questions).fingerprint == made.fingerprint
    assert len(judge.asked) == asked


def test_the_judge_is_part_of_the_identity_and_rules_keep_theirs(tmp_path: Path, source: Path) -> None:
    urls = ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")
    judged = [evaluate.identity(judged_run(tmp_path, source, url), []) for url in urls]
    ruled = [evaluate.identity(judged_run(tmp_path, source, url, accuracy="rules"), []) for url in urls]
    assert len({one.fingerprint for one in judged + ruled}) == 3
    assert judged[0].config["judge"] == urls[0] and judged[0].config["model"] == dict(url=urls[0], model=None)
    assert ruled[0].config == verifiers.identity(judged_run(tmp_path, source, urls[0]).config.answers)
    plans = [list(settings(judged_run(tmp_path, source, urls[0], accuracy=by))) for by in ("llm", "rules")]
    differ = [a.kind for a, b in zip(*plans, strict=True) if a.fingerprint != b.fingerprint]
    assert differ == [Stage.EVALUATE]


def test_a_judge_that_cannot_be_had_fails_the_stage_and_the_next_run_goes_on(
    tmp_path: Path, source: Path, judge: FakeJudge
) -> None:
    run = judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    answered(run, questions)
    judge.say = lambda user: (401, "no") if "no idea" in user else generous(user)
    with pytest.raises(WorkerError, match=r"could not be had for \d+ of \d+ answers.*run again"):
        evaluated(run, questions)
    first, judge.say = set(judge.first_calls()), generous
    judge.asked.clear()
    made = evaluated(judged_run(tmp_path, source, judge.url), questions)
    again = set(judge.first_calls())
    assert again and all("no idea" in user for user in again) and again < first
    assert {row["text"] for row in made.rows("predictions") if row["correct"]} == {"a blue shape", "no idea"}


def test_an_unreadable_verdict_counts_as_wrong_and_is_told(
    tmp_path: Path, source: Path, judge: FakeJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.say = lambda user: (200, "who knows") if "no idea" in user else generous(user)
    run = judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    answered(run, questions)
    made = evaluated(run, questions)
    lost = sum(row["text"] == "no idea" for row in made.rows("predictions"))
    assert {row["text"] for row in made.rows("predictions") if row["correct"]} == {"a blue shape"}
    assert made.facts["no_verdict"] == run.stages[-1]["no_verdict"] == {"parse_failed": lost}
    assert f"evaluate: answers without a verdict count as wrong (parse_failed {lost})" in told(capsys)
    reused = judged_run(tmp_path, source, judge.url)
    evaluated(reused, questions)
    assert reused.stages[-1]["no_verdict"] == {"parse_failed": lost}


def test_a_judge_without_any_verdict_is_an_error(tmp_path: Path, source: Path, judge: FakeJudge) -> None:
    judge.say = lambda _: (200, "who knows")
    run = judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    answered(run, questions)
    with pytest.raises(WorkerError, match="gave no verdict on any of"):
        evaluated(run, questions)


def test_what_was_not_asked_is_not_judged(tmp_path: Path, source: Path, judge: FakeJudge) -> None:
    run = judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    answered(run, questions, too_long=True)
    rows = list(evaluated(run, questions).rows("predictions"))
    asked = [row for row in rows if row["finish_reason"] == "stop"]
    assert len(asked) < len(rows)
    assert all(row["correct"] == (row in asked and row["text"] != "blue") for row in rows)
    assert len(judge.first_calls()) <= len(asked)


def test_rebuilding_forgets_answers_and_verdicts(tmp_path: Path, source: Path, judge: FakeJudge) -> None:
    run = judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    answered(run, questions)
    evaluated(run, questions)
    assert list(run.storage.names("shards/judgements")) and list(run.storage.names("shards/predictions"))
    evaluate._forget(run, evaluate.orders(run, questions, [run.ready.student]), evaluation_judge(run))
    assert not list(run.storage.names("shards/judgements")) and not list(run.storage.names("shards/predictions"))


def test_card_and_metric_name_the_judge(tmp_path: Path, source: Path, judge: FakeJudge) -> None:
    run = judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    answered(run, questions)
    text = card(run, questions, evaluated(run, questions))
    assert f"| model | accuracy by judge {judge.url} | n |" in text
    assert f"what the language model `{judge.url}` judges to say the same" in text and "NFKC" not in text
    named = run.config.rewards.model_copy(update=dict(judge="demo/models/judge"))
    assert metric_of(run.config.model_copy(update=dict(rewards=named))) == "accuracy by judge judge"


def test_a_judge_for_evaluation_alone_is_not_asked_about_responses(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "start_early_judging", lambda *_: pytest.fail("responses would be judged"))
    run = made_run(
        tmp_path, source, rewards=dict(accuracy="llm", judge="http://127.0.0.1:1/v1"), train=dict(objective="kd"),
        evaluate=dict(accuracy="llm"),
    )  # fmt: skip
    questions = data.fn(run)
    made_of = replace(evaluate.identity(run, []), stage="generate")
    assert generate._judge_beside(run, first_round(run), made_of, questions, []) is None
