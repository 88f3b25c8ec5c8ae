"""Reports what became of injected faults, as Markdown tables.

`python -m tests.faults.report SEED` writes runs/faults/SEED.md, a row for each kind of fault and stage, and prints it.
Without a seed it prints one table of all kept seeds, a row for each kind of fault, for docs/reliability.md.
"""

import fcntl
import json
import sys
from collections import defaultdict
from collections.abc import Callable

from tests.faults.world import ROOT, Seen, told

KEPT = ROOT / "runs" / "faults"
COUNTS = ("injected", "SIGKILLs", "run killed", "run failed", "run went on", "recovered", "rows lost", "rows twice",
          "rows different", "processes left")  # fmt: skip
KILLS = 60  # at least, in a whole suite
KINDS = 12


def keep(seed: int, seen: list[Seen], tests: set[str], of: int) -> None:
    """Write a seed's results down; of tests that did not run here what was kept, by others or before, stays.

    `tests`: the names of those that ran; `of`: how many the suite has.
    """
    KEPT.mkdir(parents=True, exist_ok=True)
    file, rows = KEPT / f"{seed}.json", told(seen)
    ran = {row["test"] for row in rows}
    with open(KEPT / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = kept(seed) if file.exists() else dict(rows=[], tests=[])
        rows = [row for row in before["rows"] if row["test"] not in ran] + rows
        saw = dict(of=of, tests=sorted(tests.union(before["tests"])), rows=rows)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(saw, indent=1))
        new.replace(file)  # who reads it meanwhile reads it whole


def kept(seed: int) -> dict:
    """What a seed's tests saw, also in earlier sessions: `rows`, one a fault; `tests` that ran, `of` how many."""
    return json.loads((KEPT / f"{seed}.json").read_text())


def kind(row: dict) -> str:
    """A fault's kind without the circumstances that follow a comma."""
    return row["kind"].split(",")[0]


def kinds(rows: list[dict]) -> int:
    return len({kind(row) for row in rows})


def kills(rows: list[dict]) -> int:
    return sum(row["signal"] for row in rows)


def wrong(rows: list[dict]) -> list[dict]:
    """Faults after which something was not as an undisturbed run leaves it."""
    return [row for row in rows if not row["recovered"] or any(row["verdict"].values()) or row["left"]]


def of_seed(seed: int, saw: dict) -> str:
    """A heading and a row for each kind of fault and stage."""
    rows, ran = saw["rows"], len(saw["tests"])
    share = f"all {ran} tests" if ran >= saw["of"] else f"only {ran} of {saw['of']} tests"
    found = f"{len(rows)} faults, {kills(rows)} of them kills, {kinds(rows)} kinds"
    head = f"## Seed {seed}, {share}: {found}; tests of {sum(row['seconds'] for row in rows):.0f} s"
    return f"{head}\n\n{table(rows, ('fault', 'stage'), lambda row: (row['kind'], row['stage']))}"


def of_all(seeds: dict[int, dict]) -> str:
    """A row for each kind of fault, summed over seeds."""
    rows = [row for saw in seeds.values() for row in saw["rows"]]
    return table(rows, ("fault",), lambda row: (kind(row),))


def table(rows: list[dict], names: tuple[str, ...], key: Callable[[dict], tuple[str, ...]]) -> str:
    """A Markdown table of what the rows of each key came to, and their totals."""
    groups: dict[tuple[str, ...], list[dict]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    columns = (*names, *COUNTS)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join([*name, *map(str, _counts(groups[name]))])} |" for name in sorted(groups)]
    total = ["**all**", *[""] * (len(names) - 1), *(f"**{count}**" for count in _counts(rows))]
    return "\n".join([*lines, f"| {' | '.join(total)} |", ""])


def _counts(rows: list[dict]) -> list[int]:
    outcomes = [row["outcome"] for row in rows]
    verdicts = [row["verdict"] for row in rows]
    return [
        len(rows), kills(rows), *(outcomes.count(outcome) for outcome in ("killed", "failed", "went on")),
        sum(row["recovered"] and not row["verdict"]["wrong"] for row in rows),
        *(sum(verdict[name] for verdict in verdicts) for name in ("lost", "twice", "different")),
        sum(row["left"] for row in rows),
    ]  # fmt: skip


def main(seed: str | None = None) -> None:
    if seed:
        text = of_seed(int(seed), kept(int(seed)))
        (KEPT / f"{seed}.md").write_text(text)
    else:
        text = of_all({int(file.stem): kept(int(file.stem)) for file in KEPT.glob("*.json")})
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
