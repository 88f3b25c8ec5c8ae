"""A stack on Postgres and S3 as its users see it: nights as runs of their deployment, and both UIs in a real browser.

Nights follow each other in order; the champion, once there, is the next student. In the browser a distillation is
started from its form, watched, looked at, and traced to its questions. With MASTERS_SCREENSHOTS set to a folder, what
was seen is kept there.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from masters.infra.api import post
from masters.store.artifacts import Artifact, load
from masters.store.storage import Storage
from tests.local_stack import Stack, serve
from tests.shape_data import write_questions, write_rows
from tests.weak_student import write_weak_student

pytestmark = pytest.mark.slow
PREFIX, NAME, NEW = "s3://lake/nights", "nights", 16
NEEDED = "a browser is needed: install chromium"
SECONDS = 60_000  # milliseconds that a page may take on a busy machine


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with serve() as running:
        write_weak_student(running.folder / "student")
        yield running


@pytest.fixture(scope="module")
def rows(stack: Stack) -> list[dict]:
    path = write_questions(stack.folder / "data", 80)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def early(rows: list[dict]) -> list[dict]:
    """Write the questions without the last training rows."""
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
        student=dict(model=str(stack.folder / "student")),
        teachers=[dict(model="demo/models/teacher", r_max=0.2, mask_step=0.2)],
        generate=dict(responses=2, max_tokens=8, dtype="float32"), rewards=dict(accuracy="rules"),
        train=dict(learning_rate=2e-4, questions_per_step=4), runtime=dict(max_model_len=512),
        nightly=dict(start="champion", p_value=0.2),  # few questions
    )  # fmt: skip


def night(stack: Stack, store: Storage, given: list[dict]) -> dict:
    """Return the summary of a night on these rows."""
    write_rows(stack.folder / "data", given)
    run = stack.start("nightly", config=config(stack))
    stack.complete(run)
    summary = json.loads(store.read("summary.json"))
    assert summary["prefect"]["flow_run_id"] == run
    return summary


def champion(stack: Stack) -> int:
    """Return the version that has the alias in MLflow."""
    asked = dict(name=NAME, alias="champion")
    found = httpx.get(f"{stack.urls['mlflow_url']}/api/2.0/mlflow/registered-models/alias", params=asked, timeout=60)
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


def test_a_night_without_new_rows_does_no_model_work(
    stack: Stack, first: dict, early: list[dict], store: Storage
) -> None:
    """The champion is trained on rows that are new to it: without any, the night ends after the data stage."""
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


def test_lineage_includes_the_champion(stack: Stack, first: dict, third: dict, store: Storage) -> None:
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
        f"{stack.urls['mlflow_url']}/api/2.0/mlflow/model-versions/get", params=dict(name=NAME, version="2"), timeout=60
    ).json()["model_version"]
    trained = next(s["mlflow_run_id"] for s in first["stages"] if s["name"] == "train")
    assert f"/runs/{trained})" in version["description"].partition("earlier runs")[2]


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    program = shutil.which("chromium")
    assert program, NEEDED
    with sync_playwright() as browsers:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = browsers.chromium.launch(executable_path=program, args=arguments)
        page = browser.new_page(viewport=dict(width=1400, height=1000))
        page.set_default_timeout(SECONDS)
        expect.set_options(timeout=SECONDS)
        yield page
        browser.close()


def seen(page: Page, name: str) -> None:
    if folder := os.environ.get("MASTERS_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def named(page: Page, name: str, nth: int = 0) -> Locator:
    """Return the innermost field of the form with this label."""
    label = page.locator(".p-label__label").get_by_text(name, exact=True)
    inner = page.locator("div.schema-form-property:not(:has(div.schema-form-property))")
    return inner.filter(has=label).nth(nth)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tablist").get_by_text(name, exact=True).click()


def choose(page: Page, name: str, value: str) -> None:
    named(page, name).locator(".p-select button").first.focus()
    page.keyboard.press("Space")
    page.locator(".p-select-options").get_by_text(value, exact=True).click()


@pytest.fixture(scope="module")
def run(stack: Stack, page: Page) -> str:
    """A run of `distill`, started from its form; its id."""
    deployment = post(f"{stack.api}/deployments/filter", {"deployments": {"name": {"any_": ["distill"]}}})[0]
    page.goto(f"{stack.urls['prefect_url']}/deployments/deployment/{deployment['id']}/run")
    source = write_questions(stack.folder / "seen", 16, bad=False)
    given = {"Name": "seen", "Root": "s3://lake/seen", "Source": str(source), "Model": "demo/models/student"}
    for name, value in given.items():
        named(page, name).locator("textarea").fill(value)
    teachers = page.locator(".p-label__label").get_by_text("Teachers", exact=True)
    page.locator("div.schema-form-property").filter(has=teachers).last.get_by_text("Add item").click()
    named(page, "Model", 1).locator("textarea").fill("demo/models/teacher")
    choose(page, "Dtype (Optional)", "float32")
    choose(page, "Accuracy (Optional)", "rules")
    for name, value in {"Max Model Len": "512", "Max Tokens": "8", "Responses": "2"}.items():
        named(page, f"{name} (Optional)").locator("input").fill(value)
    page.get_by_text("The configuration, with the same keys").scroll_into_view_if_needed()
    seen(page, "form")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url(re.compile(r"tab=Runs"))
    found = post(f"{stack.api}/flow_runs/filter", {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}})
    assert len(found) == 1
    return found[0]["id"]


def test_a_run_started_from_the_form_is_watched_to_its_end(stack: Stack, page: Page, run: str) -> None:
    page.goto(f"{stack.urls['prefect_url']}/runs/flow-run/{run}")
    tab(page, "Task Runs")
    expect(page.get_by_role("link", name="generate").first).to_be_visible(timeout=2 * SECONDS)
    stack.complete(run)
    page.reload()
    expect(page.get_by_text("Completed").first).to_be_visible()
    seen(page, "run")
    tab(page, "Task Runs")
    expect(page.get_by_role("link", name="register").first).to_be_visible()


def test_its_artifacts_open(stack: Stack, page: Page, run: str) -> None:
    page.goto(f"{stack.urls['prefect_url']}/runs/flow-run/{run}")
    tab(page, "Artifacts")
    for key in ("seen-result", "seen-plots", "seen-gallery", "seen-mlflow-run"):
        expect(page.get_by_text(key).first).to_be_visible()
    found = post(f"{stack.api}/artifacts/filter", {"artifacts": {"key": {"any_": ["seen-gallery"]}}})
    page.goto(f"{stack.urls['prefect_url']}/artifacts/artifact/{found[0]['id']}")
    expect(page.locator("img[src^='data:image']").first).to_be_visible()
    seen(page, "gallery")


def clicked(page: Page, stage: str) -> Page:
    """Return the page that a stage's link in the version's description opens."""
    with page.expect_popup() as opened:
        page.get_by_test_id("note-editor-preview-content").get_by_role("link", name=stage, exact=True).click()
    return opened.value


def test_links_lead_from_the_registered_model_to_the_questions(stack: Stack, page: Page, run: str) -> None:
    page.goto(f"{stack.urls['mlflow_url']}/#/models/seen/versions/1")
    expect(page.get_by_text("built by its stages")).to_be_visible()
    seen(page, "version")
    train = clicked(page, "train")
    expect(train.get_by_text("masters.mask_schedule").or_(train.get_by_text("probe_accuracy")).first).to_be_visible()
    seen(train, "train")
    questions = clicked(page, "data")
    questions.get_by_text(re.compile(r"^\+\d$")).first.click()
    expect(questions.get_by_text(re.compile("^questions")).first).to_be_visible()
    seen(questions, "questions")


def test_the_command_line_shows_the_same_lineage(stack: Stack, run: str) -> None:
    environment = stack.environment | stack.client_environment()
    told = Stack(stack.folder, environment, stack.urls).masters("lineage", "seen", "--json")
    assert told.returncode == 0 and '"verified": true' in told.stdout.splitlines()[-1], told.stderr
