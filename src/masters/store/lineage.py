"""Walks and verifies the lineage of artifacts from the store alone: the records upstream and the files they list.

A record refers to each input by folder, fingerprint and digests. So the files of an artifact are checked against its
record, and its record against the records of the artifacts that read it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from masters.common.hashing import fingerprint
from masters.store.artifacts import RECORD, listing_digest, record_digest
from masters.store.storage import Storage

# fields of a record's reference to an input, by whether the input is an artifact
REFERENCE_FIELDS = {True: {"stage", "folder", "fingerprint", "digest"}, False: {"uri", "digest"}}


@dataclass
class LineageNode:
    """An artifact in a lineage: its place, its record (None if unreadable) and the faults found in it."""

    folder: str
    uri: str
    record: dict | None
    faults: list[str] = field(default_factory=list)

    @property
    def upstream(self) -> dict[str, dict]:
        """References to the inputs, by role."""
        return (self.record or {}).get("upstream", {})


def walk(
    storage: Storage, folders: dict[str, str], verify_files: bool = True, records: dict[str, str] | None = None
) -> list[LineageNode]:
    """Return the artifacts in `folders` and everything upstream of them, inputs before the artifacts that read them.

    `folders` maps each folder to the expected digest of its files, `records` to that of its record. `verify_files`
    reads every listed file. Missing and changed files do not raise: they are in the nodes' `faults`.
    """
    nodes: dict[str, LineageNode] = {}

    def visit(folder: str, expected: str, record: str | None, reader: str) -> None:
        if folder not in nodes:
            node = _read_node(storage, folder)
            for reference in _artifact_references(node):
                visit(reference["folder"], reference["digest"], reference.get("record"), f"{folder}/{RECORD}")
            node.faults += _file_faults(storage, node) if verify_files else []
            nodes[folder] = node
        node = nodes[folder]
        if node.record and node.record["digest"] != expected:
            found = node.record["digest"]
            node.faults.append(f"{node.uri}: {reader} was made from content {expected[:16]}, found {found[:16]}")
        elif node.record and record and record_digest(node.record) != record:
            node.faults.append(
                f"{node.uri}/{RECORD} is not the record that {reader} refers to: its facts, configuration or "
                "inputs changed"
            )

    for folder, expected in folders.items():
        visit(folder, expected, (records or {}).get(folder), "MLflow's run")
    return list(nodes.values())


def external_inputs(node: LineageNode) -> Iterator[tuple[str, dict]]:
    """Yield role and reference of each input from outside the store."""
    return ((role, reference) for role, reference in node.upstream.items() if reference["kind"] != "artifact")


def _artifact_references(node: LineageNode) -> list[dict]:
    return [reference for reference in node.upstream.values() if reference["kind"] == "artifact"]


def _read_node(storage: Storage, folder: str) -> LineageNode:
    """Read the record of a folder and check that it is consistent."""
    node = LineageNode(folder, storage.uri(folder), None)
    name = f"{folder}/{RECORD}"
    try:
        record = json.loads(storage.read(name))
        node.faults += [f"{storage.uri(name)}: {fault}" for fault in _record_faults(folder, record)]
        node.record = record
    except FileNotFoundError:
        node.faults.append(f"{storage.uri(name)} is missing")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        node.faults.append(f"{storage.uri(name)} is not a valid record ({type(error).__name__}: {error})")
    return node


def _record_faults(folder: str, record: dict) -> Iterator[str]:
    """Yield each contradiction within a record or with its folder."""
    identity = dict(stage=record["stage"].split("-")[0]) | {key: record[key] for key in ("version", "config", "inputs")}
    if fingerprint(identity) != record["fingerprint"]:
        yield f"its configuration and inputs do not give its fingerprint {record['fingerprint']}"
    if not folder.endswith(f"-{record['fingerprint']}"):
        yield f"its fingerprint {record['fingerprint']} is not in its folder's name"
    if listing_digest({file["name"]: file["digest"] for file in record["files"]}) != record["digest"]:
        yield "its list of files does not give its digest"
    for role, reference in record.get("upstream", {}).items():
        missing = sorted(REFERENCE_FIELDS[reference["kind"] == "artifact"] - reference.keys())
        if missing:
            raise ValueError(f"its upstream {role} has no {', '.join(missing)}")
        declared = record["inputs"].get(role, "")
        is_fingerprint = reference["kind"] == "artifact" and len(declared) == len(record["fingerprint"])
        if is_fingerprint and declared != reference["fingerprint"]:
            yield f"its upstream {role} is {reference['fingerprint']}, but its inputs name {declared}"
    if "upstream" not in record:
        yield f"it has no upstream, as an earlier version made it; rebuild it with --rebuild {identity['stage']}"


def _file_faults(storage: Storage, node: LineageNode) -> Iterator[str]:
    """Yield each listed file that is missing or differs from the record."""
    for file in node.record["files"] if node.record else []:
        name = f"{node.folder}/{file['name']}"
        try:
            found = storage.digest(name)
        except FileNotFoundError:
            yield f"{storage.uri(name)} is missing"
            continue
        if found != file["digest"]:
            yield f"{storage.uri(name)} changed: SHA-256 {file['digest'][:16]} expected, {found[:16]} found"
