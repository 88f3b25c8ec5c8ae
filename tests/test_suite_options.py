"""The suite's parts hold every file once and take about the same time; a skipped test fails where none may be."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.suite_options import parts

OPTIONS = ["-p", "tests.suite_options", "-p", "no:cacheprovider", "-q"]
TESTS = """
import pytest

def test_runs(): pass

@pytest.mark.skipif({skip}, reason="no browser here")
def test_needs_a_browser(): pass
"""


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 1000)), st.integers(1, 6))
def test_parts_hold_every_file_once_and_take_about_the_same_time(seconds: dict[str, float], count: int) -> None:
    found = parts(seconds, count)
    assert len(found) == count and sorted(file for part in found for file in part) == sorted(seconds)
    totals = [sum(seconds[file] for file in part) for part in found]
    assert max(totals) - min(totals) <= max(seconds.values(), default=0) + 1e-6


def run(folder: Path, *options: str, skip: bool = False) -> subprocess.CompletedProcess:
    for name in ("test_a.py", "test_b.py"):
        (folder / name).write_text(TESTS.format(skip=skip))
    command = [sys.executable, "-m", "pytest", *OPTIONS, *options, f"--rootdir={folder}", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(("skip", "code"), [(True, 1), (False, 0)])
def test_a_skipped_test_fails_the_suite_where_none_may_be(tmp_path: Path, skip: bool, code: int) -> None:
    done = run(tmp_path, "--fail-on-skip", skip=skip)
    assert done.returncode == code, done.stdout
    assert ("test_a.py::test_needs_a_browser: Skipped: no browser here" in done.stdout) == skip
    assert run(tmp_path, skip=skip).returncode == 0


def test_two_parts_run_each_test_once(tmp_path: Path) -> None:
    found = [run(tmp_path, "--part", f"{number}/2", "-vv").stdout for number in (1, 2)]
    ran = [line.split()[0] for output in found for line in output.splitlines() if " PASSED" in line]
    assert len(ran) == len(set(ran)) == 4


@pytest.mark.parametrize("part", ["0/4", "5/4", "4", "a/b", "1/0"])
def test_a_part_that_is_not_there_is_refused(tmp_path: Path, part: str) -> None:
    done = run(tmp_path, "--part", part)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "expected K/N" in done.stderr
