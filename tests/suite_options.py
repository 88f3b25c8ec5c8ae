"""Options of the whole suite: one part of it, failing on skipped tests, and where the time goes.

A pytest plugin, loaded by tests/conftest.py. Files are kept whole, because their tests share what is slow to build.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest

SECONDS = Path(__file__).with_name("seconds.json")  # by file, of its slow tests; written by `make test-durations`
UNKNOWN = 30.0  # seconds, for a file that was not measured yet
SLOWEST = 30


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("masters")
    group.addoption("--part", metavar="K/N", help="run only part K of N parts that take about the same time")
    group.addoption("--fail-on-skip", action="store_true", help="fail if a test was skipped")
    group.addoption("--write-seconds", action="store_true", help=f"write the time of each file to {SECONDS.name}")


def parts(seconds: dict[str, float], count: int) -> list[list[str]]:
    """Divide files into `count` parts of about the same time: the longest first, each to the shortest part so far."""
    made: list[list[str]] = [[] for _ in range(count)]
    for file in sorted(seconds, key=lambda file: (-seconds[file], file)):
        min(made, key=lambda part: (sum(seconds[other] for other in part), made.index(part))).append(file)
    return made


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the part that is asked for, and sort the longest files first: then both processes end at the same time."""
    measured: dict[str, float] = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
    slow = {_file(item) for item in items if item.get_closest_marker("slow")}
    seconds = {_file(item): measured.get(_file(item), UNKNOWN if _file(item) in slow else 0.0) for item in items}
    if asked := config.getoption("part"):
        number, _, count = asked.partition("/")
        if not (count.isdigit() and number.isdigit() and 1 <= int(number) <= int(count)):
            raise pytest.UsageError(f"--part: expected K/N with 1 <= K <= N, found {asked!r}")
        chosen = set(parts(seconds, int(count))[int(number) - 1])
        config.hook.pytest_deselected(items=[item for item in items if _file(item) not in chosen])
        items[:] = [item for item in items if _file(item) in chosen]
    items.sort(key=lambda item: -seconds[_file(item)])


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config, stats = terminalreporter.config, terminalreporter.stats
    if config.getoption("write_seconds"):
        spent: dict[str, dict[str, float]] = {"suite": defaultdict(float), "file": defaultdict(float)}
        for report in (report for reports in stats.values() for report in reports if hasattr(report, "duration")):
            file = report.nodeid.partition("::")[0]
            if "slow" in report.keywords:
                spent["file"][file] += report.duration
            spent["suite"][str(Path(file).parent)] += report.duration
        terminalreporter.section("seconds by suite")
        for suite, seconds in sorted(spent["suite"].items(), key=lambda row: -row[1]):
            terminalreporter.line(f"{seconds:8.1f}  {suite}")
        files = {file: round(seconds, 1) for file, seconds in sorted(spent["file"].items()) if seconds > 1}
        SECONDS.write_text(json.dumps(files, indent=1) + "\n")
    if config.getoption("fail_on_skip") and stats.get("skipped"):
        terminalreporter.section("skipped, which --fail-on-skip forbids", red=True)
        for report in stats["skipped"]:
            terminalreporter.line(f"{report.nodeid}: {report.longrepr[2] if report.longrepr else ''}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and session.config.getoption("fail_on_skip") and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
