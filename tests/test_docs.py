"""The documentation builds, its reference is complete and up to date, and what it links and names exists."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from masters.config import Answers, Config
from masters.config.loading import flatten, load
from masters.data.split_names import SPLIT_NAMES
from masters.rewards.verifiers import open_verifier
from masters.store import tables

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("demo/models/*/README.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_PATH = re.compile(
    r"`((?:benchmarks|configs|demo|docs|examples|flows|infra|models|rewards|src|tasks|tests)/[\w./-]+)`"
)


@pytest.fixture(scope="module")
def generator():
    """The script `docs/gen_reference.py` as a module."""
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("gen_reference", DOCS / "gen_reference.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
    return module


def test_reference_is_up_to_date(generator):
    stale = [name for name, text in generator.pages().items() if (DOCS / "reference" / name).read_text() != text]
    assert not stale, "run `make docs` and commit docs/reference"


def test_every_configuration_key_is_in_the_reference(generator):
    sections = re.split(r"^## (?:`\[+([a-z.]+)\]+`)?", generator.configuration(), flags=re.M)
    pages = {name or "": page for name, page in zip(sections[3::2], sections[4::2], strict=True)}
    pages[""] = sections[2]
    config = load(ROOT / "configs/demo.toml").model_dump()
    keys = flatten({**config, "teachers": config["teachers"][0]})
    assert len(keys) > 60 and set(config) == set(Config.model_fields)
    for key in keys:
        section, _, name = key.rpartition(".")
        assert f"| `{name}` |" in pages[section], key


def test_every_table_column_is_in_the_reference(generator):
    assert not generator.undescribed_tables()
    text = generator.table_columns()
    for constant in generator.TABLES:
        for name in getattr(tables, constant).names:
            assert f"| `{name}` |" in text


def test_every_description_of_a_column_is_used(generator):
    described = {(table, name) for table in generator.TABLES for name in getattr(tables, table).names}
    for key in generator.COLUMNS:
        table, _, name = key.rpartition(".")
        assert (table, name) in described if table else any(name == column for _, column in described), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_linked_files_exist(page):
    for link in LINK.findall(page.read_text()):
        if not link.startswith(("http:", "https:", "#", "mailto:")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(page):
    for path in CODE_PATH.findall(page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_recipes_are_valid_configurations():
    recipes = sorted((ROOT / "configs/recipes").glob("*.toml"))
    assert recipes
    for recipe in recipes:
        load(recipe)


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=environment, check=True,
    )  # fmt: skip
    assert "train.learning_rate" in (tmp_path / "search/search_index.json").read_text()
    assert "jensen_shannon" in (tmp_path / "python/index.html").read_text()


def test_examples_of_compared_answers_hold():
    page = (DOCS / "own-data.md").read_text()
    row = r"^\| `([^|]+)` \| `([^|]+)` \|((?: (?:yes|no) \|){4})$"
    examples = re.findall(row, page, flags=re.M)
    assert len(examples) >= 10
    for number, verifier in enumerate(("exact", "final", "number", "choice")):
        with open_verifier(Answers(verifier=verifier)) as is_right:
            for response, reference, verdicts in examples:
                stated = verdicts.replace("|", " ").split()[number]
                assert is_right(response, [reference]) == (stated == "yes"), (verifier, response, reference)


def test_documented_names_of_splits_are_those_of_the_code():
    page = (DOCS / "own-data.md").read_text()
    for label, split in (("training", "train"), ("evaluation", "test")):
        assert f"| {label} | {', '.join(SPLIT_NAMES[split])} |" in page
