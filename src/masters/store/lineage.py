"""The chain behind artifacts, walked and proven from the store alone: records upstream, and every file they list.

A record says what its stage read: folder, fingerprint and a digest over the files' digests. So each artifact is held
to its own record, and its record to that of whoever used it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from masters.common.hashing import fingerprint
from masters.store.artifacts import RECORD, listing_digest, record_digest
from masters.store.storage import Storage

# what a record says of an input: by whether it is an artifact
NOTED = {True: {"stage", "folder", "fingerprint", "digest"}, False: {"uri", "digest"}}


@dataclass
class Link:
    """An artifact of the chain: where it lies, its record (None: it cannot be read), and what is wrong with it."""

    folder: str
    uri: str
    record: dict | None
    faults: list[str] = field(default_factory=list)

    @property
    def upstream(self) -> dict[str, dict]:
        return (self.record or {}).get("upstream", {})


def walk(
    storage: Storage, folders: dict[str, str], prove: bool = True, records: dict[str, str] | None = None
) -> list[Link]:
    """The artifacts in `folders` (to the digest expected of each) and everything upstream, the first inputs first.

    `prove` reads every listed file again. `records`: the digest expected of a folder's record. Raises nothing about
    what is missing or changed: that is in the links.
    """
    links: dict[str, Link] = {}

    def visit(folder: str, expected: str, record: str | None, wanted_by: str) -> None:
        if folder not in links:
            link = _link(storage, folder)
            for made in _artifacts(link):
                visit(made["folder"], made["digest"], made.get("record"), f"{folder}/{RECORD}")
            link.faults += _changed(storage, link) if prove else []
            links[folder] = link
        link = links[folder]
        if link.record and link.record["digest"] != expected:
            found = link.record["digest"]
            link.faults.append(f"{link.uri}: {wanted_by} was made from content {expected[:16]}, found {found[:16]}")
        elif link.record and record and record_digest(link.record) != record:
            link.faults.append(
                f"{link.uri}/{RECORD} is not the record that {wanted_by} knows: its facts, configuration or what it "
                "says of its inputs changed"
            )

    for folder, expected in folders.items():
        visit(folder, expected, (records or {}).get(folder), "MLflow's run")
    return list(links.values())


def outside(link: Link) -> Iterator[tuple[str, dict]]:
    """Role and note of the inputs from outside the store."""
    return ((role, made) for role, made in link.upstream.items() if made["kind"] != "artifact")


def _artifacts(link: Link) -> list[dict]:
    return [made for made in link.upstream.values() if made["kind"] == "artifact"]


def _link(storage: Storage, folder: str) -> Link:
    """The record, if it is one and is that of its folder."""
    link = Link(folder, storage.uri(folder), None)
    name = f"{folder}/{RECORD}"
    try:
        record = json.loads(storage.read(name))
        link.faults += [f"{storage.uri(name)}: {fault}" for fault in _inconsistent(folder, record)]
        link.record = record
    except FileNotFoundError:
        link.faults.append(f"{storage.uri(name)} is missing")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        link.faults.append(f"{storage.uri(name)} is no record ({type(error).__name__}: {error})")
    return link


def _inconsistent(folder: str, record: dict) -> Iterator[str]:
    """Where a record contradicts itself or its folder."""
    made_of = dict(stage=record["stage"].split("-")[0]) | {key: record[key] for key in ("version", "config", "inputs")}
    if fingerprint(made_of) != record["fingerprint"]:
        yield f"its configuration and inputs do not give its fingerprint {record['fingerprint']}"
    if not folder.endswith(f"-{record['fingerprint']}"):
        yield f"it is of {record['fingerprint']}, which is not its folder's name"
    if listing_digest({file["name"]: file["digest"] for file in record["files"]}) != record["digest"]:
        yield "its list of files does not give its digest"
    for role, made in record.get("upstream", {}).items():
        lacking = sorted(NOTED[made["kind"] == "artifact"] - made.keys())
        if lacking:
            raise ValueError(f"its upstream {role} has no {', '.join(lacking)}")
        said = record["inputs"].get(role, "")
        if made["kind"] == "artifact" and len(said) == len(record["fingerprint"]) and said != made["fingerprint"]:
            yield f"it says that its {role} was {made['fingerprint']}, and was made from {said}"
    if "upstream" not in record:
        yield f"it does not say what was read: an earlier version made it; --rebuild {made_of['stage']}"


def _changed(storage: Storage, link: Link) -> Iterator[str]:
    """Listed files that are missing or are not what the record says."""
    for file in link.record["files"] if link.record else []:
        name = f"{link.folder}/{file['name']}"
        try:
            found = storage.digest(name)
        except FileNotFoundError:
            yield f"{storage.uri(name)} is missing"
            continue
        if found != file["digest"]:
            yield f"{storage.uri(name)} changed: SHA-256 {file['digest'][:16]} expected, {found[:16]} found"
