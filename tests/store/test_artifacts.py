from concurrent.futures import ThreadPoolExecutor

import pytest

from masters.common.errors import ArtifactError, InputError
from masters.common.hashing import digest
from masters.store import artifacts
from masters.store.artifacts import Identity
from masters.store.storage import Storage

MADE_OF = Identity("generate", 1, {"a": 1}, {"data": "x"}, slug="demo")


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path))


def build(storage: Storage, text: bytes = b"rows") -> artifacts.Artifact:
    storage.write(f"{MADE_OF.folder}/responses/a.parquet", text)
    return artifacts.commit(storage, MADE_OF, {"responses/a.parquet": digest(text)}, {"rows": 1})


def test_an_artifact_is_there_only_once_its_record_is(storage: Storage) -> None:
    storage.write(f"{MADE_OF.folder}/responses/a.parquet", b"rows")
    assert artifacts.find(storage, MADE_OF) is None
    built = build(storage)
    found = artifacts.find(storage, MADE_OF)
    assert found is not None
    assert found.record == built.record
    assert found.files("responses") == [f"{MADE_OF.folder}/responses/a.parquet"]


def test_the_second_builder_uses_the_first_ones_record(storage: Storage) -> None:
    first = build(storage)
    second = artifacts.commit(storage, MADE_OF, {}, {"rows": 99})
    assert second.record == first.record


def test_lost_files_are_noticed(storage: Storage) -> None:
    build(storage)
    storage.remove(f"{MADE_OF.folder}/responses/a.parquet")
    with pytest.raises(ArtifactError, match="--rebuild generate"):
        artifacts.find(storage, MADE_OF)


def test_a_broken_record_is_noticed(storage: Storage) -> None:
    artifact = build(storage)
    storage.write(f"{artifact.folder}/record.json", b'{"files": [')
    with pytest.raises(ArtifactError, match="--rebuild generate"):
        artifacts.find(storage, MADE_OF)


def test_an_identity_is_computed_once_however_many_files_are_committed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many inputs it takes a while: once a file, a commit's time would grow with their square."""
    asked: list[object] = []
    monkeypatch.setattr(artifacts, "fingerprint", lambda value: str(asked.append(value)))
    identity = Identity("mask", 1, {}, {str(n): "x" for n in range(50)})
    files = {f"rows/{n}.parquet": digest(b"x") for n in range(50)}
    for name in files:
        storage.write(f"{identity.folder}/{name}", b"x")
    artifacts.commit(storage, identity, files, {})
    assert len(asked) == 1


def test_discard_leaves_nothing(storage: Storage) -> None:
    build(storage)
    artifacts.discard(storage, MADE_OF)
    assert storage.names(MADE_OF.folder) == []


def test_one_of_many_racers_creates(storage: Storage) -> None:
    with ThreadPoolExecutor(16) as pool:
        wrote = list(pool.map(lambda n: storage.create("race/record.json", str(n).encode()), range(16)))
    assert wrote.count(True) == 1
    assert int(storage.read("race/record.json")) == wrote.index(True)


def test_nothing_half_written_is_left(storage: Storage) -> None:
    storage.write("a/b", b"1")
    storage.create("a/b", b"2")
    assert storage.names("a") == ["a/b"]
    assert storage.read("a/b") == b"1"


def test_a_store_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be written"):
        Storage("/proc/masters").check()


@pytest.mark.parametrize("again", [b"rows", b"other rows"])
def test_what_was_made_from_an_input_that_came_out_different_is_not_found(storage: Storage, again: bytes) -> None:
    """Built again under the same identity, as with `--rebuild`."""
    made_from = Identity("train", 1, {}, {"responses": MADE_OF.fingerprint})
    first = build(storage)
    trained = artifacts.commit(storage, made_from, {}, {}, {"responses": first})
    artifacts.discard(storage, MADE_OF)
    second = build(storage, again)
    found = artifacts.find(storage, made_from, {"responses": second, "more": first})
    assert (found == trained) == (again == b"rows") and (found is None) == (again != b"rows")
