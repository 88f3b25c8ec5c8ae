"""Artifacts are committed with their record, found by identity, and checked against their inputs."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from masters.common.errors import ArtifactError, InputError
from masters.common.hashing import digest
from masters.store import artifacts
from masters.store.artifacts import Identity
from masters.store.storage import Storage

IDENTITY = Identity("generate", 1, {"a": 1}, {"data": "x"}, slug="demo")


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path))


def build(storage: Storage, text: bytes = b"rows") -> artifacts.Artifact:
    storage.write(f"{IDENTITY.folder}/responses/a.parquet", text)
    return artifacts.commit(storage, IDENTITY, {"responses/a.parquet": digest(text)}, {"rows": 1})


def test_an_artifact_exists_only_with_its_record(storage: Storage) -> None:
    storage.write(f"{IDENTITY.folder}/responses/a.parquet", b"rows")
    assert artifacts.find(storage, IDENTITY) is None
    built = build(storage)
    found = artifacts.find(storage, IDENTITY)
    assert found is not None
    assert found.record == built.record
    assert found.files("responses") == [f"{IDENTITY.folder}/responses/a.parquet"]


def test_the_second_builder_uses_the_first_record(storage: Storage) -> None:
    first = build(storage)
    second = artifacts.commit(storage, IDENTITY, {}, {"rows": 99})
    assert second.record == first.record


def test_missing_files_are_an_error(storage: Storage) -> None:
    build(storage)
    storage.remove(f"{IDENTITY.folder}/responses/a.parquet")
    with pytest.raises(ArtifactError, match="--rebuild generate"):
        artifacts.find(storage, IDENTITY)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"files": [', b"[]", b"null", b"{}"])
def test_a_damaged_record_is_an_error(storage: Storage, content: bytes) -> None:
    artifact = build(storage)
    storage.write(f"{artifact.folder}/record.json", content)
    for read in (lambda: artifacts.find(storage, IDENTITY), lambda: artifacts.load(storage, artifact.folder)):
        with pytest.raises(ArtifactError, match=r"record.json cannot be read .*: rebuild it with --rebuild generate"):
            read()


@pytest.mark.parametrize("field", ["stage", "files", "digest", "facts", "config", "inputs", "version", "provenance"])
@pytest.mark.parametrize("value", [None, "text", ["name.parquet"]])
def test_a_record_of_another_form_is_an_error(storage: Storage, field: str, value: object) -> None:
    artifact = build(storage)
    other = artifact.record | {field: value}
    if field in ("stage", "digest") and isinstance(value, str):
        del other[field]
    storage.write(f"{artifact.folder}/record.json", json.dumps(other).encode())
    with pytest.raises(ArtifactError, match=rf"record.json cannot be read \({field}"):
        artifacts.find(storage, IDENTITY)


def test_a_table_file_of_other_bytes_is_an_error(storage: Storage) -> None:
    with pytest.raises(ArtifactError, match=r"a.parquet \(4 bytes\) cannot be read as Parquet .*--rebuild"):
        list(build(storage).rows("responses"))


def test_fields_of_a_later_version_are_kept(storage: Storage) -> None:
    artifact = build(storage)
    later = artifact.record | dict(signature="x") | dict(facts=dict(artifact.facts, share=0.1 + 0.2))
    storage.write(f"{artifact.folder}/record.json", json.dumps(later).encode())
    found = artifacts.find(storage, IDENTITY)
    assert found is not None
    assert found.record == later


def test_a_missing_artifact_is_an_error_that_names_its_record(storage: Storage) -> None:
    with pytest.raises(ArtifactError, match=r"register/demo-0/record.json is missing: a run of its configuration"):
        artifacts.load(storage, "register/demo-0")


def test_a_fingerprint_is_computed_once_per_commit(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fingerprint of many inputs is slow; computed once per file, a commit would take quadratic time."""
    calls: list[object] = []
    monkeypatch.setattr(artifacts, "fingerprint", lambda value: str(calls.append(value)))
    identity = Identity("mask", 1, {}, {str(n): "x" for n in range(50)})
    files = {f"rows/{n}.parquet": digest(b"x") for n in range(50)}
    for name in files:
        storage.write(f"{identity.folder}/{name}", b"x")
    artifacts.commit(storage, identity, files, {})
    assert len(calls) == 1


def test_removing_an_artifact_leaves_no_files(storage: Storage) -> None:
    build(storage)
    artifacts.remove(storage, IDENTITY.folder)
    assert storage.names(IDENTITY.folder) == []


def test_one_of_many_concurrent_creates_succeeds(storage: Storage) -> None:
    with ThreadPoolExecutor(16) as pool:
        created = list(pool.map(lambda n: storage.create("race/record.json", str(n).encode()), range(16)))
    assert created.count(True) == 1
    assert int(storage.read("race/record.json")) == created.index(True)


def test_writes_leave_no_temporary_files(storage: Storage) -> None:
    storage.write("a/b", b"1")
    storage.create("a/b", b"2")
    assert storage.names("a") == ["a/b"]
    assert storage.read("a/b") == b"1"


def test_an_unwritable_store_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be written"):
        Storage("/proc/masters").check()


@pytest.mark.parametrize("again", [b"rows", b"other rows"])
def test_an_artifact_whose_input_was_rebuilt_differently_is_not_found(storage: Storage, again: bytes) -> None:
    """The input is rebuilt under the same identity, as with `--rebuild`."""
    train_identity = Identity("train", 1, {}, {"responses": IDENTITY.fingerprint})
    first = build(storage)
    trained = artifacts.commit(storage, train_identity, {}, {}, {"responses": first})
    artifacts.remove(storage, IDENTITY.folder)
    second = build(storage, again)
    found = artifacts.find(storage, train_identity, {"responses": second, "more": first})
    assert (found == trained) == (again == b"rows") and (found is None) == (again != b"rows")
