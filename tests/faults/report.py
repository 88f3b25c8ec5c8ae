"""What a seed's faults came to, as Markdown: `python -m tests.faults.report SEED` prints it.

Without a seed all that are kept are written into the docs.
"""

import fcntl
import json
import sys
from collections import defaultdict

from tests.faults.world import ROOT, Seen, told

KEPT = ROOT / "runs" / "faults"
DOC = ROOT / "docs" / "reliability.md"
COLUMNS = ("fault", "stage", "injected", "SIGKILLs", "run killed", "run failed", "run went on", "recovered",
           "rows lost", "rows twice", "rows different", "processes left")  # fmt: skip
KILLS = 60  # at least, in a whole suite
KINDS = 12
INTRODUCTION = """# Reliability

Written by `python -m tests.faults.report` from what `make test-faults` saw; not edited by hand.

Real runs are disturbed at moments that a seed chooses and replays: the N-th thing that a process does to the store, by
the process itself, or the N-th request to a real S3 server, by a proxy in front of it. Most runs are the stages one
after the other in a process of their own, with real trainers and judge workers as its children, and with responses and
predictions written by hand, so that no engine needs to start; evaluate and register are killed in a copy of a store
that was trained in. The judge is a small server of the tests. A whole distillation as a user starts it, with vLLM
engines, a Prefect server and an MLflow server, is killed by its engine at the write of a shard; then it loses two
engines and a trainer and goes on. Runs that train lose each server for a while.

A run that rebuilds is killed and tried again under its own name: what it had built again stays. A shard that a power
cut left empty or cut short is found, removed and made again.

Not at the N-th operation but on a condition start: two runs at once (two commands, two machines, one that rebuilds, one
that is killed while the other waits), a server that goes away once training has begun, a Prefect worker that is killed,
alone and with its run, while the run trains.

After each fault the same command runs again, undisturbed, unless the run ended well by itself. Then every file of
every finished artifact must have the SHA-256 of its record, every table every key of an undisturbed run's once with an
equal row, the trained weights must be equal bit for bit, and no process may be left. "SIGKILLs": processes ended so,
the run's own or one of its children. "Run failed": it ended with one line and exit code 1, as it must where a child is
lost and nobody retries. "Run went on": it needed no second start, as it must after whatever passes: answers of 500 and
503, time-outs, cut connections, lost answers, servers away, clocks set.
"""


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


def kinds(rows: list[dict]) -> int:
    return len({row["kind"].split(",")[0] for row in rows})


def kills(rows: list[dict]) -> int:
    return sum(row["signal"] for row in rows)


def wrong(rows: list[dict]) -> list[dict]:
    """Faults after which something was not as an undisturbed run leaves it."""
    return [row for row in rows if not row["recovered"] or any(row["verdict"].values()) or row["left"]]


def table(seed: int, saw: dict) -> str:
    rows, ran = saw["rows"], len(saw["tests"])
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["kind"], row["stage"]].append(row)
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for (kind, stage), group in sorted(groups.items()):
        lines.append(f"| {kind} | {stage} | {' | '.join(map(str, _counts(group)))} |")
    lines.append(f"| **all** | | {' | '.join(f'**{count}**' for count in _counts(rows))} |")
    seconds = sum(row["seconds"] for row in rows)
    share = f"all {ran} tests" if ran >= saw["of"] else f"only {ran} of {saw['of']} tests"
    found = f"{len(rows)} faults, {kills(rows)} of them kills, {kinds(rows)} kinds; tests of {seconds:.0f} s"
    head = f"## Seed {seed}, {share}: {found}"
    return "\n".join([head, "", *lines, ""])


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
        print(table(int(seed), kept(int(seed))))
        return
    seeds = sorted(int(file.stem) for file in KEPT.glob("*.json"))
    DOC.write_text("\n".join([INTRODUCTION, *(table(seed, kept(seed)) for seed in seeds)]))
    print(DOC)


if __name__ == "__main__":
    main(*sys.argv[1:])
