"""The error in a log is found, whatever libraries write after it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.common.log_errors import MARK, NO_ERROR, NOTHING, find_error

NOISE = (
    "Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]",
    "\rProcessed prompts:  50%|█████     | 1/2 [00:01<00:01,  1.02s/it]",
    "\x1b[32mINFO\x1b[0m 11-30 15:00:00 [core.py:1] Initializing an engine",
    "(EngineCore pid=12) WARNING 11-30 15:00:00 [cpu.py:1] no NUMA",
    "2026-11-30 15:00:00,123 - INFO - done",
    "[rank0]:[W1130 15:00:00.1 ProcessGroupNCCL.cpp:1496] Warning: destroy_process_group() was not called",
    "/lib/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked objects",
    "  warnings.warn('resource_tracker')",
    "",
)
ERRORS = {
    "ValueError: bad weights": "ValueError: bad weights",
    "torch.OutOfMemoryError: CUDA out of memory": "torch.OutOfMemoryError: CUDA out of memory",
    "(EngineCore pid=12) ERROR 11-30 15:00:00 [core.py:900] KeyError: 'x'": "KeyError: 'x'",
    "Fatal Python error: Segmentation fault": "Fatal Python error: Segmentation fault",
    "terminate called after throwing an instance of 'c10::Error'": "terminate called after throwing an instance of "
    "'c10::Error'",
    f"{MARK}expected a folder, found none": "expected a folder, found none",
    "ValueError: expected 100% | found 3/4 [rows]": "ValueError: expected 100% | found 3/4 [rows]",
    "OSError: weights.bin stopped at 1.2 it/s": "OSError: weights.bin stopped at 1.2 it/s",
    "ValueError: bar of [00:01<00:01,  1.02s/it] is cut": "ValueError: bar of [00:01<00:01,  1.02s/it] is cut",
    "error: 50% of 1/2 files": "error: 50% of 1/2 files",
    f"{MARK}expected 1/2 [50%|], found none": "expected 1/2 [50%|], found none",
    "out of luck": "out of luck",  # as sys.exit writes it
}


@given(st.sampled_from(sorted(ERRORS)), st.lists(st.sampled_from(NOISE)), st.lists(st.sampled_from(NOISE)))
def test_the_error_is_found_among_progress_bars_and_log_lines(error: str, before: list[str], after: list[str]) -> None:
    assert find_error("\n".join([*before, error, *after])) == ERRORS[error]


@pytest.mark.parametrize("error", [*ERRORS, "Traceback (most recent call last):\nValueError: bad"])
@pytest.mark.parametrize(
    "bar",
    [
        "Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]",
        "Processed prompts:  50%|█████     | 1/2 [1:00:01<00:01,  1.02s/it, est. speed input: 3.1 toks/s]",
        "5it [00:01,  4.20it/s]",
    ],
)
def test_an_error_on_the_line_of_an_unfinished_progress_bar_is_found(bar: str, error: str) -> None:
    assert find_error(f"{bar}{error}\n{NOISE[1]}") == ERRORS.get(error, "ValueError: bad")


@given(st.lists(st.sampled_from(NOISE)))
def test_a_log_without_an_error_says_so(noise: list[str]) -> None:
    assert find_error("\n".join(noise)) == (NO_ERROR if any(noise) else NOTHING)


@pytest.mark.parametrize(
    "reference",
    [
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        "Exception: Worker failed, please check the stack trace above for the root cause",
    ],
)
def test_an_error_that_points_to_another_one_is_not_the_cause(reference: str) -> None:
    assert find_error(f"ValueError: no room\n{reference}") == "ValueError: no room"
    assert find_error(reference) == reference


def test_an_exception_says_more_than_the_end_that_a_server_reports() -> None:
    server = "ERROR:    Traceback (most recent call last):\nOSError: no space\n\nERROR:    Application startup failed."
    assert find_error(server) == "OSError: no space"
    assert find_error("fatal: not a git repository\nusage: x") == "fatal: not a git repository"


def test_the_line_of_our_own_process_comes_before_any_other() -> None:
    assert find_error(f"{MARK}first\n{MARK}last\nValueError: at exit") == "last"


@given(st.text())
def test_any_log_gives_one_line(log: str) -> None:
    assert len(find_error(log).splitlines()) == 1
