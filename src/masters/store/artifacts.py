"""Artifacts: a stage's output under a path made from its identity, there only once its record is.

An artifact is built in three steps: files are written below its folder, the record that lists them (with their
digests) is created last and exclusively, and readers use only the files that the record lists. Two builders of
one artifact write the same files; whoever comes second loses the record and uses the first one's.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from types import MappingProxyType

import pyarrow as pa

from masters import __version__
from masters.common.errors import ArtifactError, StoreError
from masters.common.hashing import digest, fingerprint
from masters.common.provenance import commit as code_commit
from masters.store import tables
from masters.store.storage import Storage

RECORD = "record.json"


@dataclass(frozen=True)
class Identity:
    """What an artifact is made from: the stage, the version of its code, semantic config and inputs' fingerprints."""

    stage: str  # "generate", in later rounds "generate-2"
    version: int
    config: dict
    inputs: dict[str, str]
    slug: str = "artifact"

    @cached_property  # asked for at every file; of 10,000 inputs it takes 15 ms
    def fingerprint(self) -> str:
        return fingerprint(dict(stage=self.kind, version=self.version, config=self.config, inputs=self.inputs))

    @property
    def kind(self) -> str:
        """The stage without its round: a later round with equal inputs is the same artifact."""
        return self.stage.split("-")[0]

    @property
    def folder(self) -> str:
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
    def content(self) -> str:
        """Of what it was made from and of what it holds: built again, it may hold other bytes under its fingerprint."""
        return digest(f"{self.fingerprint} {self.record['digest']}".encode())

    @property
    def created(self) -> datetime:
        """When its record was written, by the clock of who wrote it."""
        return datetime.fromisoformat(self.record["provenance"]["created"])

    @property
    def facts(self) -> dict:
        """What the stage found out: counts, scores and the like."""
        return self.record["facts"]

    @property
    def parts(self) -> dict[str, str]:
        """Its tables, and the model if it holds one: name to a SHA-256 over the names and digests of its files."""
        files: dict[str, list[tuple[str, str]]] = {}
        for file in self.record["files"]:
            files.setdefault(file["name"].split("/")[0], []).append((file["name"], file["digest"]))
        return {part: listing_digest(dict(listed)) for part, listed in files.items()}

    def upstream(self, role: str) -> "Artifact | None":
        """The artifact that its stage read in this role, None if there is none."""
        note = self.record.get("upstream", {}).get(role)
        if not note or "folder" not in note:
            return None
        read = load(self.storage, note["folder"])
        if read.record["digest"] != note["digest"]:
            raise ArtifactError(f"{read.uri} was built again: it is not the {role} that {self.uri} was made from")
        return read

    def files(self, table: str) -> list[str]:
        """Names in the store of a table's Parquet files, in order."""
        return [f"{self.folder}/{f['name']}" for f in self.record["files"] if f["name"].startswith(f"{table}/")]

    def batches(self, table: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """A table file by file; memory holds one file."""
        for name in self.files(table):
            yield tables.read(self.storage, name, columns)

    def rows(self, table: str, columns: list[str] | None = None) -> Iterator[dict]:
        for batch in self.batches(table, columns):
            yield from batch.to_pylist()


@dataclass(frozen=True)
class External:
    """An input that does not lie in the store: a model's folder, a source of questions, a judge's server."""

    kind: str  # "model", "source", "server", "tasks"
    uri: str
    digest: str | None  # of its content when it was read; None if that cannot be known


Upstream = Mapping[str, Artifact | External]  # what a stage reads, by its role: "data", "masks", "teacher", ...


def listing_digest(files: dict[str, str]) -> str:
    """SHA-256 over names and digests of files: the content of an artifact, or of a part of it."""
    return digest(json.dumps(sorted(files.items())).encode())


def record_digest(record: dict) -> str:
    """SHA-256 over what a record says of its artifact: all but when and by which code it was built.

    What it says of each input holds this digest of that input's record: so one digest covers the whole chain.
    """
    held = {name: value for name, value in record.items() if name != "provenance"}
    return digest(json.dumps(held, sort_keys=True).encode())


def load(storage: Storage, folder: str) -> Artifact:
    """The finished artifact in a folder that is known to hold one."""
    return Artifact(storage, folder, json.loads(storage.read(f"{folder}/{RECORD}")))


def find(storage: Storage, identity: Identity, upstream: Upstream = MappingProxyType({})) -> Artifact | None:
    """The artifact of this identity if it is finished, and read of `upstream` what lies there now: an input that was
    built again may hold other bytes under the same identity. Raises ArtifactError if listed files are gone."""
    name = f"{identity.folder}/{RECORD}"
    if not storage.exists(name):
        return None
    try:
        record = json.loads(storage.read(name))
    except ValueError as error:
        raise ArtifactError(
            f"{storage.uri(name)} cannot be read ({error}); build it again with --rebuild {identity.kind}"
        ) from error
    there = _sizes(storage, identity)
    lost = [f["name"] for f in record["files"] if there.get(f["name"], -1) != f["size"]]
    if lost:
        raise ArtifactError(
            f"{storage.uri(identity.folder)} lacks {len(lost)} of its files, or has them in another size (first: "
            f"{lost[0]}); build it again with --rebuild {identity.kind}"
        )
    notes = record.get("upstream", {})
    same = all(_same(notes.get(role), made) for role, made in upstream.items() if isinstance(made, Artifact))
    return Artifact(storage, identity.folder, record) if same else None


def _same(note: dict | None, made: Artifact) -> bool:
    """Whether an input is what a record noted of it; one in another folder is judged by the identity alone."""
    return not note or note.get("folder") != made.folder or note["digest"] == made.record["digest"]


def _sizes(storage: Storage, identity: Identity) -> dict[str, int]:
    """Bytes of what lies in an artifact's folder, by name below it, from one listing."""
    found = storage.details(identity.folder).items()
    return {name[len(identity.folder) + 1 :]: size for name, (size, _) in found}


def commit(
    storage: Storage, identity: Identity, files: dict[str, str], facts: dict, upstream: Upstream | None = None
) -> Artifact:
    """Write the record, last. `files` maps names below the artifact's folder to their SHA-256.

    `upstream` is where its inputs lie and what they held, so that the chain can be walked from the store alone. It
    is no part of the identity. If another builder was first, its record is the artifact. Raises StoreError if a file
    is not there.
    """
    there = _sizes(storage, identity)
    if gone := sorted(files.keys() - there.keys()):
        raise StoreError(f"{storage.uri(identity.folder)}: {gone[0]} was written and is gone ({len(gone)} files)")
    record = dict(
        stage=identity.stage, fingerprint=identity.fingerprint, version=identity.version, config=identity.config,
        inputs=identity.inputs, files=[dict(name=n, digest=d, size=there[n]) for n, d in sorted(files.items())],
        digest=listing_digest(files), facts=facts,
        upstream={role: _note(made) for role, made in (upstream or {}).items()},
        provenance=dict(
            masters=__version__, commit=code_commit(), created=datetime.now(UTC).isoformat(timespec="seconds")
        ),
    )  # fmt: skip
    name = f"{identity.folder}/{RECORD}"
    if not storage.create(name, json.dumps(record, indent=1).encode()):
        record = json.loads(storage.read(name))
    return Artifact(storage, identity.folder, record)


def discard(storage: Storage, identity: Identity) -> None:
    """Remove the artifact of this identity, whether it is finished or not."""
    remove(storage, identity.folder)


def remove(storage: Storage, folder: str) -> None:
    """Remove what lies in an artifact's folder, the record first, so that a reader never meets half of it."""
    for name in sorted(storage.names(folder), key=lambda n: n != f"{folder}/{RECORD}"):
        storage.remove(name)


def _note(made: Artifact | External) -> dict:
    """How a record names what was read."""
    if isinstance(made, External):
        return dict(kind=made.kind, uri=made.uri, digest=made.digest)
    return dict(
        kind="artifact", stage=made.record.get("stage"), folder=made.folder, fingerprint=made.fingerprint,
        digest=made.record["digest"], record=record_digest(made.record),
    )  # fmt: skip
