"""The report of a run: artifacts read back from a real Prefect server, and plots in MLflow."""

import base64
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from mlflow import MlflowClient
from PIL import Image
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import Artifact as Shown
from prefect.context import FlowRunContext, SyncClientContext
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from masters.reporting.gallery import render_gallery
from masters.reporting.markdown import escape_text
from masters.reporting.plots import subsample
from masters.store import tables as schemas
from masters.store.storage import Storage
from masters.tasks import report as reporting
from masters.tasks.data import data
from masters.tasks.mask import mask
from masters.tasks.progress import CONSOLE, LAST_UPDATE_SECONDS, Progress
from masters.tasks.report import report_run
from masters.tasks.run_context import Round, Run
from masters.tasks.train import train
from tests.handmade_run import ROOT, first_round, make_run, write_training_inputs
from tests.scoring_run import write_table
from tests.shape_data import write_questions

HOSTILE = "</td><script>alert(1)</script> | **b** ![x](http://e.example/x) \u202e\x1b[31m"


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        with prefect_test_harness(server_startup_timeout=180):
            yield


@flow
def small(run: Run) -> str:
    """Train on handmade responses and report on the run. Returns the id of the flow run."""
    current = first_round(run)
    questions = data(run)
    inputs = {"data": questions, "masks": mask(run, current)} | write_training_inputs(run, current, questions)
    run.artifacts |= {"generate": inputs["responses"], "score": inputs["verdicts"]}
    train(run, current, inputs)
    report_run(run, None)
    return flow_run_id()


def flow_run_id() -> str:
    context = FlowRunContext.get()
    assert context and context.flow_run
    return str(context.flow_run.id)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Shown]]:
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder / "store", write_questions(folder / "data", 40, bad=False))
    return run, artifacts_of(small(run))


def artifacts_of(flow_run: str) -> dict[str, Shown]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts()
    return {artifact.key or "": artifact for artifact in found if str(artifact.flow_run_id) == flow_run}


def pictures(page: object) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(c))) for c in re.findall(r"data:image/png;base64,([^)]+)", str(page))
    ]


def test_a_run_publishes_its_artifacts(finished) -> None:
    run, shown = finished
    assert shown.keys() == {f"trained-{page}" for page in ("train", "stages", "signal", "plots", "gallery")}
    assert shown["trained-train"].data == 100
    steps = run.stages[-1]["steps"]
    assert f"{steps} of {steps} steps, loss " in str(shown["trained-train"].description)
    assert [line in str(shown["trained-stages"].data) for line in ("data", "mask", "train")] == [True] * 3
    assert "**Warning**" not in str(shown["trained-plots"].data)
    assert "no advantage" in str(shown["trained-signal"].data) and "90%" in str(shown["trained-signal"].data)


def test_training_warnings_are_shown_above_the_plots(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    run, pages = finished[0], []
    monkeypatch.setattr(reporting, "create_markdown_artifact", lambda page, key: pages.append(page))
    monkeypatch.setitem(run.artifacts["train"].facts, "warnings", [dict(step=3, name="entropy", text="it fell <b>")])
    reporting._create_plots(run, "", [run.artifacts["train"]])
    assert pages[0].startswith("**Warning**, step 3: ") and "it fell" in pages[0] and "<b>" not in pages[0]


def test_plots_are_not_empty_and_are_also_in_mlflow(finished) -> None:
    run, shown = finished
    drawn = pictures(shown["trained-plots"].data)
    assert len(drawn) == 4
    for image in drawn:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20  # axes alone are shades of gray
    client = MlflowClient(run.tracker.uri)
    listed = {file.path for file in client.list_artifacts(run.tracker.run_id, "figures")}
    assert listed == {f"figures/{name}.png" for name in ("training", "diagnostics", "rewards", "divergences")}


@flow
def rounds(run: Run, responses: bool) -> str:
    """Train a round per teacher, on handmade responses if the objective needs them, and report on the run."""
    questions, student = data(run), run.resources.student
    for number, (teacher, model) in enumerate(zip(run.config.teachers, run.resources.teachers, strict=True), 1):
        current = Round(number, teacher, model, student)
        inputs = {"data": questions, "masks": mask(run, current)}
        if responses:
            inputs["responses"] = run.artifacts[f"generate{current.suffix}"] = write_training_inputs(
                run, current, questions
            )["responses"]
        student = run.load_student(train(run, current, inputs))
    report_run(run, None)
    return flow_run_id()


TEACHER = dict(model=str(ROOT / "demo/models/teacher"), r_max=0.2, mask_step=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "teachers", "drawn"),
    [
        (
            "kd",
            [TEACHER | dict(model=str(ROOT / "demo/models/student")), TEACHER],
            ["training", "diagnostics", "divergences"],
        ),
        ("sft", [TEACHER], ["training"]),
    ],
)
def test_artifacts_for_other_objectives_and_a_second_teacher(
    objective: str, teachers: list[dict], drawn: list[str], tmp_path: Path
) -> None:
    """Rewards, divergences or responses that an objective does not use have no plot and no page."""
    source, targets = write_questions(tmp_path / "data", 12, bad=False), "labels" if objective == "sft" else "responses"
    run = make_run(tmp_path / "store", source, teachers=teachers, train=dict(objective=objective, targets=targets))
    shown = artifacts_of(rounds(run, targets == "responses"))
    suffixes = ["", "-2"][: len(teachers)]
    pages = {f"trained-{page}{suffix}" for page in ("train", "plots") for suffix in suffixes} | {"trained-stages"}
    galleries = {f"trained-gallery{suffix}" for suffix in suffixes if targets == "responses"}
    assert shown.keys() == pages | galleries
    client = MlflowClient(run.tracker.uri)
    for suffix in suffixes:
        found = pictures(shown[f"trained-plots{suffix}"].data)
        assert len(found) == len(drawn)
        assert all(len(image.convert("RGB").getcolors(1 << 24) or []) > 20 for image in found)
        listed = {file.path for file in client.list_artifacts(run.tracker.run_id, f"figures{suffix}")}
        assert listed == {f"figures{suffix}/{name}.png" for name in drawn}
    for page in galleries:
        assert "**no verdict**" in str(shown[page].data) and escape_text("red circle") in str(shown[page].data)


def test_the_gallery_agrees_with_the_tables(finished) -> None:
    run, shown = finished
    page = str(shown["trained-gallery"].data)
    assert page == render_gallery(
        run.artifacts["data"], [run.artifacts["generate"]], [run.artifacts["score"]], [run.artifacts["train"]]
    )
    assert len(pictures(page)) == page.count("reference answer") == 2  # by hand every question is right in part
    said = [line.split(" | ") for line in page.splitlines() if line.startswith("| student")]
    assert [(row[1], row[-1]) for row in said] == [("1", f"{escape_text('red circle')} |")] * 2
    rewards = {(r["question_id"], r["source"]): r for r in run.artifacts["train"].rows("rewards")}
    for question in re.findall("question \u2068(q\\d+)\u2069", page):
        assert f"| {rewards[question, 'student']['divergence']:.3g} |" in page


def test_the_gallery_shows_every_kind_of_question_and_escapes_text(tmp_path: Path) -> None:
    storage, sink = Storage(str(tmp_path)), io.BytesIO()
    Image.new("RGB", (300, 20), "red").save(sink, "png")
    scores = {"good": (1.0, 1.0), "mixed": (1.0, 0.0), "bad": (0.0, 0.0), "unknown": (None, None)}
    key = dict(source="teacher", mask_ratio=0.2)
    questions, said, verdicts = [], [], []
    for number, (name, found) in enumerate(scores.items()):
        both = dict(question=HOSTILE, answer=HOSTILE, question_id=name, image=sink.getvalue())
        questions.append(both | dict(question_digest=f"{number:064x}", split="train"))
        for sample, score in enumerate(found):
            own = key | dict(question_id=name, sample=sample)
            said.append(own | dict(text=f"{sample} {HOSTILE}"))
            verdicts.append(own | dict(score=score, status="judge_failed" if score is None else "ok"))
    tables = [
        write_table(storage, "questions", [questions], schemas.QUESTIONS),
        write_table(storage, "responses", [said], schemas.RESPONSES),
        write_table(storage, "verdicts", [verdicts], schemas.VERDICTS),
    ]
    questions, *rest = tables
    page = render_gallery(questions, *([one] for one in rest))
    for kind in ("every response right", "some right", "none right", "no verdict"):
        assert page.count(f"**{kind}**") == 1
    assert "<script>" not in page and "\x1b" not in page and "\u202e" not in page
    assert page.count("![") == 4 and all(image.size == (160, 11) for image in pictures(page))
    rows = [line for line in page.splitlines() if line.startswith("| teacher")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9} and len(rows) == 8
    assert page.count("judge\\_failed") == 2


def test_a_failed_report_does_not_fail_the_run(finished, monkeypatch, capsys) -> None:
    def broken(*_: object) -> None:
        raise OSError("no space left")

    run, _ = finished
    with monkeypatch.context() as patch:
        patch.setattr(reporting, "plot_training", broken)
        state = small(run, return_state=True)
    assert state.is_completed()
    assert "warning: the run's report is incomplete: OSError: no space left" in capsys.readouterr().err
    assert "trained-stages" in artifacts_of(state.result())  # what came before is there


@task
def update_progress(updates: int, seconds: float) -> float:
    began = time.monotonic()
    with Progress(CONSOLE, "Big_run", "generate", "questions") as progress:
        for done in range(updates):
            progress.update(done + 1, updates, f"{done + 1} shards")
            time.sleep(seconds / updates)
    return time.monotonic() - began


def test_progress_updates_are_throttled(monkeypatch) -> None:
    from masters.tasks import progress

    sent, send = [], progress._send
    monkeypatch.setattr(progress, "_send", lambda *state: sent.append(state) or send(*state))

    @flow
    def many() -> str:
        update_progress(10_000, 3)
        return flow_run_id()

    shown = artifacts_of(many())["big-run-generate"]
    assert shown.data == 100 and shown.description == "10,000 of 10,000 questions, 10000 shards"
    assert 2 <= len(sent) <= 4


def test_an_unreachable_server_neither_fails_nor_delays_a_stage() -> None:
    """Nothing listens at the address of the updates, and Prefect's client retries with growing pauses."""

    @task
    def update_unreachable() -> float:
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
            SyncClientContext.__var__.set(None)  # else the task's own client is taken, which reaches the server
            return update_progress.fn(10, 1)

    @flow
    def away() -> tuple[str, float]:
        return flow_run_id(), update_unreachable()

    flow_run, seconds = away()
    assert seconds < 60 + LAST_UPDATE_SECONDS
    assert artifacts_of(flow_run) == {}  # nothing came through


def test_a_sample_is_every_nth_row_across_batches() -> None:
    whole = pa.table({"n": list(range(1000))})
    for size in (1, 7, 300, 1000):
        part, stride = subsample((whole.slice(at, size) for at in range(0, 1000, size)), 150)
        assert (stride, part["n"].to_pylist()) == (8, list(range(0, 1000, 8)))
