"""Evaluation by a judge: its verdicts decide what is correct, and an answer that it cannot judge is never scored 0."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from masters.common.errors import WorkerError
from masters.config.stages import Stage
from masters.flows.plan import stage_identities
from masters.rewards import verifiers
from masters.store import tables
from masters.store.artifacts import Artifact
from masters.tasks import evaluate
from masters.tasks.data import data
from masters.tasks.judges import accuracy_metric, evaluation_judge
from masters.tasks.register import render_card
from masters.tasks.run_context import Run
from tests import fake_judge
from tests.fake_judge import FakeJudge, serve, tag_content
from tests.handmade_run import make_run, read_stderr
from tests.shape_data import write_questions

TEXTS = ["blue", "a blue shape", "no idea"]  # the student's answers, in turn


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("source"), 24, bad=False)


@pytest.fixture
def judge() -> Iterator[FakeJudge]:
    with serve(reply=accept_phrases) as server:
        yield server


def accept_phrases(user: str) -> tuple[int, object]:
    """Reply as a judge that accepts every answer of several words, unlike any rule."""
    if "<overall_summary>" in user:
        return 200, fake_judge.judge_by_exact_match(user)
    return 200, f"It looks. <answer>{int(len(tag_content(user, 'generated_text').split()) > 1)}</answer>"


def make_judged_run(store: Path, source: Path, url: str, accuracy: str = "llm") -> Run:
    rewards, evaluation = dict(accuracy="rules", judge=url), dict(accuracy=accuracy)
    return make_run(store, source, rewards=rewards, evaluate=evaluation)


def write_answers(run: Run, questions: Artifact, too_long: bool = False) -> None:
    """Write the shards of the student's predictions, as if an engine had answered with `TEXTS` in turn."""
    for request in evaluate.prediction_requests(run, questions, [run.resources.student]):
        rows = [
            dict(
                question_id=ref.question_id,
                model=request.model.name,
                text=TEXTS[number % len(TEXTS)],
                finish_reason=tables.PROMPT_TOO_LONG if too_long and number % 2 else "stop",
            )
            for number, ref in enumerate(request.shard.refs)
        ]
        run.storage.create(request.file, tables.encode(rows, tables.PREDICTED))


def run_evaluation(run: Run, questions: Artifact) -> Artifact:
    return evaluate.evaluate.fn(run, questions, [run.resources.student])


def test_judge_decides_and_its_judgements_are_stored(tmp_path: Path, source: Path, judge: FakeJudge) -> None:
    run = make_judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    write_answers(run, questions)
    evaluated = run_evaluation(run, questions)
    rows = list(evaluated.rows("predictions"))
    assert {(row["text"], row["correct"]) for row in rows} == {(text, text != "blue") for text in TEXTS}
    (score,) = evaluated.facts["scores"].values()
    assert score["accuracy"] == sum(row["correct"] for row in rows) / len(rows) and score["n"] == len(rows)
    score_of = {(row["question"], row["reference"], row["text"]): row["score"] for row in evaluated.rows("judgements")}
    assert len(score_of) == len(judge.first_calls()) == len(set(judge.first_calls()))
    assert {(text, value) for (*_, text), value in score_of.items()} == {(t, float(t != "blue")) for t in TEXTS}
    assert evaluated.record["upstream"]["judge"]["uri"] == judge.url
    assert tables.read(run.storage, evaluated.files("predictions")[0]).schema.equals(tables.PREDICTIONS)

    requests = len(judge.requests)
    assert run_evaluation(make_judged_run(tmp_path, source, judge.url), questions).fingerprint == evaluated.fingerprint
    assert len(judge.requests) == requests


def test_judge_enters_identity_and_rules_do_not_change_it(tmp_path: Path, source: Path) -> None:
    urls = ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")
    judged = [evaluate.make_identity(make_judged_run(tmp_path, source, url), []) for url in urls]
    ruled = [evaluate.make_identity(make_judged_run(tmp_path, source, url, accuracy="rules"), []) for url in urls]
    assert len({identity.fingerprint for identity in judged + ruled}) == 3
    assert judged[0].config["judge"] == urls[0] and judged[0].config["model"] == dict(url=urls[0], model=None)
    assert ruled[0].config == verifiers.verifier_identity(make_judged_run(tmp_path, source, urls[0]).config.answers)
    plans = [
        list(stage_identities(make_judged_run(tmp_path, source, urls[0], accuracy=accuracy)))
        for accuracy in ("llm", "rules")
    ]
    differ = [a.kind for a, b in zip(*plans, strict=True) if a.fingerprint != b.fingerprint]
    assert differ == [Stage.EVALUATE]


def test_unavailable_judge_fails_the_stage_and_the_next_run_judges_the_rest(
    tmp_path: Path, source: Path, judge: FakeJudge
) -> None:
    run = make_judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    write_answers(run, questions)
    judge.reply = lambda user: (401, "no") if "no idea" in user else accept_phrases(user)
    with pytest.raises(WorkerError, match=r"was unavailable for \d+ of \d+ answers.*run again"):
        run_evaluation(run, questions)
    first, judge.reply = set(judge.first_calls()), accept_phrases
    judge.requests.clear()
    evaluated = run_evaluation(make_judged_run(tmp_path, source, judge.url), questions)
    again = set(judge.first_calls())
    assert again and all("no idea" in user for user in again) and again < first
    assert {row["text"] for row in evaluated.rows("predictions") if row["correct"]} == {"a blue shape", "no idea"}


def test_unparsable_verdict_counts_as_wrong_and_is_reported(
    tmp_path: Path, source: Path, judge: FakeJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.reply = lambda user: (200, "who knows") if "no idea" in user else accept_phrases(user)
    run = make_judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    write_answers(run, questions)
    evaluated = run_evaluation(run, questions)
    unparsable = sum(row["text"] == "no idea" for row in evaluated.rows("predictions"))
    assert {row["text"] for row in evaluated.rows("predictions") if row["correct"]} == {"a blue shape"}
    assert evaluated.facts["no_verdict"] == run.stages[-1]["no_verdict"] == {"parse_failed": unparsable}
    assert f"evaluate: answers without a verdict count as wrong (parse_failed {unparsable})" in read_stderr(capsys)
    reused = make_judged_run(tmp_path, source, judge.url)
    run_evaluation(reused, questions)
    assert reused.stages[-1]["no_verdict"] == {"parse_failed": unparsable}


def test_judge_without_any_verdict_raises(tmp_path: Path, source: Path, judge: FakeJudge) -> None:
    judge.reply = lambda _: (200, "who knows")
    run = make_judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    write_answers(run, questions)
    with pytest.raises(WorkerError, match="gave no verdict on any of"):
        run_evaluation(run, questions)


def test_predictions_with_too_long_prompts_are_not_judged(tmp_path: Path, source: Path, judge: FakeJudge) -> None:
    run = make_judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    write_answers(run, questions, too_long=True)
    rows = list(run_evaluation(run, questions).rows("predictions"))
    answered = [row for row in rows if row["finish_reason"] == "stop"]
    assert len(answered) < len(rows)
    assert all(row["correct"] == (row in answered and row["text"] != "blue") for row in rows)
    assert len(judge.first_calls()) <= len(answered)


def test_rebuild_deletes_stored_answers_and_verdicts(tmp_path: Path, source: Path, judge: FakeJudge) -> None:
    run = make_judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    write_answers(run, questions)
    run_evaluation(run, questions)
    assert list(run.storage.names("shards/judgements")) and list(run.storage.names("shards/predictions"))
    requests = evaluate.prediction_requests(run, questions, [run.resources.student])
    evaluate._delete_stored(run, requests, evaluation_judge(run))
    assert not list(run.storage.names("shards/judgements")) and not list(run.storage.names("shards/predictions"))


def test_model_card_and_metric_name_the_judge(tmp_path: Path, source: Path, judge: FakeJudge) -> None:
    run = make_judged_run(tmp_path, source, judge.url)
    questions = data.fn(run)
    write_answers(run, questions)
    text = render_card(run, questions, run_evaluation(run, questions))
    assert f"| model | accuracy by judge {judge.url} | n |" in text
    assert f"the language model `{judge.url}` judges that it says the same" in text and "NFKC" not in text
    named = run.config.rewards.model_copy(update=dict(judge="demo/models/judge"))
    assert accuracy_metric(run.config.model_copy(update=dict(rewards=named))) == "accuracy by judge judge"
