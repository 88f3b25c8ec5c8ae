"""Fuzz tests of the parsers: they raise only the errors that they document."""

import io
import json
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from masters.common.errors import InputError
from masters.config import loading
from masters.config.judge_url import api_base_url
from masters.config.loading import load, override_values
from masters.data.row_validation import RejectedRow, validate_rows
from masters.data.sources.base import COLUMNS
from masters.data.sources.files import JsonlSource
from masters.rewards.judge import JudgeReply, judge_triples
from masters.rewards.verdict import Triple

DEMO = Path(__file__).parents[2] / "configs" / "easyvqa.toml"
KEYS = [
    f"{section}.{name}" if section not in ("name", "teachers") else section
    for section, value in load(DEMO).model_dump().items()
    for name in (value if isinstance(value, dict) else [section])
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(2**62, 2**80), st.floats(), st.text(),
    st.sampled_from(["teacher", "1e999", "-0", "nan", "../x", "/", "\0", "http://[", "http://a:99999999", "s3://"]),
)  # fmt: skip
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
LINES = st.one_of(
    st.binary(),
    JSON.map(json.dumps).map(str.encode),
    st.fixed_dictionaries({}, optional=dict.fromkeys(COLUMNS, JSON)).map(json.dumps).map(str.encode),
)  # fmt: skip
FRAGMENTS = st.sampled_from(
    ["<answer>", "</answer>", "0", "1", "0.5", "-1", "2", "NaN", "<ANSWER>", "\n", " ", "<", ">", "\u0661", "\0", "."]
)
REPLIES = st.one_of(st.text(), st.lists(FRAGMENTS, max_size=12).map("".join))


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_config_files_of_any_bytes_raise_only_input_errors(content: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch, suppress(InputError):
        patch.setattr(loading, "open", lambda path, mode: io.BytesIO(content), raising=False)
        load("x.toml")


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KEYS) | st.text(max_size=20), st.one_of(st.text(max_size=40), JSON.map(json.dumps)))
def test_any_override_raises_only_input_errors(key: str, value: str) -> None:
    try:
        load(DEMO, [f"{key}={value}"])
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KEYS), JSON)
def test_form_and_grid_values_raise_only_input_errors(key: str, value: object) -> None:
    with suppress(InputError):
        override_values(load(DEMO), {key: value})


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(LINES, min_size=1, max_size=5))
def test_any_jsonl_line_is_a_question_or_a_rejection(tmp_path: Path, lines: list[bytes]) -> None:
    """Every line that is not blank becomes a question or a rejection with a reason."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    with suppress(InputError):
        source = JsonlSource(path)
        source.digest()
        found = list(validate_rows(source))
        assert len(found) == sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
        for row in found:
            assert isinstance(row, RejectedRow) and row.reason, row  # there are no image files
            row.id.encode(), row.reason.encode(errors="surrogatepass")


class ScriptedJudge:
    """A judge client that gives one reply to all conversations of a call."""

    def __init__(self, *calls: str) -> None:
        self.calls = list(calls)

    def ask(self, conversations: list, max_tokens: int) -> list[JudgeReply]:
        return [JudgeReply(self.calls.pop(0))] * len(conversations) if conversations else []


@settings(max_examples=500)
@given(REPLIES, REPLIES)
def test_any_judge_output_is_a_verdict_or_a_status(first: str, second: str) -> None:
    """A score is 0 or 1 only if both replies agree on it; any other pair of replies gives no verdict."""
    (found,) = judge_triples(ScriptedJudge(first, second), [Triple("q", "a", "t")])
    if found.status == "ok":
        assert found.score in (0.0, 1.0) and second.strip() == str(int(found.score))
        assert first.rstrip().endswith(("</answer>",)) and str(int(found.score)) in first
    else:
        assert found.score is None and found.status == "parse_failed"


@settings(max_examples=300)
@given(st.text(max_size=60).map(lambda text: f"http://{text}") | st.text(max_size=60))
def test_accepted_judge_urls_are_valid_for_the_client(url: str) -> None:
    with suppress(InputError):
        base = api_base_url(url)
        assert base.isprintable()
        httpx.URL(base)
