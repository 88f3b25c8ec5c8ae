"""Lineage, rollback and garbage collection of finished distillations in a real MLflow."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from typer.testing import CliRunner

from masters.cli.main import app
from masters.common import machine
from masters.common.errors import ArtifactError, InputError
from masters.common.redaction import redact
from masters.flows.garbage_collection import MIN_AGE, collect_garbage
from masters.store import artifacts, lineage
from masters.store.artifacts import Identity
from masters.store.storage import Storage
from masters.tracking.client import redact_uri
from masters.tracking.lineage_report import find_target, trace_lineage
from masters.tracking.registry import Registry
from masters.tracking.run_writer import RunWriter
from tests.s3_server import BUCKET, S3
from tests.tracked_run import NAME, make_config, write_run

STAGES = ["data", "train", "evaluate", "register"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two versions of a model, and the home with its address. Tests work on copies of the store."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "store").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("HOME", str(folder / "home"))
        storage = Storage(str(folder / "store"))
        write_run(storage, b"first")
        write_run(storage, b"second")
    return folder


@pytest.fixture
def store(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The finished store, restored in place, with a copy of MLflow's database, as an open one cannot be replaced."""
    monkeypatch.setenv("HOME", str(finished / "home"))
    backup = finished / "backup"
    if not backup.exists():
        shutil.copytree(finished / "store", backup)
    shutil.rmtree(finished / "store")
    shutil.copytree(backup, finished / "store")
    shutil.copy(backup / "mlflow.db", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return Storage(str(finished / "store"))


@pytest.fixture
def registry(store: Storage) -> Registry:
    return Registry(os.environ["MLFLOW_TRACKING_URI"])


def listed_files(storage: Storage, folders: dict[str, str]) -> list[str]:
    return [
        f"{node.folder}/{file['name']}"
        for node in lineage.walk(storage, folders, verify_files=False)
        for file in (node.record or {})["files"]
    ]


def age(storage: Storage) -> None:
    """Set the time of every file to two days ago."""
    for name in storage.names(""):
        os.utime(storage.path(name), (time.time() - 2 * MIN_AGE,) * 2)


def test_lineage_leads_back_to_the_questions(store: Storage) -> None:
    found = trace_lineage(NAME)
    assert found["verified"] and found["of"] == f"models:/{NAME}/2"
    assert [stage["name"] for stage in found["stages"]] == STAGES
    data, train, *_ = found["stages"]
    assert data["inputs"][0] | dict(digest="") == dict(
        role="source", name="source", fingerprint=None, uri="/q.jsonl", digest="", state="not here"
    )
    (read,) = train["inputs"]
    assert (read["fingerprint"], read["uri"], read["digest"]) == (data["fingerprint"], data["uri"], data["digest"])
    assert all(len(stage["mlflow_run_id"]) == 32 for stage in found["stages"])


def test_a_model_has_several_references(store: Storage, registry: Registry) -> None:
    registry.promote(NAME, 1)
    titles = {
        reference: find_target(reference, None)[1].title.rsplit("/", 1)[-1]
        for reference in (NAME, f"{NAME}/2", f"models:/{NAME}/2", f"models:/{NAME}@champion", f"{NAME}@candidate")
    }
    assert list(titles.values()) == ["1", "2", "2", "1", "2"]


def test_runs_of_distillations_and_stages_have_a_lineage(store: Storage) -> None:
    runs = {stage["name"]: stage["mlflow_run_id"] for stage in trace_lineage(NAME)["stages"]}
    assert [stage["name"] for stage in trace_lineage(runs["train"])["stages"]] == ["data", "train"]
    parent = find_target(NAME, None)[1].parent
    assert parent and sorted(s["name"] for s in trace_lineage(parent)["stages"]) == sorted(STAGES)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("nobody", "no run of nobody"), (f"{NAME}/9", "no version 9; existing versions: 1, 2"),
        (f"{NAME}@best", "alias 'best'"), (f"{NAME}/x", "number or @alias"),
        ("0" * 32, "not found in an MLflow known"), ("", "found none"), ("models:/", "found none"),
    ],
)  # fmt: skip
def test_an_unknown_reference_is_an_error(
    reference: str, says: str, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an address, the stores that this machine keeps are searched."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(InputError, match=says):
        trace_lineage(reference)


def test_a_missing_database_is_not_created(store: Storage, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no MLflow database"):
        trace_lineage(NAME, f"sqlite:///{tmp_path / 'no.db'}")
    assert not (tmp_path / "no.db").exists()


@settings(max_examples=60)
@given(data=st.data())
def test_every_changed_byte_is_found(finished: Path, data: st.DataObject) -> None:
    storage = Storage(str(finished / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(finished / "home"))
        folders = find_target(f"{NAME}/1", None)[1].folders
    name = data.draw(st.sampled_from(listed_files(storage, folders)))
    path = Path(storage.path(name))
    content = path.read_bytes()
    at, by = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
    try:
        path.write_bytes(content[:at] + bytes([content[at] ^ by]) + content[at + 1 :])
        faults = [fault for node in lineage.walk(storage, folders) for fault in node.faults]
        assert len(faults) == 1 and faults[0].startswith(f"{storage.uri(name)} changed")
    finally:
        path.write_bytes(content)
    assert not any(node.faults for node in lineage.walk(storage, folders))


def test_the_command_names_faults_and_exits_with_1(store: Storage) -> None:
    folders = find_target(NAME, None)[1].folders
    name = next(n for n in listed_files(store, folders) if n.startswith("data/"))
    store.remove(name)
    done = CliRunner().invoke(app, ["lineage", NAME, "--json"])
    assert f"{store.uri(name)} is missing" in str(done.exception) and done.exception.exit_code == 1  # pyright: ignore
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["verified"]
    assert [stage["name"] for stage in found["stages"] if not stage["verified"]] == ["data"]


@pytest.mark.parametrize("damage", ["missing", "no JSON", "other config", "other files", "rebuilt", "no list"])
def test_a_changed_record_is_found(damage: str, store: Storage) -> None:
    folders = find_target(NAME, None)[1].folders
    folder = next(node.folder for node in lineage.walk(store, folders) if node.folder.startswith("data/"))
    record = json.loads(store.read(f"{folder}/record.json"))
    if damage == "missing":
        store.remove(f"{folder}/record.json")
    elif damage == "no JSON":
        store.write(f"{folder}/record.json", b'{"files"')
    elif damage == "rebuilt":
        assert record["files"].pop()
        record["digest"] = lineage.listing_digest({f["name"]: f["digest"] for f in record["files"]})
        store.write(f"{folder}/record.json", json.dumps(record).encode())
    else:
        changed = {"other config": dict(config={"a": 1}), "other files": dict(files=[]), "no list": dict(files=3)}[
            damage
        ]
        store.write(f"{folder}/record.json", json.dumps(record | changed).encode())
    faults = [fault for node in lineage.walk(store, folders) for fault in node.faults]
    assert faults and all(folder in fault for fault in faults)


@pytest.mark.parametrize("stage", ["train", "register"])
@pytest.mark.parametrize("damage", ["no upstream", "other facts", "an input without its stage", "another input"])
def test_lineage_covers_the_content_of_records(damage: str, stage: str, store: Storage) -> None:
    _, target = find_target(NAME, None)
    nodes = lineage.walk(store, target.folders, records=target.records)
    assert not any(node.faults for node in nodes)
    folder = next(node.folder for node in nodes if node.folder.startswith(f"{stage}/"))
    record = json.loads(store.read(f"{folder}/record.json"))
    role = "data" if stage == "train" else "evaluate"
    if damage == "no upstream":
        record["upstream"] = {}
    elif damage == "other facts":
        record["facts"]["scores"]["student-after"]["accuracy"] = 0.99
    elif damage == "another input":
        record["upstream"][role]["fingerprint"] = "0" * 16
    else:
        del record["upstream"][role]["stage"]
    store.write(f"{folder}/record.json", json.dumps(record).encode())
    report = trace_lineage(NAME)
    assert not report["verified"] and any(store.uri(folder) in fault for fault in report["faults"])


def test_a_rebuilt_input_is_not_loaded(store: Storage) -> None:
    registered_ = artifacts.load(store, next(iter(find_target(NAME, None)[1].folders)))
    trained = registered_.upstream("train")
    assert trained
    store.write(f"{trained.folder}/record.json", json.dumps(trained.record | {"digest": "0" * 64}).encode())
    with pytest.raises(ArtifactError, match="was rebuilt: it is not the train"):
        registered_.upstream("train")


def test_versions_are_promoted_and_rolled_back(store: Storage, registry: Registry) -> None:
    with pytest.raises(InputError, match="no champion"):
        registry.rollback(NAME)
    registry.promote(NAME, 1)
    with pytest.raises(InputError, match="no version was champion before"):
        registry.rollback(NAME)
    registry.promote(NAME, 2)
    registry.promote(NAME, 2)  # a repetition changes nothing
    assert (registry.champion(NAME), registry.champion_history(NAME)) == (2, [1, 2])
    assert registry.rollback(NAME) == (2, 1)
    assert registry.previous_champion(NAME) is None
    assert registry.rollback(NAME, 2) == (1, 2)
    with pytest.raises(InputError, match="champion already"):
        registry.rollback(NAME, 2)
    with pytest.raises(InputError, match="no version 7"):
        registry.rollback(NAME, 7)


def test_the_command_rolls_back(store: Storage, registry: Registry) -> None:
    registry.promote(NAME, 1)
    registry.promote(NAME, 2)
    done = CliRunner().invoke(app, ["rollback", NAME])
    assert done.exit_code == 0 and done.stdout == f"champion of {NAME}: version 1 (was 2)\n"
    assert registry.champion(NAME) == 1


def test_a_version_without_its_files_cannot_be_champion(store: Storage, registry: Registry) -> None:
    registry.promote(NAME, 1)
    registry.promote(NAME, 2)
    for name in store.names(next(iter(find_target(f"{NAME}/1", None)[1].folders))):
        store.remove(name)
    with pytest.raises(InputError, match="no longer in its store"):
        registry.rollback(NAME)
    assert registry.champion(NAME) == 2


def test_gc_keeps_artifacts_behind_aliases(store: Storage, registry: Registry) -> None:
    """Version 2 is candidate. Version 1 has no alias, so the artifacts behind it alone are removed."""
    age(store)
    config = make_config(Path(store.uri("")))
    before = store.names("")
    dry = collect_garbage(config)
    assert store.names("") == before and {item["kind"] for item in dry["items"]} == {"artifact"}
    assert {Path(item["uri"]).parent.name for item in dry["items"]} == {"train", "evaluate", "register"}
    collect_garbage(config, delete=True)
    assert trace_lineage(f"{NAME}/2")["verified"]
    assert not trace_lineage(f"{NAME}/1")["verified"]
    assert not any(Path(item["uri"]).exists() for item in dry["items"])
    assert collect_garbage(config)["items"] == []


def test_gc_keeps_the_target_of_a_rollback(store: Storage, registry: Registry) -> None:
    age(store)
    registry.promote(NAME, 1)
    registry.promote(NAME, 2)
    assert collect_garbage(make_config(Path(store.uri(""))), delete=True)["items"] == []
    registry.rollback(NAME)
    assert trace_lineage(NAME)["verified"]


def test_gc_removes_only_old_leftovers(store: Storage) -> None:
    leftovers = [
        "train/x-0123456789abcdef/checkpoints/1", "shards/responses/x.parquet", ".work/train-1/job.json",
        "leases/train/x-0123456789abcdef/00000001", "handed/0123/asked",
    ]  # fmt: skip
    for name in leftovers:
        store.write(name, b"left")
    config = make_config(Path(store.uri("")))
    assert {item["kind"] for item in collect_garbage(config)["items"]} == {"artifact"}
    age(store)
    kinds = [item["kind"] for item in collect_garbage(config, delete=True)["items"]]
    assert sorted(kinds) == ["artifact"] * 3 + ["note"] * 2 + ["shard", "unfinished", "work"]
    assert not any(store.exists(name) for name in leftovers)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
@pytest.mark.parametrize("name", ["summary.json", "tracking/other.json"])
def test_gc_removes_nothing_if_a_file_that_it_needs_cannot_be_read(name: str, content: bytes, store: Storage) -> None:
    store.write(name, content)
    names = store.names("")
    with pytest.raises(ArtifactError, match=rf"{name} cannot be read \(.*\): \w+"):
        collect_garbage(make_config(Path(store.uri(""))), delete=True)
    assert store.names("") == names


@pytest.mark.parametrize("flow", ["distill", "evaluate"])
def test_gc_keeps_the_artifacts_of_open_runs(flow: str, store: Storage) -> None:
    age(store)
    writer = RunWriter(make_config(Path(store.uri(""))), store, flow=flow)
    identity = Identity("train", 1, {}, {"new": "1"}, NAME)
    building = f"{identity.folder}/model/half"
    with writer.stage(identity, {}):
        store.write(building, b"half")
        store.write("shards/responses/x.parquet", b"left")
        age(store)
        found = collect_garbage(make_config(Path(store.uri(""))), delete=True)
        assert store.exists(building) and store.exists("shards/responses/x.parquet")
        assert {item["kind"] for item in found["items"]} == {"artifact"}
        assert any(writer.run_id in note for note in found["notes"])
    host, boot, pid, *_ = machine.this_process().split()
    writer._client.set_tag(writer.run_id, "masters.process", f"{host} {boot} {pid} 1")  # a process that has ended
    assert {item["kind"] for item in collect_garbage(make_config(Path(store.uri(""))))["items"]} == {
        "unfinished",
        "shard",
    }


def test_gc_needs_every_mlflow_that_tracked_into_the_store(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine that made no run, as the store has their addresses."""
    other = tmp_path / "other.db"
    config = make_config(Path(store.uri("")))
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
        write_run(store, b"third")
    protected = set(find_target(f"{NAME}@candidate", f"sqlite:///{other}")[1].folders)
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    age(store)
    spared = {store.uri(folder) for folder in protected}
    assert not spared & {item["uri"] for item in collect_garbage(config)["items"]}
    other.rename(tmp_path / "away")
    assert any("other.db" in note for note in collect_garbage(config)["notes"])
    with pytest.raises(InputError, match=r"cannot be reached: .*other\.db.*remove .*/tracking/"):
        collect_garbage(config, delete=True)
    (tmp_path / "away").rename(other)
    collect_garbage(config, delete=True)
    assert trace_lineage(f"{NAME}@candidate", f"sqlite:///{other}")["verified"]


def test_gc_removes_nothing_upstream_of_a_record_without_inputs(store: Storage) -> None:
    folder = next(iter(find_target(NAME, None)[1].folders))
    record = json.loads(store.read(f"{folder}/record.json"))
    del record["upstream"]
    store.write(f"{folder}/record.json", json.dumps(record).encode())
    found = collect_garbage(make_config(Path(store.uri(""))), delete=True)
    assert found["items"] == [] and "does not name its inputs" in found["notes"][0]


def test_lineage_and_gc_of_a_store_on_s3(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (s3.environment() | {"HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    root = f"s3://{BUCKET}/lineage"
    storage = Storage(root)
    write_run(storage, b"first")
    write_run(storage, b"second")
    assert trace_lineage(NAME)["verified"] and trace_lineage(NAME)["stages"][0]["uri"].startswith(f"{root}/data/")
    removed = collect_garbage(make_config(root), delete=True)["items"]
    assert [item["kind"] for item in removed] == ["artifact"] * 3
    assert all(item["uri"].startswith(root) and item["bytes"] > 0 for item in removed)
    assert trace_lineage(NAME)["verified"]
    name = listed_files(storage, find_target(NAME, None)[1].folders)[0]
    storage.write(name, b"other")
    assert f"{root}/{name} changed" in trace_lineage(NAME)["faults"][0]


def test_lineage_of_a_student_includes_the_champion_that_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    storage = Storage(str(tmp_path / "store"))
    write_run(storage, b"first")
    _, first = find_target(f"{NAME}@candidate", None)
    champion = artifacts.load(storage, next(iter(first.folders))).upstream("train")
    writer, version = write_run(storage, b"second", student=champion)
    report = trace_lineage(f"{NAME}@candidate")
    assert champion and report["verified"] and len(report["stages"]) == 5
    trained = next(stage for stage in report["stages"] if stage["fingerprint"] == champion.fingerprint)
    client = MlflowClient(writer.uri)
    parent = client.get_run(trained["mlflow_run_id"]).data.tags["mlflow.parentRunId"]
    assert parent == first.parent != writer.run_id
    found = client.get_model_version(NAME, str(version))
    assert f"/runs/{trained['mlflow_run_id']})" in (found.description or "").partition("earlier runs")[2]
    reached = client.get_run(client.get_run(writer.run_id).data.tags["stage.register.run_id"]).data.tags
    assert reached["upstream.student"] == champion.fingerprint != reached["upstream.train"]
    storage.write(f"{champion.folder}/model/README.md", b"changed")
    assert any(champion.folder in fault for fault in trace_lineage(f"{NAME}@candidate")["faults"])


def test_gc_keeps_the_aliases_of_every_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 is candidate in one MLflow and version 2 in the other; both are kept."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    storage = Storage(str(tmp_path / "store"))
    write_run(storage, b"first")
    protected = set(find_target(NAME, None)[1].folders)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    write_run(storage, b"second")
    write_run(storage, b"third")
    protected |= set(find_target(f"{NAME}@candidate", None)[1].folders)
    age(storage)
    gone = {item["uri"] for item in collect_garbage(make_config(storage.uri("")))["items"]}
    spared = {node.uri for node in lineage.walk(storage, dict.fromkeys(protected, ""))}
    assert len(spared) == 7 and not gone & spared and gone


def test_gc_keeps_versions_registered_before_the_store_was_moved(store: Storage, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(store.uri(""), tmp_path / "moved"))
    (moved / "summary.json").unlink(missing_ok=True)
    found = collect_garbage(make_config(moved))
    kept = [
        node.folder
        for node in lineage.walk(Storage(str(moved)), find_target(NAME, None)[1].folders, verify_files=False)
    ]
    assert kept and not {item["uri"] for item in found["items"]} & {str(moved / folder) for folder in kept}


def test_gc_keeps_the_last_run_of_a_store_that_was_moved(store: Storage) -> None:
    config = make_config(Path(store.uri("")))
    (unneeded, *_) = [item["uri"] for item in collect_garbage(config)["items"]]
    folder = unneeded.removeprefix(f"{store.uri('')}/")
    summary = dict(status="completed", stages=[dict(name="train", uri=f"/before/{folder}")])
    store.write("summary.json", json.dumps(summary).encode())
    found = collect_garbage(config)
    assert unneeded not in [item["uri"] for item in found["items"]]
    assert found["notes"] == []


def test_gc_keeps_open_runs_of_machines_that_mount_the_store_elsewhere(store: Storage) -> None:
    writer = RunWriter(make_config(Path(store.uri(""))), store)
    host = machine.this_process().partition(" ")[0]
    writer._client.set_tag(writer.run_id, "masters.store", "/mounted/elsewhere")
    writer._client.set_tag(writer.run_id, "masters.process", f"not-{host} boot 1 1")
    assert any(writer.run_id in note for note in collect_garbage(make_config(Path(store.uri(""))))["notes"])


@pytest.mark.parametrize("password", ["simple", "p/w1234", "p#w1234", "p?w1234", "p@w1234"])
def test_addresses_are_shown_without_passwords(password: str) -> None:
    uri = f"postgresql+psycopg2://user:{password}@host:5432/db"
    assert redact_uri(uri) == "postgresql+psycopg2://host:5432/db"
    assert redact(f"cannot reach {uri}") == "cannot reach postgresql+psycopg2://***@host:5432/db"
    assert redact_uri("http://user:secret@host/a@b") == "http://host/a@b"
    assert redact_uri("sqlite:////data/a@b/mlflow.db") == "sqlite:////data/a@b/mlflow.db"
