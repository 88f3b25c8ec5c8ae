"""Reports to the webhook, whose URL is shown nowhere."""

import logging

import pytest

from masters.flows import webhook
from tests.flows.test_nightly import Webhook


def test_without_a_url_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(webhook.URL_VARIABLE, raising=False)
    assert webhook.send_report("easyvqa", "failed", "why") is False


def test_the_webhook_receives_name_status_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = Webhook()
    monkeypatch.setenv(webhook.URL_VARIABLE, hook.url)
    assert webhook.send_report("easyvqa", "failed", "the store is away")
    hook.server.shutdown()
    text = "masters easyvqa: failed: the store is away"
    assert hook.reports == [dict(text=text, name="easyvqa", status="failed", reason="the store is away")]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/secret", "http://[secret", "secret"])
def test_a_failure_is_a_warning_without_the_url(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(webhook.URL_VARIABLE, url)
    with caplog.at_level(logging.WARNING):
        assert webhook.send_report("easyvqa", "failed", "why") is False
    assert "did not accept the report" in caplog.text and "secret" not in caplog.text


def test_the_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Webhook()  # takes what is sent to any host
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv(webhook.URL_VARIABLE, "http://hooks.invalid/secret")
    assert webhook.send_report("easyvqa", "failed", "why")
    proxy.server.shutdown()
    assert [report["status"] for report in proxy.reports] == ["failed"]
