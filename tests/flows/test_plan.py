"""The plan of a run compares its stages with the records of earlier builds in the store."""

from pathlib import Path

from masters.flows.plan import find_changes
from masters.store import artifacts
from masters.store.artifacts import Identity
from masters.store.storage import Storage


def test_records_that_cannot_be_read_are_skipped(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    before, damaged, now = (Identity("train", 1, dict(epochs=epochs), {}, slug="demo") for epochs in (1, 2, 3))
    artifacts.commit(storage, before, {}, {})
    storage.write(f"{damaged.folder}/record.json", b'{"config": {')
    assert find_changes(storage, now) == ["epochs"]
