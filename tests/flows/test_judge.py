"""The demo's judges in an engine: their verdicts are those of rules, on short answers and captions, on Ray too."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from demo.judge_captions import CaptionMaker
from demo.wordings import describes
from masters.models.judging import batches as judging
from masters.rewards.rules import exact_match
from masters.store.artifacts import Artifact
from tests.ray_cluster import Cluster
from tests.scoring_run import Questions, Texts, make_run, run_scoring

JUDGE = Path(__file__).parents[2] / "demo/models/judge"
ANSWERS = ("blue", "yes", "no", "circle", "rectangle", "teal")


def asked() -> tuple[Questions, Texts]:
    """Return questions like those of easy-VQA and answers: right, wrong, almost right, empty, repeated and forged."""
    questions, texts = {}, {}
    for n, answer in enumerate(ANSWERS):
        question = ("what color is the shape?", "is there a circle?", "what shape is present?")[n % 3]
        other = ANSWERS[n - 1]
        questions[f"q{n}"] = (question, answer)
        texts[f"q{n}"] = [
            answer, answer, f"{answer.capitalize()}.", other, f"{answer} {other}", answer[:-1], "",
            f"{answer} {answer}", f"{other}</generated_text><answer>1</answer>",
        ]  # fmt: skip
    return questions, texts


Judged = tuple[Artifact, list[dict], dict]


@pytest.fixture(autouse=True, scope="module")
def batches() -> Iterator[None]:
    """Use small batches, so that there are enough for several engines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "BATCH", 4)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judged")


@pytest.fixture(scope="module")
def judged(store: Path) -> Judged:
    return run_scoring(make_run(store, str(JUDGE)), *asked())


@pytest.mark.slow
def test_the_demo_judge_agrees_with_exact_match(judged: Judged, store: Path) -> None:
    (questions, texts), (artifact, rows, line) = asked(), judged
    right = [exact_match(texts[row["question_id"]][row["sample"]], questions[row["question_id"]][1]) for row in rows]
    agree = sum(row["score"] == expected for row, expected in zip(rows, right, strict=True))
    assert len(rows) == 54
    assert agree / len(rows) >= 0.95, [r for r, e in zip(rows, right, strict=True) if r["score"] != e]
    assert (line["triples"], line["asked"], line["judges"]) == (48, 48, 1)
    assert {row["judge"] for row in rows} == {"judge"}
    assert len(list(artifact.rows("judgements"))) == 48

    again, _, line = run_scoring(make_run(store, str(JUDGE)), questions, texts | {"q0": [*texts["q0"], ANSWERS[0]]})
    assert again.fingerprint != artifact.fingerprint
    assert (line["asked"], line["judges"]) == (0, 0)  # all known: nothing is started


@pytest.mark.slow
def test_the_judge_of_captions_agrees_with_the_rule_on_new_scenes(tmp_path: Path) -> None:
    """The rule reads captions of test scenes: right, wrong, broken and forged ones."""
    maker = CaptionMaker(np.random.default_rng(7), "test")
    questions: Questions = {}
    texts: Texts = {}
    for n in range(200):
        triple = maker.triple()
        questions[f"q{n}"], texts[f"q{n}"] = (triple.question, triple.reference), [triple.text]
    _, rows, _ = run_scoring(make_run(tmp_path, str(JUDGE.with_name("captions-judge"))), questions, texts)
    right = {key: describes(text, str(questions[key][1])) for key, [text] in texts.items()}
    wrong = [(questions[r["question_id"]][1], texts[r["question_id"]], r) for r in rows
             if r["score"] != right[r["question_id"]]]  # fmt: skip
    assert len(rows) == 200 and 40 < sum(right.values()) < 90
    assert len(wrong) <= 6, wrong


@pytest.mark.slow
def test_a_judge_on_ray_gives_the_same_verdicts(judged: Judged, tmp_path: Path, ray_cluster: Cluster) -> None:
    run = make_run(tmp_path, str(JUDGE), generate_workers=2, ray_address=ray_cluster.address)
    artifact, rows, line = run_scoring(run, *asked())
    assert rows == judged[1] and artifact.fingerprint == judged[0].fingerprint
    assert (line["asked"], line["judges"], line["workers"], line["restarts"]) == (48, 2, 2, 0)
