"""Compares a store with that of an undisturbed run: lost, duplicate and different rows, and changed files."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from masters.common.hashing import digest
from masters.store import tables as schemas
from masters.store.artifacts import RECORD
from masters.store.storage import Storage

REBUILT = "rebuilt-"  # says which run built it again
RESPONSE = tuple(name for name, _ in schemas.RESPONSE_KEY)
KEYS = {
    "questions": ("question_id",), "rejected": ("id", "reason"), "thresholds": ("tensor", "mask_ratio"),
    "responses": RESPONSE, "verdicts": RESPONSE, "history": ("step",), "rewards": ("step", *RESPONSE),
    "predictions": ("model", "question_id"), "plan": ("asker", "question_id"),
}  # fmt: skip
Row = tuple[tuple[str, Any], ...]
Finished = dict[str, dict]  # by an artifact's folder: its tables as lists of rows, and its other files' digests


@dataclass
class Verdict:
    """Counts of differences, all zero if the store is right; `wrong` lists other faults."""

    lost: int = 0
    twice: int = 0
    different: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return not (self.lost or self.twice or self.different or self.wrong)


def finished(storage: Storage) -> tuple[Finished, list[str]]:
    """Return all artifacts with a record, and their files that differ from it."""
    found, wrong = {}, []
    for name in storage.names(""):
        if name.startswith("shards/") or not name.endswith(f"/{RECORD}"):
            continue
        folder = name.removesuffix(f"/{RECORD}")
        listed = json.loads(storage.read(name))["files"]
        tables: dict[str, list[dict]] = {}
        others = {}
        for file in listed:
            data = storage.read(f"{folder}/{file['name']}")
            if digest(data) != file["digest"]:
                wrong.append(f"{folder}/{file['name']} is not what the record says")
            table = file["name"].split("/")[0]
            if table in KEYS:
                tables.setdefault(table, []).extend(schemas.decode(data).to_pylist())
            else:
                others[file["name"]] = file["digest"]
        found[folder] = dict(tables=tables, others=others)
        extra = set(storage.names(folder)) - {f"{folder}/{f['name']}" for f in listed} - {name}
        wrong += [f"{name} is in no record" for name in sorted(extra) if not name.startswith(f"{folder}/{REBUILT}")]
    return found, wrong


def compare(expected: Finished, storage: Storage) -> Verdict:
    """Compare every artifact of `expected` row by row. Files that are not tables must have equal bytes."""
    found, wrong = finished(storage)
    verdict = Verdict(wrong=wrong)
    for folder, artifact in expected.items():
        if folder not in found:
            verdict.lost += sum(map(len, artifact["tables"].values()))
            verdict.wrong.append(f"{folder} is not finished")
            continue
        for table, rows in artifact["tables"].items():
            _rows(verdict, table, rows, found[folder]["tables"].get(table, []))
        others = found[folder]["others"]
        verdict.wrong += [f"{folder}/{n} differs" for n, d in artifact["others"].items() if others.get(n) != d]
    return verdict


def _rows(verdict: Verdict, table: str, expected: list[dict], found: list[dict]) -> None:
    def key(row: dict) -> tuple:
        return tuple(row[name] for name in KEYS[table])

    ours, theirs = {key(row): repr(row) for row in found}, {key(row): repr(row) for row in expected}
    counts = Counter(map(key, found))
    assert len(theirs) == len(expected), table
    verdict.lost += len(theirs.keys() - ours.keys())
    verdict.twice += sum(count - 1 for count in counts.values())
    verdict.different += sum(row != theirs.get(which) for which, row in ours.items())
