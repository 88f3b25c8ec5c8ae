"""Four nights: a student that learned nothing, no change, new rows, and changed and withdrawn rows with a worse one."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from math import comb
from pathlib import Path

import pytest

from tests.command_line import masters, options, read_json, rows
from tests.shape_data import write_questions, write_rows
from tests.weak_student import write_weak_student

pytestmark = pytest.mark.slow
GOOD, BAD = 2e-4, 1e-2  # learning rates
RESPONSES = 4


class Webhook:
    """A server that records the reports posted to it."""

    def __init__(self) -> None:
        reports: list[dict] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                reports.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.reports, self.server = reports, HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def webhook() -> Iterator[Webhook]:
    hook = Webhook()
    yield hook
    hook.server.shutdown()


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, webhook: Webhook, prefect: dict[str, str]) -> list[dict]:
    folder = tmp_path_factory.mktemp("nights")
    (folder / "home").mkdir()
    path, student = write_questions(folder / "data", 120, bad=False), write_weak_student(folder / "student")
    everything = [json.loads(line) for line in path.read_text().splitlines()]
    held = [r for r in everything if r["split"] == "train"][-8:]
    early = [r for r in everything if r not in held]
    withdrawn = next(r for r in early if r["split"] == "train")
    changed = next(r for r in early if r["split"] == "train" and r != withdrawn)
    late = [r | {"question": "what color?"} if r is changed else r for r in everything if r is not withdrawn]

    def night(given: list[dict], rate: float) -> dict:
        write_rows(folder / "data", given)
        values = {
            "data.source": path,
            "store.root": folder / "store",
            "student.model": student,
            "train.epochs": 1,
            "train.learning_rate": rate,
            "train.questions_per_step": 4,
            "runtime.checkpoint_steps": 50,
            "runtime.train_processes": 1,
            "generate.responses": RESPONSES,
            "nightly.max_category_drop": 0.05,
        }
        environment = {"MASTERS_WEBHOOK_URL": webhook.url} | prefect
        words = ("nightly", "configs/easyvqa.toml", *options(values), "--json")
        done = masters(*words, home=folder / "home", **environment)
        assert webhook.url not in done.stdout + done.stderr
        return read_json(done) | dict(reports=len(webhook.reports))

    plan = [(early, BAD), (early, BAD), (everything, GOOD), (late, BAD)]
    return [night(given, rate) for given, rate in plan]


def stages(night: dict) -> dict[str, dict]:
    return {stage["name"]: stage for stage in night["stages"]}


def test_a_student_that_is_not_better_than_before_training_is_not_the_first_champion(nights: list[dict]) -> None:
    decision = nights[0]["nightly"]
    assert (decision["outcome"], decision["champion"], decision["candidate"]) == ("kept", None, 1)
    assert decision["reasons"][0].startswith("not proven better than before training")


def test_the_first_student_that_is_better_than_before_training_is_the_first_champion(nights: list[dict]) -> None:
    decision = nights[2]["nightly"]
    assert (decision["outcome"], decision["champion"], decision["candidate"]) == ("promoted", 2, 2)
    assert decision["reasons"] == ["the first champion"]


def test_a_night_without_change_does_no_model_work_and_says_so(nights: list[dict]) -> None:
    decision = nights[1]["nightly"]
    assert (decision["outcome"], decision["candidate"], decision["champion"]) == ("no change", 1, None)
    assert {stage["outcome"] for stage in nights[1]["stages"]} == {"reused"}


def test_only_new_and_changed_questions_are_answered(nights: list[dict]) -> None:
    responses_by_night = {}
    for night in nights:
        found: dict = {}
        for row in rows(night, "generate", "responses"):
            found.setdefault(row["question_id"], []).append(row)
        responses_by_night[id(night)] = {
            q: sorted(given, key=lambda r: (r["source"], r["sample"])) for q, given in found.items()
        }
    first, _, third, fourth = responses_by_night.values()
    new = third.keys() - first.keys()
    assert len(new) == 8 and stages(nights[2])["generate"]["shards_built"] > 0
    assert {q: third[q] for q in first} == first
    gone, changed = third.keys() - fourth.keys(), [q for q in fourth if fourth[q] != third[q]]
    assert len(gone) == 1 and len(changed) == 1
    # each engine answered one question, and gave the rest of its shard again without the one withdrawn
    assert all(len(responses) == RESPONSES for found in responses_by_night.values() for responses in found.values())


def test_the_champion_answers_no_question_twice(nights: list[dict]) -> None:
    fourth = stages(nights[3])["evaluate-champion"]
    assert (fourth["engines"], fourth["shards_built"]) == (0, 0)
    assert stages(nights[3])["evaluate"]["engines"] == 1  # of the candidate alone


def test_a_worse_student_is_not_promoted(nights: list[dict]) -> None:
    third, fourth = nights[2]["nightly"], nights[3]["nightly"]
    assert fourth["outcome"] == "kept" and fourth["champion"] == third["champion"] != fourth["candidate"]
    assert fourth["regressions"]


@pytest.mark.parametrize(("number", "outcome"), [(0, "kept"), (2, "promoted")])
def test_a_first_champion_is_better_than_before_training_by_the_same_test(
    number: int, outcome: str, nights: list[dict]
) -> None:
    right: dict[str, dict] = {"student-before": {}, "student-after": {}}
    for row in rows(nights[number], "evaluate", "predictions"):
        right.get(row["model"], {})[row["question_id"]] = row["correct"]
    before, after = right.values()
    gained, lost = (sum(a[q] and not b[q] for q in a) for a, b in ((after, before), (before, after)))
    p = sum(comb(gained + lost, k) for k in range(gained, gained + lost + 1)) / 2 ** (gained + lost)
    assert nights[number]["nightly"]["outcome"] == outcome == ("promoted" if p < 0.05 else "kept")


def test_the_decision_follows_from_the_predictions(nights: list[dict]) -> None:
    decision = nights[3]["nightly"]
    comparison = decision["comparison"]
    n = comparison["gained"] + comparison["lost"]
    p = sum(comb(n, k) for k in range(comparison["gained"], n + 1)) / 2**n
    fell = any(c["champion"] - c["candidate"] > 0.05 for c in comparison["categories"].values())
    assert (decision["outcome"] == "promoted") == (p < 0.05 and not fell)
    right = {
        stage: {
            r["question_id"]: r["correct"]
            for r in rows(nights[3], stage, "predictions")
            if r["model"] == "student-after"
        }
        for stage in ("evaluate", "evaluate-champion")
    }
    for kind, better, worse in (("gained", *right), ("lost", *reversed(right))):
        assert comparison[kind] == sum(right[better][q] and not right[worse][q] for q in right["evaluate"])


def test_a_regression_is_reported_once(nights: list[dict], webhook: Webhook) -> None:
    assert nights[2]["reports"] == 0
    report = webhook.reports[-1]
    assert (report["name"], report["status"]) == ("easyvqa", "regression")
    assert "worse than the champion" in report["reason"]


def test_a_night_that_fails_is_reported(tmp_path: Path, prefect: dict[str, str]) -> None:
    path, hook = write_questions(tmp_path / "data", 8, bad=False), Webhook()
    write_rows(tmp_path / "data", [json.loads(line) | dict(answer="") for line in path.read_text().splitlines()])
    values = {"data.source": path, "store.root": tmp_path / "store", "name": "unlucky"}
    environment = {"MASTERS_WEBHOOK_URL": hook.url} | prefect
    done = masters("nightly", "configs/easyvqa.toml", *options(values), home=tmp_path, **environment)
    hook.server.shutdown()
    assert done.returncode != 0 and "Traceback" not in done.stderr
    [report] = hook.reports
    assert (report["name"], report["status"]) == ("unlucky", "failed") and "max_rejected_share" in report["reason"]
