"""Artifacts: a stage's output under a path made from its identity, there only once its record is.

An artifact is built in three steps: files are written below its folder, the record that lists them (with their
digests) is created last and exclusively, and readers use only the files that the record lists. Two builders of
one artifact write the same files; whoever comes second loses the record and uses the first one's.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pyarrow as pa

from masters import __version__, schemas
from masters.errors import ArtifactError
from masters.identity import digest, fingerprint
from masters.storage import Storage


@dataclass(frozen=True)
class Identity:
    """What an artifact is made from: the stage, the version of its code, semantic config and inputs' fingerprints."""

    stage: str  # "generate", in later rounds "generate-2"
    version: int
    config: dict
    inputs: dict[str, str]
    slug: str = "artifact"

    @property
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
    def facts(self) -> dict:
        """What the stage found out: counts, scores and the like."""
        return self.record["facts"]

    def digest_of(self, folder: str) -> str:
        """Of the content below one of its folders: who uses a model does not depend on the tables beside it."""
        return _digest({f["name"]: f["digest"] for f in self.record["files"] if f["name"].startswith(f"{folder}/")})

    def files(self, table: str) -> list[str]:
        """Names in the store of a table's Parquet files, in order."""
        return [f"{self.folder}/{f['name']}" for f in self.record["files"] if f["name"].startswith(f"{table}/")]

    def batches(self, table: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """A table file by file; memory holds one file."""
        for name in self.files(table):
            yield schemas.decode(self.storage.read(name), columns)

    def rows(self, table: str, columns: list[str] | None = None) -> Iterator[dict]:
        for batch in self.batches(table, columns):
            yield from batch.to_pylist()


def load(storage: Storage, folder: str) -> Artifact:
    """The finished artifact in a folder that is known to hold one."""
    return Artifact(storage, folder, json.loads(storage.read(f"{folder}/record.json")))


def find(storage: Storage, identity: Identity) -> Artifact | None:
    """The artifact of this identity if it is finished. Raises ArtifactError if listed files are gone."""
    name = f"{identity.folder}/record.json"
    if not storage.exists(name):
        return None
    try:
        record = json.loads(storage.read(name))
    except ValueError as error:
        raise ArtifactError(f"{storage.uri(name)} cannot be read ({error}); {_again(identity)}") from error
    there = set(storage.names(identity.folder))
    lost = [f["name"] for f in record["files"] if f"{identity.folder}/{f['name']}" not in there]
    if lost:
        raise ArtifactError(
            f"{storage.uri(identity.folder)} lacks {len(lost)} of its files (first: {lost[0]}); {_again(identity)}"
        )
    return Artifact(storage, identity.folder, record)


def _again(identity: Identity) -> str:
    return f"build it again with --rebuild {identity.kind}"


def commit(
    storage: Storage, identity: Identity, files: dict[str, str], facts: dict, shards: list[str] | None = None
) -> Artifact:
    """Write the record, last. `files` maps names below the artifact's folder to their SHA-256.

    If another builder was first, its record is the artifact.
    """
    record = dict(
        stage=identity.stage, fingerprint=identity.fingerprint, version=identity.version, config=identity.config,
        inputs=identity.inputs, files=[dict(name=n, digest=d) for n, d in sorted(files.items())],
        digest=_digest(files), shards=shards or [], facts=facts,
        provenance=dict(masters=__version__, created=datetime.now(UTC).isoformat(timespec="seconds")),
    )  # fmt: skip
    name = f"{identity.folder}/record.json"
    if not storage.create(name, json.dumps(record, indent=1).encode()):
        record = json.loads(storage.read(name))
    return Artifact(storage, identity.folder, record)


def _digest(files: dict[str, str]) -> str:
    return digest(json.dumps(sorted(files.items())).encode())


def discard(storage: Storage, identity: Identity) -> None:
    """Remove an artifact, its record first, so that a reader never meets half of it."""
    for name in sorted(storage.names(identity.folder), key=lambda n: not n.endswith("/record.json")):
        storage.remove(name)
