"""Writes a distillation of four stages with handmade artifacts, for tests of tracking, lineage and gc."""

from pathlib import Path

from masters.common.hashing import digest
from masters.config import Config
from masters.store import artifacts
from masters.store.artifacts import Artifact, External, Identity, Upstream
from masters.store.storage import Storage
from masters.tracking.run_writer import RunWriter

NAME = "tracked"
TABLES = {"data": "questions"}


def make_config(root: Path | str, **runtime) -> Config:
    models = {"student": {"model": "s"}, "teachers": [{"model": "t"}]}
    tree = {"name": NAME, "store": {"root": str(root)}, "data": {"source": "d"}, "runtime": runtime}
    return Config.model_validate(tree | models)


def commit_artifact(
    storage: Storage, stage: str, upstream: Upstream | None = None, content: bytes = b"rows"
) -> Artifact:
    """Commit an artifact with one table and a model."""
    identity = Identity(stage, 1, {}, {"content": digest(content)}, NAME)
    files = {}
    for name in (f"{TABLES.get(stage, stage)}/0.parquet", "model/README.md"):
        text = f"{stage} {name} ".encode() + content
        storage.write(f"{identity.folder}/{name}", text)
        files[name] = digest(text)
    scores = {"student-after": {"accuracy": 0.5}, "t": {"accuracy": 1.0}}
    return artifacts.commit(storage, identity, files, dict(scores=scores), upstream)


def write_stage(
    writer: RunWriter, storage: Storage, stage: str, upstream: Upstream, content: bytes = b"rows"
) -> Artifact:
    with writer.stage(Identity(stage, 1, {}, {"content": digest(content)}, NAME), upstream) as record_artifact:
        artifact = commit_artifact(storage, stage, upstream, content)
        record_artifact(artifact, dict(outcome="built", rows=1, seconds=0.1))
    return artifact


def write_run(
    storage: Storage, content: bytes = b"rows", key: str = "", student: Artifact | None = None
) -> tuple[RunWriter, int]:
    """Write a finished distillation of four stages. `student` is an earlier artifact that training starts from."""
    writer = RunWriter(make_config(storage.uri("")), storage, key)
    data = write_stage(writer, storage, "data", {"source": External("source", "/q.jsonl", "5" * 64)})
    trained = write_stage(writer, storage, "train", {"data": data} | ({"student": student} if student else {}), content)
    evaluated = write_stage(writer, storage, "evaluate", {"data": data, "student": trained}, content)
    exported = write_stage(writer, storage, "register", {"train": trained, "evaluate": evaluated}, content)
    version = writer.register_model(NAME, exported, trained, evaluated)
    writer.finish("FINISHED")
    return writer, version
