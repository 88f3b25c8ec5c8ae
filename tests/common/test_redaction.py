"""Secrets are redacted in errors, logs, webhook messages and parameters of runs."""

import io
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.common.errors import InputError, MastersError, StoreError
from masters.common.log_errors import MARK
from masters.common.redaction import contains_secret, redact, redact_logs
from masters.flows import webhook
from tests.flows.test_nightly import Webhook

SECRET = "wJalrXUtnFEMI/K7MDENG"
VARIABLES = ("AWS_SECRET_ACCESS_KEY", "MASTERS_JUDGE_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD")


@pytest.mark.parametrize("name", VARIABLES)
def test_values_of_secret_variables_are_redacted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    assert redact(f"denied: {SECRET}!") == "denied: ***!"


def test_values_of_other_variables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "masters-demo", "TOKENIZERS_PARALLELISM": "false-value",
        "MASTERS_HOME": "/var/lib/masters", "SOME_TOKEN": "true", "SHORT_SECRET": "abc",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    text = "masters-demo false-value /var/lib/masters true abc"
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:hunter2@db/x failed", "postgresql://***@db/x failed"),
        ("https://token@host/", "https://***@host/"),
        ("GET https://b.s3/x?X-Amz-Signature=ab12&y=1", "GET https://b.s3/x?X-Amz-Signature=***&y=1"),
        ("https://h/x?a=1&token=abc#end", "https://h/x?a=1&token=***#end"),
        ("Authorization: Bearer abcdefghijklmnop123", "Authorization: Bearer ***"),
        ("key AKIAIOSFODNN7EXAMPLE is invalid", "key *** is invalid"),
        ("hf_" + "a" * 34, "***"),
    ],
)
def test_secrets_are_redacted_by_their_form(text: str, expected: str) -> None:
    assert redact(text) == expected and contains_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://lake/team", "http://127.0.0.1:5000/#/experiments/1", "/data/hf_checkpoints_of_2026_long_names",
        "file:///tmp/x?y=1", "sk-learn-models", "the bearer of bad news", "shards/responses/0123456789abcdef.parquet",
        "a@b.example",
    ],
)  # fmt: skip
def test_text_without_secrets_is_kept(text: str) -> None:
    assert redact(text) == text and not contains_secret(text)


@given(st.text(alphabet=st.characters(categories=["L", "N"]), min_size=6), st.text(), st.text())
def test_secrets_are_redacted_anywhere_in_a_text(secret: str, before: str, after: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTERS_JUDGE_API_KEY", f"{secret}-x")
        assert f"{secret}-x" not in redact(f"{before}{secret}-x{after}")


def test_errors_have_no_secrets_and_keep_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    error = InputError(f"store s3://me:{SECRET}@x: {SECRET}")
    assert str(error) == "store s3://***@x: ***" and error.exit_code == 2
    again = pickle.loads(pickle.dumps(StoreError("it failed")))  # as libraries do between processes
    assert isinstance(again, MastersError) and str(again) == "it failed"


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch):
    """A logger and the output of its handler, with redaction as in a run."""
    before, sink = logging.getLogRecordFactory(), io.StringIO()
    handler = logging.StreamHandler(sink)
    logger = logging.getLogger("some.library")
    logger.addHandler(handler)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    redact_logs()
    redact_logs()  # a second call has no effect
    yield logger, sink
    logger.removeHandler(handler)
    logging.setLogRecordFactory(before)


def test_logs_with_arguments_and_tracebacks_are_redacted(logged) -> None:
    logger, sink = logged
    logger.warning("signing with %s for %d rows", SECRET, 3)
    try:
        raise OSError(f"https://me:pass@host refused {SECRET}")
    except OSError:
        logger.exception("it failed")
    assert SECRET not in sink.getvalue() and "pass@" not in sink.getvalue()
    assert "signing with *** for 3 rows" in sink.getvalue()
    assert "OSError: https://***@host refused ***" in sink.getvalue()


def test_the_webhook_gets_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a night may come from any library."""
    hook = Webhook()
    monkeypatch.setenv(webhook.URL_VARIABLE, hook.url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert webhook.send_report("easyvqa", "failed", f"OperationalError: postgresql://me:pw@db: {SECRET}")
    hook.server.shutdown()
    reason = "OperationalError: postgresql://***@db: ***"
    assert [(report["text"], report["reason"]) for report in hook.reports] == [
        (f"masters easyvqa: failed: {reason}", reason)
    ]


def test_the_traceback_of_a_child_process_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is kept, and its last line becomes the error of the run."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    (tmp_path / "job.json").write_text("{}")
    code = (
        "import os, sys\nfrom masters.execution import child_process\n"
        "def main(job): raise RuntimeError('signed with ' + os.environ['AWS_SECRET_ACCESS_KEY'])\n"
        f"sys.argv = ['x', {str(tmp_path / 'job.json')!r}]\nchild_process.child_main(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"{MARK}RuntimeError: signed with ***" and SECRET not in done.stderr
