"""Reports the outcomes of injected faults as Markdown tables.

`python -m tests.faults.report SEED` writes runs/faults/SEED.md, a row for each kind of fault and stage, and prints it.
Without a seed it prints one table of all kept seeds, a row for each kind of fault, for docs/reliability.md.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable

from filelock import FileLock

from masters.common.files import write_atomically
from tests.faults.disturbed_runs import ROOT, Seen, told

KEPT = ROOT / "runs" / "faults"
COUNTS = ("injected", "SIGKILLs", "run killed", "run failed", "run went on", "recovered", "rows lost", "rows twice",
          "rows different", "processes left")  # fmt: skip
KILLS = 60  # at least, in a whole suite
KINDS = 12


def keep(seed: int, seen: list[Seen], tests: set[str], of: int) -> None:
    """Store a seed's results. Stored results of tests that did not run now stay.

    `tests` are the names of the tests that ran, `of` is the number of tests in the suite.
    """
    KEPT.mkdir(parents=True, exist_ok=True)
    file, rows = KEPT / f"{seed}.json", told(seen)
    ran = {row["test"] for row in rows}
    with FileLock(KEPT / "lock"):
        before = kept(seed) if file.exists() else dict(rows=[], tests=[])
        rows = [row for row in before["rows"] if row["test"] not in ran] + rows
        results = dict(of=of, tests=sorted(tests.union(before["tests"])), rows=rows)
        write_atomically(file, json.dumps(results, indent=1))


def kept(seed: int) -> dict:
    """Return a seed's stored results: `rows` (one per fault), the `tests` that ran, and the number `of` all tests."""
    return json.loads((KEPT / f"{seed}.json").read_text())


def kind(row: dict) -> str:
    """Return a fault's kind without the details after a comma."""
    return row["kind"].split(",")[0]


def kinds(rows: list[dict]) -> int:
    return len({kind(row) for row in rows})


def kills(rows: list[dict]) -> int:
    return sum(row["signal"] for row in rows)


def wrong(rows: list[dict]) -> list[dict]:
    """Return the faults after which the result differs from that of an undisturbed run."""
    return [row for row in rows if not row["recovered"] or any(row["verdict"].values()) or row["left"]]


def of_seed(seed: int, saw: dict) -> str:
    """Return a heading and a table with a row for each kind of fault and stage."""
    rows, ran = saw["rows"], len(saw["tests"])
    share = f"all {ran} tests" if ran >= saw["of"] else f"only {ran} of {saw['of']} tests"
    found = f"{len(rows)} faults, {kills(rows)} of them kills, {kinds(rows)} kinds"
    head = f"## Seed {seed}, {share}: {found}; tests of {sum(row['seconds'] for row in rows):.0f} s"
    return f"{head}\n\n{table(rows, ('fault', 'stage'), lambda row: (row['kind'], row['stage']))}"


def of_all(seeds: dict[int, dict]) -> str:
    """Return a table with a row for each kind of fault, summed over seeds."""
    rows = [row for saw in seeds.values() for row in saw["rows"]]
    return table(rows, ("fault",), lambda row: (kind(row),))


def table(rows: list[dict], names: tuple[str, ...], key: Callable[[dict], tuple[str, ...]]) -> str:
    """Return a Markdown table with counts for each key, and totals."""
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
