"""Where a run is tracked."""

from pathlib import Path

import pytest

from masters.config import Config
from masters.errors import InputError
from masters.storage import Storage
from masters.tracking import Tracker


def configured(root: Path, **runtime) -> Config:
    models = {"student": {"model": "s"}, "teachers": [{"model": "t"}]}
    tree = {"name": "tracked", "store": {"root": str(root)}, "data": {"source": "d"}, "runtime": runtime}
    return Config.model_validate(tree | models)


def test_a_server_that_does_not_answer_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 does not answer.*runtime\.mlflow_uri"):
        Tracker(configured(tmp_path, mlflow_uri="http://127.0.0.1:9"), Storage(str(tmp_path)))


def test_by_default_everything_lies_beside_the_artifacts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    tracker = Tracker(configured(store), Storage(str(store)))
    scores = {"student-after": {"accuracy": 0.5}}
    assert tracker.register_model("tracked", "/some/folder", scores) == 1
    assert tracker.register_model("tracked", "/some/folder", scores) == 1  # the same student is one version
    assert tracker.register_model("tracked", "/other/folder", scores) == 2
    tracker.finish("FINISHED")
    assert (store / "mlflow.db").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["store"]  # nothing in the working folder
