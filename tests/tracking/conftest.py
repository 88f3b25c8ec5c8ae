"""An empty home and an empty store for the tests of tracking."""

from pathlib import Path

import pytest

from masters.store.storage import Storage


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, where tracking keeps notes, and no MLflow in the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def storage(home: Path, tmp_path: Path) -> Storage:
    (tmp_path / "store").mkdir()
    return Storage(str(tmp_path / "store"))
