"""Both UIs in a real browser: a distillation started from the form, watched, looked at, and traced to its questions.

With MASTERS_SCREENSHOTS set to a folder, what was seen is kept there.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from masters.infra.api import post
from tests.drawn import write_questions
from tests.stack import Stack, serve

pytestmark = [pytest.mark.slow, pytest.mark.stack]
NEEDED = "a browser is needed: install chromium"
SECONDS = 60_000  # milliseconds that a page may take on a busy machine


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


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with serve() as running:
        write_questions(running.folder / "data", 16, bad=False)
        yield running


def seen(page: Page, name: str) -> None:
    if folder := os.environ.get("MASTERS_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def named(page: Page, name: str, nth: int = 0) -> Locator:
    """The innermost field of the form with this label."""
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
    source = stack.folder / "data/questions.jsonl"
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
    page.get_by_text("What a TOML file holds").scroll_into_view_if_needed()
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
    """The page that a stage's link in the version's description opens."""
    with page.expect_popup() as opened:
        page.get_by_test_id("note-editor-preview-content").get_by_role("link", name=stage, exact=True).click()
    return opened.value


def test_from_the_registered_model_one_clicks_to_the_questions(stack: Stack, page: Page, run: str) -> None:
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


def test_the_command_line_tells_the_same_chain(stack: Stack, run: str) -> None:
    environment = stack.environment | stack.client_environment()
    told = Stack(stack.folder, environment, stack.urls).masters("lineage", "seen", "--json")
    assert told.returncode == 0 and '"verified": true' in told.stdout.splitlines()[-1], told.stderr
