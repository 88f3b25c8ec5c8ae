"""Finds the error in what a process wrote before it ended: libraries write progress bars and log lines after it."""

import re

MARK = "masters error: "  # begins the line that a child process of ours writes about its end
MAX_CHARACTERS = 500
NOTHING, NO_ERROR = "it wrote nothing", "it wrote no error"
CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colors and movements of the cursor
SOURCE = r"(?:\([^()]*\bpid=\d+[^()]*\)\s*|\[rank\d+\]:?\s*)*"  # which process wrote a line, as vLLM and PyTorch put it
PROGRESS = re.compile(r"\d+%\s*\||\d+%.*\d+/\d+|\d+/\d+ \[|\bit/s\b|\bs/it\b|[█▏▎▍▌▋▊▉━╸]{2}")
BAR_END = re.compile(r"\[[\d:]+(?:<[\d:?]+)?,[^\]]*/\w+[^\]]*\]")  # tqdm leaves the line open after it
LOG_LINE = re.compile(rf"{SOURCE}(?:[\d\-:.,T/ |\[\]]*\b(?:DEBUG|INFO|WARN|WARNING)\b|\[?[DIW]\d{{4}}\s)")
WARNING = re.compile(r"\w*Warning: |\s*warnings\.warn\(")
ERROR_LOG = rf"{SOURCE}(?:[\d\-:.,T/ |\[\]]*\b(?:ERROR|CRITICAL|FATAL)\b[^\]]*\]:?\s*)?"
ERROR_NAME = r"[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)|Fatal Python error|terminate called"
ERROR = re.compile(rf"{ERROR_LOG}((?:{ERROR_NAME})\b(?::| after|$).*)")
OTHER_ERROR = re.compile(rf"{SOURCE}(?:fatal|error)\b:.*", re.IGNORECASE)
# in an error that only points to another one
REFERENCE = re.compile(
    r"see (?:the )?(?:root cause|stack ?trace)|(?:stack ?trace|root cause)[\w ]* above", re.IGNORECASE
)


def find_error(log: str) -> str:
    """Return the last error in the output of a process that ended, on one line.

    It is the line that begins with `MARK`, else the last exception that does not refer to another one, else the last
    line that calls itself an error, else the last one that is neither a progress bar nor a library's log.
    """
    lines = CONTROL_SEQUENCE.sub("", log).replace(MARK, f"\n{MARK}").splitlines()
    lines = [part for line in lines for part in _split_after_bars(line.strip()) if part]
    if not lines:
        return NOTHING
    if marked := [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]:
        return marked[-1][:MAX_CHARACTERS]
    lines = [line for line in lines if not _is_noise(line)]
    errors = [found[1] for line in lines if (found := ERROR.match(line))]
    causes = [error for error in errors if not REFERENCE.search(error)]
    others = [line for line in lines if OTHER_ERROR.match(line)]
    return [NO_ERROR, *lines[-1:], *others[-1:], *errors[-1:], *causes[-1:]][-1][:MAX_CHARACTERS]


def _split_after_bars(line: str) -> list[str]:
    """Return the progress bars with which a line begins, and the text that follows them."""
    parts = []
    while not _is_error(line) and (bar := BAR_END.search(line)):
        parts.append(line[: bar.end()])
        line = line[bar.end() :].strip()
    return [*parts, line]


def _is_error(line: str) -> bool:
    return bool(line.startswith(MARK) or ERROR.match(line) or OTHER_ERROR.match(line))


def _is_noise(line: str) -> bool:
    """Return whether a line is a progress bar, a log line or a warning. An error's text may look like one."""
    return not _is_error(line) and bool(PROGRESS.search(line) or LOG_LINE.match(line) or WARNING.search(line))
