"""The training signal: how many responses, questions and groups a student learns little from.

Ours. The stages generate, score and train keep these shares in their records as the fact `signal`; `build_or_reuse`
reports them. The shares, their limits and what to do are described in docs/watching.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute

from masters.rewards.verdict import RIGHT
from masters.store import tables
from masters.store.storage import Storage
from masters.tasks.progress import warn
from masters.tracking.run_writer import RunWriter

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import
Shares = dict[str, float]  # by name in `LIMITS`; a share of nothing is left out
MODEL_KEY = ["question_id", "source", "mask_ratio"]  # the responses of one model to one question


@dataclass(frozen=True)
class Limit:
    """A warning is given if a share is larger than `share`."""

    share: float
    subject: str
    advice: str

    def message(self, share: float) -> str:
        return f"{share:.1%} of the {self.subject} (limit {self.share:.0%}): {self.advice}"


LIMITS = {
    "truncated": Limit(
        0.1,
        "responses are cut off at the length limit",
        "raise generate.max_tokens; generate.truncated says what training does with them",
    ),
    "empty": Limit(
        0.05,
        "responses have no text",
        "look at the model's chat template and at the end tokens in its generation_config.json",
    ),
    "identical": Limit(
        0.95,
        "responses are what the same model answers to the question every time",
        "raise generate.temperature; equal responses have no advantage over one another",
    ),
    "all_wrong": Limit(
        0.5,
        "questions have no right response",
        "look at the responses: the questions may be too hard, or answers.verifier or the judge may not read them",
    ),
    "all_right": Limit(
        0.9,
        "questions have only right responses",
        "harder questions teach more; a verifier or judge that accepts everything looks the same",
    ),
    "no_advantage": Limit(
        0.9,
        "groups have no advantage, so that only the distillation term trains the student",
        "look at the shares of identical responses and of questions all right or all wrong",
    ),
}


def response_shares(storage: Storage, files: Iterable[str]) -> Shares:
    """Return the shares of truncated, empty and identical responses in these files of the table `responses`.

    A response is identical if a model gave two or more to the question and all have one text. Prompts that were too
    long are left out.
    """
    responses = truncated = empty = repeatable = identical = 0
    for name in files:
        rows = tables.read(storage, name, [*MODEL_KEY, "text", "finish_reason"])
        finish_reason = pc.fill_null(rows["finish_reason"], "")
        rows = rows.filter(pc.not_equal(finish_reason, tables.PROMPT_TOO_LONG))
        responses += rows.num_rows
        truncated += _count(pc.equal(rows["finish_reason"], tables.TRUNCATED))
        empty += _count(pc.equal(pc.utf8_trim_whitespace(rows["text"]), ""))
        groups = rows.group_by(MODEL_KEY, use_threads=False).aggregate([("text", "count"), ("text", "count_distinct")])
        groups = groups.filter(pc.greater(groups["text_count"], 1))
        repeatable += pc.sum(groups["text_count"]).as_py() or 0
        identical += pc.sum(groups.filter(pc.equal(groups["text_count_distinct"], 1))["text_count"]).as_py() or 0
    shares = {"truncated": truncated / responses, "empty": empty / responses} if responses else {}
    return shares | ({"identical": identical / repeatable} if repeatable else {})


def _count(is_counted: Any) -> int:
    return pc.sum(is_counted).as_py() or 0


class QuestionVerdicts:
    """Collects verdicts and returns the shares of questions whose responses are all wrong, or all right."""

    def __init__(self) -> None:
        self._right: set[str] = set()
        self._wrong: set[str] = set()

    def add(self, question_id: str, score: float | None) -> None:
        """Add the verdict on a response. One without a score does not count."""
        if score is not None:
            (self._right if score >= RIGHT else self._wrong).add(question_id)

    @property
    def shares(self) -> Shares:
        if not (judged := len(self._right | self._wrong)):
            return {}
        return {
            "all_wrong": len(self._wrong - self._right) / judged,
            "all_right": len(self._right - self._wrong) / judged,
        }


def advantage_shares(steps: Iterable[Mapping]) -> Shares:
    """Return the share of groups without an advantage, from rows of `history`; empty for objectives without rewards."""
    groups = without = 0.0
    for step in steps:
        if (with_advantage := step["questions_with_advantage"]) is not None:
            groups += step["questions"]
            without += step["questions"] * (1 - with_advantage)
    return {"no_advantage": without / groups} if groups else {}


def crossed_limits(shares: Shares) -> dict[str, str]:
    """Return the messages about shares that are larger than their limits, by name."""
    return {name: LIMITS[name].message(share) for name, share in shares.items() if share > LIMITS[name].share}


def report_signal(tracker: RunWriter, stage: str, shares: Shares) -> None:
    """Log a stage's shares as metrics, and warn of those above their limits."""
    if not shares:
        return
    tracker.log_metrics({f"signal_{name}": share for name, share in shares.items()}, 0)
    for name, message in crossed_limits(shares).items():
        warn(f"{stage}: {message}")
        tracker.log_warning(f"signal_{name}", message)
