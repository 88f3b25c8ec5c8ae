"""What a night makes of its candidate, on versions in real MLflow: promoted, kept, rolled back, told once."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from masters.common.errors import InputError, TrackingError
from masters.evaluation.promotion_gate import Comparison
from masters.flows import nightly as nights
from masters.flows.nightly import apply_gate, nightly, report_regression
from masters.store import locks
from masters.store.storage import Storage
from masters.tracking.registry import Registry
from tests.flows.test_nightly import Webhook
from tests.tracked_run import NAME, configured, registered

BETTER = Comparison(100, 100, 0.9, 0.5, 40, 0, 1e-9, {})
WORSE = Comparison(100, 100, 0.5, 0.9, 0, 40, 1.0, {})


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Two versions; nobody is champion."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    storage = Storage(str(tmp_path / "store"))
    registered(storage, b"first")
    tracker, _ = registered(storage, b"second")
    return tracker.registry


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    hook = Webhook()
    monkeypatch.setenv("MASTERS_WEBHOOK_URL", hook.url)
    yield hook
    hook.server.shutdown()


def verdict(registry: Registry, version: int, found: Comparison, built: bool, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What a night says that made this version, whose answers against the champion's are as given."""
    monkeypatch.setattr(nights, "compare_with_champion", lambda *_: found)
    number = registry.champion(NAME)
    champion = SimpleNamespace(version=number) if number else None
    stages = [dict(outcome="built" if built else "reused")]
    run = SimpleNamespace(tracker=SimpleNamespace(registry=registry), config=configured("/s"), stages=stages)
    return apply_gate(run, SimpleNamespace(version=version), champion)  # pyright: ignore[reportArgumentType]


def test_what_was_rolled_back_stays_so_until_a_person_promotes_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote(NAME, 1)
    assert verdict(registry, 2, BETTER, True, monkeypatch)["outcome"] == "promoted"
    assert registry.rollback(NAME) == (2, 1)
    told = verdict(registry, 2, BETTER, True, monkeypatch)
    assert (told["outcome"], told["champion"], registry.champion(NAME)) == ("kept", 1, 1)
    assert "version 2 was rolled back" in told["reasons"][0] and "--to 2" in told["reasons"][0]
    registry.rollback(NAME, 2)
    registry.rollback(NAME, 1)
    registry.rollback(NAME, 2)
    assert not registry.was_rolled_back(NAME, 2) and registry.was_rolled_back(NAME, 1)


def test_without_the_alias_a_past_champion_is_no_first_one(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(registry, 1, BETTER, True, monkeypatch)["reasons"] == ["the first champion"]
    MlflowClient(registry.uri).delete_registered_model_alias(NAME, "champion")
    told = verdict(registry, 2, BETTER, True, monkeypatch)
    assert (told["outcome"], registry.champion(NAME), registry.champion_history(NAME)) == ("kept", None, [1])
    with pytest.raises(InputError, match="no champion to roll back; name a version"):
        registry.rollback(NAME)
    assert registry.rollback(NAME, 1) == (None, 1) and registry.champion(NAME) == 1


def test_an_mlflow_that_is_away_is_no_missing_champion(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.promote(NAME, 1)

    def away(*_: object, **__: object) -> None:
        raise MlflowException("the database is away")

    for name in dir(MlflowClient):
        if name.startswith(("get_", "search_")):
            monkeypatch.setattr(MlflowClient, name, away)
    with pytest.raises(TrackingError, match="away"):
        registry.champion(NAME)
    with pytest.raises(TrackingError, match="away"):
        verdict(registry, 2, WORSE, True, monkeypatch)
    monkeypatch.undo()
    assert (registry.champion(NAME), registry.champion_history(NAME)) == (1, [1])


def test_names_that_no_query_can_hold_are_no_models(registry: Registry) -> None:
    assert registry.version_of_alias("a'b", "champion") is None and not registry.has("a'b")


def test_a_regression_is_told_once_also_by_the_night_after_one_cut_short(
    registry: Registry, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote(NAME, 1)
    assert verdict(registry, 2, WORSE, True, monkeypatch)["outcome"] == "kept"  # and cut short before it is told
    for _ in range(2):
        told = verdict(registry, 2, WORSE, False, monkeypatch)
        assert told["outcome"] == "no change" and told["regressions"]
        report_regression(registry, NAME, told)
    assert [said["status"] for said in webhook.said] == ["regression"]
    other = told | dict(regressions=["worse than the champion: 10.00% against 90.00%"])
    report_regression(registry, NAME, other)
    assert len(webhook.said) == 2


def test_a_verdict_that_was_cut_short_is_news(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.promote(NAME, 1)
    assert verdict(registry, 2, WORSE, False, monkeypatch)["outcome"] == "kept"


def test_a_regression_that_no_webhook_took_is_told_the_next_time(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote(NAME, 1)
    told = verdict(registry, 2, WORSE, True, monkeypatch)
    monkeypatch.setenv("MASTERS_WEBHOOK_URL", "http://127.0.0.1:1/away")
    report_regression(registry, NAME, told)
    assert registry.reported_regression(NAME, 2) == ""


def test_a_failing_night_reaches_the_webhook(tmp_path: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError):
        nightly.fn(configured(tmp_path, mlflow_uri="http://127.0.0.1:9"))
    assert [(said["name"], said["status"]) for said in webhook.said] == [(NAME, "failed")]
    assert "does not answer" in webhook.said[0]["reason"]


def test_a_crashed_night_reaches_the_webhook(webhook: Webhook) -> None:
    assert nights.report_crash in (nightly.on_crashed_hooks or [])
    run = SimpleNamespace(name="easy", run_count=2, parameters=dict(config=configured("/s").model_dump()))
    nights.report_crash(nightly, run, SimpleNamespace(message="exit code -9"))  # pyright: ignore[reportArgumentType]
    assert webhook.said[0]["status"] == "crashed" and "attempt 2 of the night easy" in webhook.said[0]["reason"]


def test_two_nights_of_a_name_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    class Waits(Exception):
        pass

    def waits() -> None:
        raise Waits

    with locks.machine_lock("night a", waits), locks.machine_lock("night b", waits):
        with pytest.raises(Waits), locks.machine_lock("night a", waits):
            pass
    with locks.machine_lock("night a", waits):
        pass


def test_models_of_others_in_the_same_mlflow_are_left_alone(registry: Registry) -> None:
    client = MlflowClient(registry.uri)
    client.create_registered_model("team.fraud model's")
    client.create_model_version("team.fraud model's", "s3://theirs", tags={"upstream.mask": "f"})
    client.set_registered_model_alias("team.fraud model's", "champion", "1")
    before = registry.protected_artifacts()
    registry.promote(NAME, 1)
    assert len(registry.protected_artifacts()) >= len(before) and registry.versions_made_from("f") == []


def test_a_first_promotion_that_was_cut_short_is_made_up_for(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(MlflowException):
        patch.setattr(registry._client, "set_registered_model_alias", lambda *_: refuse())
        registry.promote(NAME, 1)
    assert registry.champion_history(NAME) == [1] and registry.champion(NAME) is None
    told = verdict(registry, 2, BETTER, True, monkeypatch)
    assert (told["outcome"], told["reasons"]) == ("promoted", ["the first champion"])
    assert registry.champion(NAME) == 2


def refuse() -> None:
    raise MlflowException("away")
