"""What a seed's faults came to, as Markdown; `python -m tests.faults.report` writes all kept seeds into the docs."""

import json
from collections import defaultdict

from tests.faults.world import ROOT, Seen, told

KEPT = ROOT / "runs" / "faults"
DOC = ROOT / "docs" / "reliability.md"
COLUMNS = ("fault", "stage", "injected", "run killed", "run failed", "run went on", "recovered", "rows lost",
           "rows twice", "rows different", "processes left")  # fmt: skip
KILLS = 60  # at least, in a whole suite
INTRODUCTION = """# Reliability

Written by `python -m tests.faults.report` from what `make test-faults` saw; not edited by hand.

Real pipelines (the stages as processes, a real trainer, a real S3 server behind a proxy of the tests) are disturbed at
moments that a seed chooses and replays. After each fault the same command runs again, undisturbed. Then every file of
every finished artifact must have the SHA-256 of its record, every table every key of an undisturbed run's once with an
equal row, the trained weights must be equal bit for bit, and no process may be left. "Run failed": it ended with one
line and exit code 1. "Run went on": it needed no second start.
"""


def keep(seed: int, seen: list[Seen]) -> str:
    """Write a seed's results down and give its report; of tests that did not run now what was kept before stays."""
    KEPT.mkdir(parents=True, exist_ok=True)
    file, rows = KEPT / f"{seed}.json", told(seen)
    ran = {row["test"] for row in rows}
    before = json.loads(file.read_text()) if file.exists() else []
    rows = [row for row in before if row["test"] not in ran] + rows
    file.write_text(json.dumps(rows, indent=1))
    return "\n" + table(seed, rows)


def table(seed: int, rows: list[dict]) -> str:
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["kind"], row["stage"]].append(row)
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for (kind, stage), group in sorted(groups.items()):
        lines.append(f"| {kind} | {stage} | {' | '.join(map(str, _counts(group)))} |")
    lines.append(f"| **all** | | {' | '.join(f'**{count}**' for count in _counts(rows))} |")
    kills = sum(row["signal"] for row in rows)
    kinds = len({row["kind"].split(",")[0] for row in rows})
    seconds = sum(row["seconds"] for row in rows)
    part = "" if kills >= KILLS else " (only a part of the suite was run)"
    head = f"## Seed {seed}: {len(rows)} faults, {kills} of them kills, {kinds} kinds, {seconds:.0f} s{part}"
    return "\n".join([head, "", *lines, ""])


def _counts(rows: list[dict]) -> list[int]:
    outcomes = [row["outcome"] for row in rows]
    verdicts = [row["verdict"] for row in rows]
    return [
        len(rows), *(outcomes.count(outcome) for outcome in ("killed", "failed", "went on")),
        sum(row["recovered"] and not row["verdict"]["wrong"] for row in rows),
        *(sum(verdict[name] for verdict in verdicts) for name in ("lost", "twice", "different")),
        sum(row["left"] for row in rows),
    ]  # fmt: skip


def main() -> None:
    kept = sorted(KEPT.glob("*.json"), key=lambda file: int(file.stem))
    DOC.write_text("\n".join([INTRODUCTION, *(table(int(f.stem), json.loads(f.read_text())) for f in kept)]))
    print(DOC)


if __name__ == "__main__":
    main()
