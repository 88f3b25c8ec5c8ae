"""Lineage, rollback and gc on finished distillations in real MLflow: what is proven, where champions go, what stays."""

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
from masters.flows.garbage_collection import FRESH, collect
from masters.store import artifacts, lineage
from masters.store.artifacts import Identity
from masters.store.storage import Storage
from masters.tracking import locations
from masters.tracking.client import redact_uri
from masters.tracking.lineage_report import find, trace
from masters.tracking.registry import Registry
from masters.tracking.run_writer import RunWriter
from tests.s3_server import BUCKET, S3
from tests.tracked_run import NAME, configured, registered

STAGES = ["data", "train", "evaluate", "register"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two versions of a model, and the home that remembers it; tests work on copies of the store."""
    place = tmp_path_factory.mktemp("finished")
    (place / "store").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("HOME", str(place / "home"))
        storage = Storage(str(place / "store"))
        registered(storage, b"first")
        registered(storage, b"second")
    return place


@pytest.fixture
def there(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The store as it was finished, at the same place, and MLflow's database copied: an open one cannot be put back."""
    monkeypatch.setenv("HOME", str(finished / "home"))
    kept = finished / "kept"
    if not kept.exists():
        shutil.copytree(finished / "store", kept)
    shutil.rmtree(finished / "store")
    shutil.copytree(kept, finished / "store")
    shutil.copy(kept / "mlflow.db", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return Storage(str(finished / "store"))


@pytest.fixture
def registry(there: Storage) -> Registry:
    return Registry(os.environ["MLFLOW_TRACKING_URI"])


def listed(storage: Storage, folders: dict[str, str]) -> list[str]:
    return [
        f"{link.folder}/{file['name']}"
        for link in lineage.walk(storage, folders, prove=False)
        for file in (link.record or {})["files"]
    ]


def age(storage: Storage) -> None:
    """As if everything had been written two days ago."""
    for name in storage.names(""):
        os.utime(storage.path(name), (time.time() - 2 * FRESH,) * 2)


def test_the_chain_leads_back_to_the_questions(there: Storage) -> None:
    found = trace(NAME)
    assert found["verified"] and found["of"] == f"models:/{NAME}/2"
    assert [stage["name"] for stage in found["stages"]] == STAGES
    data, train, *_ = found["stages"]
    assert data["inputs"][0] | dict(digest="") == dict(
        role="source", name="source", fingerprint=None, uri="/q.jsonl", digest="", state="not here"
    )
    (read,) = train["inputs"]
    assert (read["fingerprint"], read["uri"], read["digest"]) == (data["fingerprint"], data["uri"], data["digest"])
    assert all(len(stage["mlflow_run_id"]) == 32 for stage in found["stages"])


def test_a_model_goes_by_many_names(there: Storage, registry: Registry) -> None:
    registry.promote(NAME, 1)
    titles = {
        reference: find(reference, None)[1].title.rsplit("/", 1)[-1]
        for reference in (NAME, f"{NAME}/2", f"models:/{NAME}/2", f"models:/{NAME}@champion", f"{NAME}@candidate")
    }
    assert list(titles.values()) == ["1", "2", "2", "1", "2"]


def test_a_run_of_a_distillation_or_a_stage_has_a_chain_too(there: Storage) -> None:
    runs = {stage["name"]: stage["mlflow_run_id"] for stage in trace(NAME)["stages"]}
    assert [stage["name"] for stage in trace(runs["train"])["stages"]] == ["data", "train"]
    parent = find(NAME, None)[1].parent
    assert parent and sorted(s["name"] for s in trace(parent)["stages"]) == sorted(STAGES)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("nobody", "no run of nobody"), (f"{NAME}/9", "no version 9; there: 1, 2"), (f"{NAME}@best", "alias 'best'"),
        (f"{NAME}/x", "number or @alias"), ("0" * 32, "in no MLflow known here"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_in_a_line(
    reference: str, says: str, there: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an MLflow named: by what this machine remembers."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(InputError, match=says):
        trace(reference)


def test_asking_makes_no_database(there: Storage, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no MLflow database"):
        trace(NAME, f"sqlite:///{tmp_path / 'no.db'}")
    assert not (tmp_path / "no.db").exists()


@settings(max_examples=60)
@given(data=st.data())
def test_any_changed_byte_is_found(finished: Path, data: st.DataObject) -> None:
    storage = Storage(str(finished / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(finished / "home"))
        folders = find(f"{NAME}/1", None)[1].folders
    name = data.draw(st.sampled_from(listed(storage, folders)))
    path = Path(storage.path(name))
    content = path.read_bytes()
    at, by = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
    try:
        path.write_bytes(content[:at] + bytes([content[at] ^ by]) + content[at + 1 :])
        faults = [fault for link in lineage.walk(storage, folders) for fault in link.faults]
        assert len(faults) == 1 and faults[0].startswith(f"{storage.uri(name)} changed")
    finally:
        path.write_bytes(content)
    assert not any(link.faults for link in lineage.walk(storage, folders))


def test_what_does_not_verify_is_named_and_exits_1(there: Storage) -> None:
    folders = find(NAME, None)[1].folders
    name = next(n for n in listed(there, folders) if n.startswith("data/"))
    there.remove(name)
    done = CliRunner().invoke(app, ["lineage", NAME, "--json"])
    assert f"{there.uri(name)} is missing" in str(done.exception) and done.exception.exit_code == 1  # pyright: ignore
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["verified"]
    assert [stage["name"] for stage in found["stages"] if not stage["verified"]] == ["data"]


@pytest.mark.parametrize("damage", ["missing", "no JSON", "other config", "other files", "rebuilt", "no list"])
def test_a_record_that_is_not_what_was_used_is_found(damage: str, there: Storage) -> None:
    folders = find(NAME, None)[1].folders
    folder = next(link.folder for link in lineage.walk(there, folders) if link.folder.startswith("data/"))
    record = json.loads(there.read(f"{folder}/record.json"))
    if damage == "missing":
        there.remove(f"{folder}/record.json")
    elif damage == "no JSON":
        there.write(f"{folder}/record.json", b'{"files"')
    elif damage == "rebuilt":
        lost = record["files"].pop()
        record["digest"] = lineage.listing_digest({f["name"]: f["digest"] for f in record["files"]})
        there.write(f"{folder}/record.json", json.dumps(record).encode())
        assert lost
    else:
        changed = {"other config": dict(config={"a": 1}), "other files": dict(files=[]), "no list": dict(files=3)}[
            damage
        ]
        there.write(f"{folder}/record.json", json.dumps(record | changed).encode())
    faults = [fault for link in lineage.walk(there, folders) for fault in link.faults]
    assert faults and all(folder in fault for fault in faults)


@pytest.mark.parametrize("stage", ["train", "register"])
@pytest.mark.parametrize("damage", ["no upstream", "other facts", "an input without its stage", "another input"])
def test_lineage_covers_what_records_say(damage: str, stage: str, there: Storage) -> None:
    _, target = find(NAME, None)
    links = lineage.walk(there, target.folders, records=target.records)
    assert not any(link.faults for link in links)
    folder = next(link.folder for link in links if link.folder.startswith(f"{stage}/"))
    record = json.loads(there.read(f"{folder}/record.json"))
    role = "data" if stage == "train" else "evaluate"
    if damage == "no upstream":
        record["upstream"] = {}
    elif damage == "other facts":
        record["facts"]["scores"]["student-after"]["accuracy"] = 0.99
    elif damage == "another input":
        record["upstream"][role]["fingerprint"] = "0" * 16
    else:
        del record["upstream"][role]["stage"]
    there.write(f"{folder}/record.json", json.dumps(record).encode())
    told = trace(NAME)
    assert not told["verified"] and any(there.uri(folder) in fault for fault in told["faults"])


def test_an_input_that_was_built_again_is_not_taken_for_what_was_read(there: Storage) -> None:
    registered_ = artifacts.load(there, next(iter(find(NAME, None)[1].folders)))
    trained = registered_.upstream("train")
    assert trained
    there.write(f"{trained.folder}/record.json", json.dumps(trained.record | {"digest": "0" * 64}).encode())
    with pytest.raises(ArtifactError, match="was built again: it is not the train"):
        registered_.upstream("train")


def test_champions_come_and_go(there: Storage, registry: Registry) -> None:
    with pytest.raises(InputError, match="no champion"):
        registry.rollback(NAME)
    registry.promote(NAME, 1)
    with pytest.raises(InputError, match="no version was champion before"):
        registry.rollback(NAME)
    registry.promote(NAME, 2)
    registry.promote(NAME, 2)  # again changes nothing
    assert (registry.champion(NAME), registry.history(NAME)) == (2, [1, 2])
    assert registry.rollback(NAME) == (2, 1)
    assert registry.previous(NAME) is None
    assert registry.rollback(NAME, 2) == (1, 2)
    with pytest.raises(InputError, match="champion already"):
        registry.rollback(NAME, 2)
    with pytest.raises(InputError, match="no version 7"):
        registry.rollback(NAME, 7)


def test_the_command_rolls_back(there: Storage, registry: Registry) -> None:
    registry.promote(NAME, 1)
    registry.promote(NAME, 2)
    done = CliRunner().invoke(app, ["rollback", NAME])
    assert done.exit_code == 0 and done.stdout == f"champion of {NAME}: version 1 (was 2)\n"
    assert registry.champion(NAME) == 1


def test_a_version_whose_files_are_gone_cannot_be_champion(there: Storage, registry: Registry) -> None:
    registry.promote(NAME, 1)
    registry.promote(NAME, 2)
    for name in there.names(next(iter(find(f"{NAME}/1", None)[1].folders))):
        there.remove(name)
    with pytest.raises(InputError, match="no longer in its store"):
        registry.rollback(NAME)
    assert registry.champion(NAME) == 2


def test_gc_spares_what_aliases_reach(there: Storage, registry: Registry) -> None:
    """Version 2 is candidate. Version 1 has no alias: what only it reaches goes."""
    age(there)
    config = configured(Path(there.uri("")))
    before = there.names("")
    dry = collect(config)
    assert there.names("") == before and {item["kind"] for item in dry["items"]} == {"artifact"}
    assert {Path(item["uri"]).parent.name for item in dry["items"]} == {"train", "evaluate", "register"}
    collect(config, delete=True)
    assert trace(f"{NAME}/2")["verified"]
    assert not trace(f"{NAME}/1")["verified"]
    assert not any(Path(item["uri"]).exists() for item in dry["items"])
    assert collect(config)["items"] == []


def test_gc_spares_where_a_rollback_leads(there: Storage, registry: Registry) -> None:
    age(there)
    registry.promote(NAME, 1)
    registry.promote(NAME, 2)
    assert collect(configured(Path(there.uri(""))), delete=True)["items"] == []
    registry.rollback(NAME)
    assert trace(NAME)["verified"]


def test_gc_removes_old_leftovers_and_no_young_ones(there: Storage) -> None:
    leftovers = [
        "train/x-0123456789abcdef/checkpoints/1", "shards/responses/x.parquet", ".work/train-1/job.json",
        "leases/train/x-0123456789abcdef/00000001", "handed/0123/asked",
    ]  # fmt: skip
    for name in leftovers:
        there.write(name, b"left")
    config = configured(Path(there.uri("")))
    assert {item["kind"] for item in collect(config)["items"]} == {"artifact"}
    age(there)
    kinds = [item["kind"] for item in collect(config, delete=True)["items"]]
    assert sorted(kinds) == ["artifact"] * 3 + ["note"] * 2 + ["shard", "unfinished", "work"]
    assert not any(there.exists(name) for name in leftovers)


@pytest.mark.parametrize("flow", ["distill", "evaluate"])
def test_gc_spares_what_a_live_run_has_and_builds(flow: str, there: Storage) -> None:
    age(there)
    tracker = RunWriter(configured(Path(there.uri(""))), there, flow=flow)
    identity = Identity("train", 1, {}, {"new": "1"}, NAME)
    building = f"{identity.folder}/model/half"
    with tracker.stage(identity, {}):
        there.write(building, b"half")
        there.write("shards/responses/x.parquet", b"left")
        age(there)
        found = collect(configured(Path(there.uri(""))), delete=True)
        assert there.exists(building) and there.exists("shards/responses/x.parquet")
        assert {item["kind"] for item in found["items"]} == {"artifact"}
        assert any(tracker.run_id in note for note in found["notes"])
    host, boot, pid, *_ = machine.this_process().split()
    tracker._client.set_tag(tracker.run_id, "masters.process", f"{host} {boot} {pid} 1")  # gone, without a word
    assert {item["kind"] for item in collect(configured(Path(there.uri(""))))["items"]} == {"unfinished", "shard"}


def test_gc_asks_the_mlflow_of_the_last_run(there: Storage) -> None:
    there.write("summary.json", json.dumps(dict(mlflow=dict(tracking_uri="http://elsewhere"))).encode())
    config = configured(Path(there.uri("")))
    with pytest.raises(InputError, match="http://elsewhere"):
        collect(config, delete=True)
    assert any("http://elsewhere" in note and "--delete is refused" in note for note in collect(config)["notes"])
    there.write("summary.json", b"{}")
    assert not any("elsewhere" in note for note in collect(config)["notes"])


def test_gc_removes_nothing_while_an_mlflow_that_tracked_into_the_store_is_away(
    there: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine that remembers nothing: the store says where it was tracked."""
    other = tmp_path / "other.db"
    config = configured(Path(there.uri("")))
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
        registered(there, b"third")
    kept = set(find(f"{NAME}@candidate", f"sqlite:///{other}")[1].folders)
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    age(there)
    spared = {there.uri(folder) for folder in kept}
    assert not spared & {item["uri"] for item in collect(config)["items"]}
    other.rename(tmp_path / "away")
    assert any("other.db" in note for note in collect(config)["notes"])
    with pytest.raises(InputError, match=r"cannot be asked: .*other\.db.*remove .*/tracking/"):
        collect(config, delete=True)
    (tmp_path / "away").rename(other)
    collect(config, delete=True)
    assert trace(f"{NAME}@candidate", f"sqlite:///{other}")["verified"]


def test_the_store_keeps_no_password_of_its_mlflow(there: Storage) -> None:
    locations.note(there, redact_uri("postgresql://me:hunter2@host/mlflow"), "sqlite:///default")
    told = locations.noted(there, "sqlite:///default")
    assert "postgresql://host/mlflow" in told and "hunter2" not in str([there.read(n) for n in there.names("tracking")])


def test_gc_removes_nothing_behind_a_record_that_does_not_say_what_it_read(there: Storage) -> None:
    folder = next(iter(find(NAME, None)[1].folders))
    record = json.loads(there.read(f"{folder}/record.json"))
    del record["upstream"]
    there.write(f"{folder}/record.json", json.dumps(record).encode())
    found = collect(configured(Path(there.uri(""))), delete=True)
    assert found["items"] == [] and "does not say" in found["notes"][0]


def test_lineage_and_gc_of_a_store_on_s3(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (s3.environment() | {"HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    root = f"s3://{BUCKET}/lineage"
    storage = Storage(root)
    registered(storage, b"first")
    registered(storage, b"second")
    assert trace(NAME)["verified"] and trace(NAME)["stages"][0]["uri"].startswith(f"{root}/data/")
    removed = collect(configured(root), delete=True)["items"]
    assert [item["kind"] for item in removed] == ["artifact"] * 3
    assert all(item["uri"].startswith(root) and item["bytes"] > 0 for item in removed)
    assert trace(NAME)["verified"]
    name = listed(storage, find(NAME, None)[1].folders)[0]
    storage.write(name, b"other")
    assert f"{root}/{name} changed" in trace(NAME)["faults"][0]


def test_a_student_that_starts_from_a_champion_leads_on_to_what_made_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    storage = Storage(str(tmp_path / "store"))
    registered(storage, b"first")
    _, first = find(f"{NAME}@candidate", None)
    champion = artifacts.load(storage, next(iter(first.folders))).upstream("train")
    tracker, version = registered(storage, b"second", student=champion)
    told = trace(f"{NAME}@candidate")
    assert champion and told["verified"] and len(told["stages"]) == 5
    own = next(stage for stage in told["stages"] if stage["fingerprint"] == champion.fingerprint)
    client = MlflowClient(tracker.uri)
    parent = client.get_run(own["mlflow_run_id"]).data.tags["mlflow.parentRunId"]
    assert parent == first.parent != tracker.run_id
    found = client.get_model_version(NAME, str(version))
    assert f"/runs/{own['mlflow_run_id']})" in (found.description or "").partition("earlier runs")[2]
    reached = client.get_run(client.get_run(tracker.run_id).data.tags["stage.register.run_id"]).data.tags
    assert reached["upstream.student"] == champion.fingerprint != reached["upstream.train"]
    storage.write(f"{champion.folder}/model/README.md", b"changed")
    assert any(champion.folder in fault for fault in trace(f"{NAME}@candidate")["faults"])


def test_gc_asks_every_mlflow_that_is_known_for_its_own_aliases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one version 1 is candidate, in the other version 2: each is spared where it lies."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    storage = Storage(str(tmp_path / "store"))
    registered(storage, b"first")
    kept = set(find(NAME, None)[1].folders)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    registered(storage, b"second")
    registered(storage, b"third")
    kept |= set(find(f"{NAME}@candidate", None)[1].folders)
    age(storage)
    gone = {item["uri"] for item in collect(configured(storage.uri("")))["items"]}
    spared = {link.uri for link in lineage.walk(storage, dict.fromkeys(kept, ""))}
    assert len(spared) == 7 and not gone & spared and gone


def test_gc_spares_what_was_registered_while_the_store_had_another_address(there: Storage, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(there.uri(""), tmp_path / "moved"))
    (moved / "summary.json").unlink(missing_ok=True)
    found = collect(configured(moved))
    kept = [link.folder for link in lineage.walk(Storage(str(moved)), find(NAME, None)[1].folders, prove=False)]
    assert kept and not {item["uri"] for item in found["items"]} & {str(moved / folder) for folder in kept}


def test_gc_lets_runs_be_of_a_machine_that_mounts_the_store_elsewhere(there: Storage) -> None:
    tracker = RunWriter(configured(Path(there.uri(""))), there)
    host = machine.this_process().partition(" ")[0]
    tracker._client.set_tag(tracker.run_id, "masters.store", "/mounted/elsewhere")
    tracker._client.set_tag(tracker.run_id, "masters.process", f"not-{host} boot 1 1")
    assert any(tracker.run_id in note for note in collect(configured(Path(there.uri(""))))["notes"])


@pytest.mark.parametrize("password", ["simple", "p/w1234", "p#w1234", "p?w1234", "p@w1234"])
def test_no_address_shows_its_password(password: str) -> None:
    uri = f"postgresql+psycopg2://user:{password}@host:5432/db"
    assert redact_uri(uri) == "postgresql+psycopg2://host:5432/db"
    assert redact(f"cannot reach {uri}") == "cannot reach postgresql+psycopg2://***@host:5432/db"
    assert redact_uri("http://user:secret@host/a@b") == "http://host/a@b"
    assert redact_uri("sqlite:////data/a@b/mlflow.db") == "sqlite:////data/a@b/mlflow.db"
