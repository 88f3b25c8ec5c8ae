"""Nights as runs of their deployment, on Postgres and S3; the champion, once there, is the next student.

In order, as nights follow each other.
"""

import json
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from masters.artifacts import Artifact, load
from masters.storage import Storage
from tests.drawn import write_questions, write_rows
from tests.stack import ENDED, SELDOM, Stack, serve, until

pytestmark = [pytest.mark.slow, pytest.mark.stack]
PREFIX, NAME, NEW = "s3://lake/nights", "nights", 16


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def rows(stack: Stack) -> list[dict]:
    path = write_questions(stack.folder / "data", 80)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def early(rows: list[dict]) -> list[dict]:
    """Without the last training rows."""
    late = [row["id"] for row in rows[:80] if row["split"] == "train"][-NEW:]
    return [row for row in rows if row["id"] not in late]


@pytest.fixture(scope="module")
def store(stack: Stack) -> Iterator[Storage]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.client_environment().items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        yield Storage(PREFIX)


def config(stack: Stack) -> dict:
    return dict(
        name=NAME, store=dict(root=PREFIX),
        data=dict(source=str(stack.folder / "data/questions.jsonl"), max_rejected_share=0.2),
        student=dict(model="demo/models/student"), teachers=[dict(model="demo/models/teacher", r_max=0.2, step=0.2)],
        generate=dict(responses=2, max_tokens=8, dtype="float32"), rewards=dict(accuracy="rules"),
        train=dict(learning_rate=1e-4, questions_per_step=4), runtime=dict(max_model_len=512),
        nightly=dict(start="champion"),
    )  # fmt: skip


def ended(stack: Stack, deployment: str, **parameters: object) -> dict:
    """A run of a deployment, at its end."""
    run = stack.start(deployment, **parameters)
    until(lambda: stack.run(run)["state_type"] in ENDED, deployment, every=SELDOM)
    return stack.run(run)


def night(stack: Stack, store: Storage, given: list[dict]) -> dict:
    """The summary of a night on these rows."""
    write_rows(stack.folder / "data", given)
    run = ended(stack, "nightly", config=config(stack))
    assert run["state_type"] == "COMPLETED", run["state"]
    summary = json.loads(store.read("summary.json"))
    assert summary["prefect"]["flow_run_id"] == run["id"]
    return summary


def champion(stack: Stack) -> int:
    """Who has the alias, says MLflow."""
    asked = dict(name=NAME, alias="champion")
    found = httpx.get(f"{stack.urls['mlflow_url']}/api/2.0/mlflow/registered-models/alias", params=asked)
    return int(found.json()["model_version"]["version"])


def made(summary: dict, stage: str, store: Storage) -> Artifact:
    uri = next(s["uri"] for s in summary["stages"] if s["name"] == stage)
    return load(store, uri.removeprefix(f"{PREFIX}/"))


@pytest.fixture(scope="module")
def first(stack: Stack, store: Storage, early: list[dict]) -> dict:
    return night(stack, store, early)


def test_the_first_night_makes_the_champion(stack: Stack, first: dict) -> None:
    assert (first["nightly"]["outcome"], first["nightly"]["champion"]) == ("promoted", 1)
    assert champion(stack) == 1


def test_a_night_without_change_does_no_model_work(
    stack: Stack, first: dict, early: list[dict], store: Storage
) -> None:
    told = night(stack, store, early)
    assert told["nightly"]["outcome"] == "no change" and [s["name"] for s in told["stages"]] == ["data"]
    assert champion(stack) == 1


@pytest.fixture(scope="module")
def third(stack: Stack, store: Storage, first: dict, rows: list[dict]) -> dict:
    return night(stack, store, rows)


def test_the_champion_is_trained_on_the_new_rows_alone(first: dict, third: dict, store: Storage) -> None:
    asked = {row["question_id"] for row in made(third, "generate", store).rows("responses")}
    before = {row["question_id"] for row in made(first, "generate", store).rows("responses")}
    assert len(asked) == NEW and not asked & before
    student = made(third, "train", store).upstream("student")
    assert student and student.folder == made(first, "train", store).folder


def test_candidate_and_champion_are_compared_on_the_same_questions(
    stack: Stack, first: dict, third: dict, store: Storage
) -> None:
    def right(summary: dict, stage: str) -> dict[str, bool]:
        answers = made(summary, stage, store).rows("predictions")
        return {row["question_id"]: row["correct"] for row in answers if row["model"] == "student-after"}

    told = third["nightly"]
    candidate, theirs = right(third, "evaluate"), right(third, "evaluate-champion")
    assert theirs == right(first, "evaluate") and len(theirs) == 20
    assert told["comparison"]["gained"] == sum(candidate[q] and not theirs[q] for q in theirs)
    assert told["comparison"]["lost"] == sum(theirs[q] and not candidate[q] for q in theirs)
    assert (told["candidate"], champion(stack)) == (2, told["champion"])
    assert told["champion"] == (2 if told["outcome"] == "promoted" else 1)


def test_lineage_goes_on_through_the_champion(stack: Stack, first: dict, third: dict, store: Storage) -> None:
    client = replace(stack, environment=stack.environment | stack.client_environment())
    done = client.masters("lineage", f"{NAME}@candidate", "--json")
    assert done.returncode == 0, done.stderr
    chain = json.loads(done.stdout.splitlines()[-1])
    assert chain["verified"]
    built = {(s["name"], s["fingerprint"]): s["mlflow_run_id"] for s in chain["stages"]}
    again = {stage["name"] for stage in third["stages"] if stage["outcome"] == "reused"}
    for summary in (first, third):
        for stage in summary["stages"]:
            if summary is third or stage["name"] in ("data", "mask", "generate", "score", "train"):
                own = built.pop((stage["name"], stage["fingerprint"]), None)
                assert own or stage["name"] in ("evaluate-champion", "mask"), stage["name"]
                # what the third night reused it has a run of its own for
                assert own is None or stage["name"] in again or own == stage["mlflow_run_id"]
    assert built == {}
    version = httpx.get(
        f"{stack.urls['mlflow_url']}/api/2.0/mlflow/model-versions/get", params=dict(name=NAME, version="2")
    ).json()["model_version"]
    trained = next(s["mlflow_run_id"] for s in first["stages"] if s["name"] == "train")
    assert f"/runs/{trained})" in version["description"].partition("earlier runs")[2]
