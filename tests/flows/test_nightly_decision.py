"""A night applies the gate's decision to versions in a real MLflow, and reports regressions once."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from masters.common.errors import InputError, TrackingError
from masters.evaluation.candidate_comparison import Comparison
from masters.flows import nightly as nights
from masters.flows.nightly import apply_gate, nightly, report_regression
from masters.store import locks
from masters.store.storage import Storage
from masters.tracking.registry import Registry
from tests.flows.test_nightly import Webhook
from tests.tracked_run import NAME, make_config, write_run

BETTER = Comparison(100, 100, 0.9, 0.5, 40, 0, 1e-9, {})
WORSE = Comparison(100, 100, 0.5, 0.9, 0, 40, 1.0, {})


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Return a registry with two versions and no champion."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    storage = Storage(str(tmp_path / "store"))
    write_run(storage, b"first")
    tracker, _ = write_run(storage, b"second")
    return tracker.registry


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    hook = Webhook()
    monkeypatch.setenv("MASTERS_WEBHOOK_URL", hook.url)
    yield hook
    hook.server.shutdown()


def decide_on(
    registry: Registry,
    version: int,
    comparison: Comparison,
    built: bool,
    monkeypatch: pytest.MonkeyPatch,
    with_untrained: Comparison = BETTER,
) -> dict:
    """Apply the gate to a candidate whose comparisons are given. Returns the summary's entry."""
    monkeypatch.setattr(nights, "compare_with_champion", lambda *_: comparison)
    monkeypatch.setattr(nights, "compare_with_untrained", lambda _: with_untrained)
    number = registry.champion(NAME)
    champion = SimpleNamespace(version=number) if number else None
    stages = [dict(outcome="built" if built else "reused")]
    run = SimpleNamespace(tracker=SimpleNamespace(registry=registry), config=make_config("/s"), stages=stages)
    decision = apply_gate(run, SimpleNamespace(version=version), champion)  # pyright: ignore[reportArgumentType]
    return decision.as_dict()


def test_a_rolled_back_version_is_only_promoted_by_a_person(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote(NAME, 1)
    assert decide_on(registry, 2, BETTER, True, monkeypatch)["outcome"] == "promoted"
    assert registry.rollback(NAME) == (2, 1)
    night = decide_on(registry, 2, BETTER, True, monkeypatch)
    assert (night["outcome"], night["champion"], registry.champion(NAME)) == ("kept", 1, 1)
    assert "version 2 was rolled back" in night["reasons"][0] and "--to 2" in night["reasons"][0]
    registry.rollback(NAME, 2)
    registry.rollback(NAME, 1)
    registry.rollback(NAME, 2)
    assert not registry.was_rolled_back(NAME, 2) and registry.was_rolled_back(NAME, 1)


def test_a_student_that_learned_nothing_is_not_the_first_champion(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = decide_on(registry, 1, BETTER, True, monkeypatch, with_untrained=WORSE)
    assert (night["outcome"], night["champion"], registry.champion(NAME)) == ("kept", None, None)
    assert decide_on(registry, 1, BETTER, False, monkeypatch, with_untrained=WORSE)["outcome"] == "no change"
    assert decide_on(registry, 2, BETTER, True, monkeypatch)["reasons"] == ["the first champion"]


def test_a_model_without_champion_gets_no_second_first(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide_on(registry, 1, BETTER, True, monkeypatch)["reasons"] == ["the first champion"]
    MlflowClient(registry.uri).delete_registered_model_alias(NAME, "champion")
    night = decide_on(registry, 2, BETTER, True, monkeypatch)
    assert (night["outcome"], registry.champion(NAME), registry.champion_history(NAME)) == ("kept", None, [1])
    with pytest.raises(InputError, match="no champion to roll back; name a version"):
        registry.rollback(NAME)
    assert registry.rollback(NAME, 1) == (None, 1) and registry.champion(NAME) == 1


def test_an_unreachable_mlflow_is_not_a_missing_champion(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.promote(NAME, 1)

    def away(*_: object, **__: object) -> None:
        raise MlflowException("the database is away")

    for name in dir(MlflowClient):
        if name.startswith(("get_", "search_")):
            monkeypatch.setattr(MlflowClient, name, away)
    with pytest.raises(TrackingError, match="away"):
        registry.champion(NAME)
    with pytest.raises(TrackingError, match="away"):
        decide_on(registry, 2, WORSE, True, monkeypatch)
    monkeypatch.undo()
    assert (registry.champion(NAME), registry.champion_history(NAME)) == (1, [1])


def test_names_with_quotes_are_not_models(registry: Registry) -> None:
    assert registry.version_of_alias("a'b", "champion") is None and not registry.has("a'b")


def test_a_regression_is_reported_once_even_if_a_night_was_interrupted(
    registry: Registry, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote(NAME, 1)
    assert decide_on(registry, 2, WORSE, True, monkeypatch)["outcome"] == "kept"  # and interrupted before the report
    for _ in range(2):
        night = decide_on(registry, 2, WORSE, False, monkeypatch)
        assert night["outcome"] == "no change" and night["regressions"]
        report_regression(registry, NAME, night)
    assert [report["status"] for report in webhook.reports] == ["regression"]
    other = night | dict(regressions=["worse than the champion: 10.00% against 90.00%"])
    report_regression(registry, NAME, other)
    assert len(webhook.reports) == 2


def test_a_candidate_without_a_recorded_decision_is_new(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.promote(NAME, 1)
    assert decide_on(registry, 2, WORSE, False, monkeypatch)["outcome"] == "kept"


def test_a_regression_that_could_not_be_reported_is_not_recorded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote(NAME, 1)
    night = decide_on(registry, 2, WORSE, True, monkeypatch)
    monkeypatch.setenv("MASTERS_WEBHOOK_URL", "http://127.0.0.1:1/unreachable")
    report_regression(registry, NAME, night)
    assert registry.reported_regression(NAME, 2) == ""


def test_a_failed_night_is_reported(tmp_path: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError):
        nightly.fn(make_config(tmp_path, mlflow_uri="http://127.0.0.1:9"))
    assert [(report["name"], report["status"]) for report in webhook.reports] == [(NAME, "failed")]
    assert "does not answer" in webhook.reports[0]["reason"]


def test_a_crashed_night_is_reported_to_the_webhook(webhook: Webhook) -> None:
    assert nights.report_crash in (nightly.on_crashed_hooks or [])
    run = SimpleNamespace(name="easy", run_count=2, parameters=dict(config=make_config("/s").model_dump()))
    nights.report_crash(nightly, run, SimpleNamespace(message="exit code -9"))  # pyright: ignore[reportArgumentType]
    assert webhook.reports[0]["status"] == "crashed" and "attempt 2 of the night easy" in webhook.reports[0]["reason"]


def test_nights_of_one_name_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_other_models_in_the_same_mlflow_are_ignored(registry: Registry) -> None:
    client = MlflowClient(registry.uri)
    client.create_registered_model("team.fraud model's")
    client.create_model_version("team.fraud model's", "s3://theirs", tags={"upstream.mask": "f"})
    client.set_registered_model_alias("team.fraud model's", "champion", "1")
    before = registry.protected_artifacts()
    registry.promote(NAME, 1)
    assert len(registry.protected_artifacts()) >= len(before) and registry.versions_made_from("f") == []


def test_an_interrupted_first_promotion_is_repeated(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(MlflowException):
        patch.setattr(registry._client, "set_registered_model_alias", lambda *_: refuse())
        registry.promote(NAME, 1)
    assert registry.champion_history(NAME) == [1] and registry.champion(NAME) is None
    night = decide_on(registry, 2, BETTER, True, monkeypatch)
    assert (night["outcome"], night["reasons"]) == ("promoted", ["the first champion"])
    assert registry.champion(NAME) == 2


@pytest.mark.parametrize(
    "interrupted", ["set_registered_model_tag", "set_registered_model_alias", "set_model_version_tag"]
)
def test_a_repeated_promotion_leaves_the_same_history(
    interrupted: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote(NAME, 1)
    with monkeypatch.context() as patch, pytest.raises(MlflowException):
        patch.setattr(registry._client, interrupted, lambda *_: refuse())
        registry.promote(NAME, 2)
    registry.promote(NAME, 2)
    assert (registry.champion(NAME), registry.champion_history(NAME)) == (2, [1, 2])
    assert registry.previous_champion(NAME) == 1


def refuse() -> None:
    raise MlflowException("away")
