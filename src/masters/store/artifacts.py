"""Artifacts: a stage's output in a folder named by its identity, finished once its record exists.

A stage first writes files below the artifact's folder, then creates the record that lists them with their digests.
Readers use only the files that the record lists. If two runs build one artifact, they write the same files; the second
fails to create the record and uses the first one's.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from types import MappingProxyType

import pyarrow as pa
from pydantic import BaseModel

from masters import __version__
from masters.common.errors import ArtifactError, StoreError
from masters.common.hashing import digest, fingerprint
from masters.common.provenance import code_commit
from masters.store import tables
from masters.store.json_files import read_json
from masters.store.storage import Storage

RECORD = "record.json"


class RecordedFile(BaseModel):
    """An entry of a record's list of files: name below the artifact's folder, SHA-256, bytes."""

    name: str
    digest: str
    size: int


class RecordedProvenance(BaseModel):
    created: datetime


class RecordForm(BaseModel):
    """The fields of a record that its readers rely on. Other fields may follow, such as those of a later version."""

    stage: str
    fingerprint: str
    version: int
    config: dict
    inputs: dict[str, str]
    files: list[RecordedFile]
    digest: str
    facts: dict
    upstream: dict[str, dict] = {}  # absent in records of the first version
    provenance: RecordedProvenance


@dataclass(frozen=True)
class Identity:
    """Everything that determines an artifact's content: stage, version of its code, semantic configuration, inputs."""

    stage: str  # "generate", in later rounds "generate-2"
    version: int
    config: dict
    inputs: dict[str, str]  # name to fingerprint or digest
    slug: str = "artifact"

    @cached_property  # read for every file; takes 15 ms with 10,000 inputs
    def fingerprint(self) -> str:
        """Hash of everything but the slug and the round."""
        return fingerprint(dict(stage=self.kind, version=self.version, config=self.config, inputs=self.inputs))

    @property
    def kind(self) -> str:
        """The stage without its round: two rounds with equal inputs share an artifact."""
        return self.stage.split("-")[0]

    @property
    def folder(self) -> str:
        """Path in the store."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.slug.lower()).strip("-")[:40] or "artifact"
        return f"{self.kind}/{slug}-{self.fingerprint}"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder in the store and its record."""

    storage: Storage
    folder: str
    record: dict = field(repr=False)

    @property
    def fingerprint(self) -> str:
        return self.record["fingerprint"]

    @property
    def uri(self) -> str:
        return self.storage.uri(self.folder)

    @property
    def content_digest(self) -> str:
        """Digest of the artifact's inputs and outputs. A rebuild may give other bytes under the same fingerprint."""
        return digest(f"{self.fingerprint} {self.record['digest']}".encode())

    @property
    def created(self) -> datetime:
        """Time of the record, by the clock of the machine that wrote it."""
        return datetime.fromisoformat(self.record["provenance"]["created"])

    @property
    def facts(self) -> dict:
        """Results of the stage: counts, scores and the like."""
        return self.record["facts"]

    @property
    def part_digests(self) -> dict[str, str]:
        """Map each table (and "model") to a SHA-256 over the names and digests of its files."""
        files: dict[str, list[tuple[str, str]]] = {}
        for file in self.record["files"]:
            files.setdefault(file["name"].split("/")[0], []).append((file["name"], file["digest"]))
        return {part: listing_digest(dict(listed)) for part, listed in files.items()}

    def upstream(self, role: str) -> "Artifact | None":
        """Load the artifact that the stage read in this role; None if there is none."""
        reference = self.record.get("upstream", {}).get(role)
        if not reference or "folder" not in reference:
            return None
        artifact = load(self.storage, reference["folder"])
        if artifact.record["digest"] != reference["digest"]:
            raise ArtifactError(f"{artifact.uri} was rebuilt: it is not the {role} that {self.uri} was made from")
        return artifact

    def files(self, table: str) -> list[str]:
        """Return the paths in the store of a table's Parquet files, in order."""
        return [f"{self.folder}/{f['name']}" for f in self.record["files"] if f["name"].startswith(f"{table}/")]

    def batches(self, table: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Read a table file by file, with one file in memory at a time."""
        for name in self.files(table):
            yield tables.read(self.storage, name, columns)

    def rows(self, table: str, columns: list[str] | None = None) -> Iterator[dict]:
        """Read a table row by row."""
        for batch in self.batches(table, columns):
            yield from batch.to_pylist()


@dataclass(frozen=True)
class External:
    """An input from outside the store: a model folder, a source of questions, a judge server."""

    kind: str  # "model", "source", "server", "tasks"
    uri: str
    digest: str | None  # of the content that was read; None if it is unknown


Upstream = Mapping[str, Artifact | External]  # a stage's inputs by role: "data", "masks", "teacher", ...


def listing_digest(files: dict[str, str]) -> str:
    """Return the SHA-256 over names and digests of files."""
    return digest(json.dumps(sorted(files.items())).encode())


def record_digest(record: dict) -> str:
    """Return the SHA-256 of a record without its provenance (time and code).

    A record contains this digest of each input's record, so one digest covers the whole lineage.
    """
    content = {name: value for name, value in record.items() if name != "provenance"}
    return digest(json.dumps(content, sort_keys=True).encode())


def load(storage: Storage, folder: str) -> Artifact:
    """Load the finished artifact in a folder. Raises ArtifactError if its record is missing or cannot be read."""
    return Artifact(storage, folder, _read_record(storage, folder))


def _read_record(storage: Storage, folder: str) -> dict:
    name = f"{folder}/{RECORD}"
    try:
        return read_json(storage, name, RecordForm, f"rebuild it with --rebuild {folder.split('/')[0]}")
    except FileNotFoundError as error:
        raise ArtifactError(f"{storage.uri(name)} is missing: a run of its configuration builds it again") from error


def find(storage: Storage, identity: Identity, upstream: Upstream = MappingProxyType({})) -> Artifact | None:
    """Return the finished artifact of this identity, None if there is none or an input in `upstream` was rebuilt since.

    Rebuilt inputs may hold other bytes under the same identity. Raises ArtifactError if listed files are missing or
    the record cannot be read.
    """
    if not storage.exists(f"{identity.folder}/{RECORD}"):
        return None
    record = _read_record(storage, identity.folder)
    sizes = _file_sizes(storage, identity)
    missing = [f["name"] for f in record["files"] if sizes.get(f["name"], -1) != f["size"]]
    if missing:
        raise ArtifactError(
            f"{storage.uri(identity.folder)} has {len(missing)} files missing or of another size (first: "
            f"{missing[0]}); rebuild it with --rebuild {identity.kind}"
        )
    references = record.get("upstream", {})
    inputs = {role: source for role, source in upstream.items() if isinstance(source, Artifact)}
    unchanged = all(_is_unchanged(references.get(role), artifact) for role, artifact in inputs.items())
    return Artifact(storage, identity.folder, record) if unchanged else None


def _is_unchanged(reference: dict | None, artifact: Artifact) -> bool:
    """Return whether an input has the content that a record refers to. The identity covers other folders' inputs."""
    return (
        not reference or reference.get("folder") != artifact.folder or reference["digest"] == artifact.record["digest"]
    )


def _file_sizes(storage: Storage, identity: Identity) -> dict[str, int]:
    """Return the bytes of each file below an artifact's folder, from one listing."""
    details = storage.details(identity.folder).items()
    return {name[len(identity.folder) + 1 :]: size for name, (size, _) in details}


def commit(
    storage: Storage, identity: Identity, files: dict[str, str], facts: dict, upstream: Upstream | None = None
) -> Artifact:
    """Create the record, which finishes the artifact. `files` maps names below the artifact's folder to their SHA-256.

    The record refers to the inputs in `upstream` and their digests, so that the lineage can be walked from the store
    alone; they are not part of the identity. If another run was first, its record is returned. Raises StoreError if a
    file is missing.
    """
    sizes = _file_sizes(storage, identity)
    if missing := sorted(files.keys() - sizes.keys()):
        raise StoreError(
            f"{storage.uri(identity.folder)}: {len(missing)} files were written and are missing (first: {missing[0]})"
        )
    record = dict(
        stage=identity.stage,
        fingerprint=identity.fingerprint,
        version=identity.version,
        config=identity.config,
        inputs=identity.inputs,
        files=[dict(name=n, digest=d, size=sizes[n]) for n, d in sorted(files.items())],
        digest=listing_digest(files),
        facts=facts,
        upstream={role: _reference(source) for role, source in (upstream or {}).items()},
        provenance=dict(
            masters=__version__, commit=code_commit(), created=datetime.now(UTC).isoformat(timespec="seconds")
        ),
    )
    name = f"{identity.folder}/{RECORD}"
    if not storage.create(name, json.dumps(record, indent=1).encode()):
        record = _read_record(storage, identity.folder)
    return Artifact(storage, identity.folder, record)


def remove(storage: Storage, folder: str) -> None:
    """Remove all files in an artifact's folder, the record first, so that readers never see half of the artifact."""
    for name in sorted(storage.names(folder), key=lambda n: n != f"{folder}/{RECORD}"):
        storage.remove(name)


def _reference(source: Artifact | External) -> dict:
    """Return a record's entry for an input."""
    if isinstance(source, External):
        return dict(kind=source.kind, uri=source.uri, digest=source.digest)
    return dict(
        kind="artifact",
        stage=source.record.get("stage"),
        folder=source.folder,
        fingerprint=source.fingerprint,
        digest=source.record["digest"],
        record=record_digest(source.record),
    )
