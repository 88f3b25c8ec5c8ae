"""Follows the events of trainer processes: the progress shown, metrics in MLflow, and facts for the record."""

import math

from masters.models.training.job import (
    CheckpointRefused,
    LimitCrossed,
    ModelsLoaded,
    PassesPacked,
    ProbeMeasured,
    ReferenceProgress,
    RestartRequested,
    RolledBack,
    StepFinished,
    StudentExported,
    TeacherMasked,
    TokenBudgetLowered,
    TrainingPlanned,
    TrainingResumed,
    parse_event,
)
from masters.tasks.progress import Progress, warn
from masters.tasks.run_context import Run


class TrainingMonitor:
    """Receives the trainers' lines of progress; `steps_before`: steps of the round before this training."""

    def __init__(self, run: Run, progress: Progress, mask_ratios: list[float], steps_before: int = 0) -> None:
        self._run, self._progress, self._mask_ratios = run, progress, mask_ratios
        self._steps_before = steps_before
        self.groups = self.steps = self.empty_responses = self.resumed_at_step = 0
        self.planned: dict[str, int] = {}  # passes and the tokens of the largest
        self.models: dict = {}  # processes, and how they hold the weights
        self.packed: dict = {}  # passes that were taken, see `_packing_shares`
        self.last_step: dict[str, float] = {}
        self.probes: list[dict] = []  # step, accuracy
        self.warnings: list[dict] = []  # limits that the run crossed, each once: step, name, text
        self.remask_seconds: list[float] = []  # one for each mask stage
        self.token_budgets: list[dict] = []  # each rank that ran out of memory, and its token budget from then on
        self.restart_budgets: list[int] = []  # token budgets that ranks request a restart of all ranks with
        self.rolled_back: dict | None = None
        self.refused_checkpoints: list[str] = []  # reasons
        self.dropped_settings: list[str] = []  # of the student's generation_config.json

    @property
    def steps_taken(self) -> int:
        """Steps that this training took; fewer than planned if it was rolled back."""
        return self.rolled_back["at"] - self._steps_before if self.rolled_back else self.steps

    def __call__(self, _: str, line: dict) -> None:
        """Take in one line of a trainer's progress."""
        match parse_event(line):
            case TrainingPlanned() as event:
                self.groups, self.steps, self.empty_responses = event.groups, event.steps, event.empty_responses
                self.planned = event.planned
            case ModelsLoaded() as event:
                self.models = event.model_dump(exclude={"event"})
            case TrainingResumed() as event:
                self.resumed_at_step = event.step
                self.probes = [probe for probe in self.probes if probe["step"] <= event.step]
            case CheckpointRefused() as event:
                self.refused_checkpoints.append(event.reason)
                warn(f"{event.reason}; training continues from the one before")
            case ReferenceProgress() as event:
                self._progress.update(0, self.steps, f"reference log-probabilities {event.done / event.total:.0%}")
            case TeacherMasked() as event:
                self.remask_seconds.append(round(event.seconds, 3))
            case StepFinished() as event:
                self._record_step(event)
            case ProbeMeasured() as event:
                self.probes.append(event.model_dump(exclude={"event"}))
                self._run.tracker.log_metrics({"probe_accuracy": event.accuracy}, event.step)
            case LimitCrossed() as event:
                self._record_warning(event)
            case RolledBack() as event:
                self.rolled_back = event.model_dump(exclude={"event"})
            case TokenBudgetLowered() as event:
                self.token_budgets.append(event.model_dump(exclude={"event"}))
            case RestartRequested() as event:
                self.token_budgets.append(event.model_dump(exclude={"event"}))
                self.restart_budgets.append(event.tokens)
            case PassesPacked() as event:
                self.packed = _packing_shares(event)
            case StudentExported(dropped_settings=names) if names:
                self.dropped_settings = names
                warn(
                    f"train: {', '.join(names)} of the student's generation_config.json are not in that of the trained "
                    "student, which holds its special tokens alone: neither training nor evaluation used them"
                )

    def _record_step(self, event: StepFinished) -> None:
        ratio = self._mask_ratios[event.stage]
        values = (
            dict(stage=event.stage, epoch=event.epoch, seconds=event.seconds) | event.means | dict(mask_ratio=ratio)
        )
        self.last_step = {name: value for name, value in values.items() if math.isfinite(value)}
        self._run.tracker.log_metrics(self.last_step, event.step)
        self._progress.update(event.step, event.total, f"loss {event.means['loss']:.4f} mask {ratio:.2f}")

    def _record_warning(self, event: LimitCrossed) -> None:
        if any(warning["name"] == event.name for warning in self.warnings):
            return  # a resumed trainer reports it again
        self.warnings.append(event.model_dump(exclude={"event"}))
        warn(f"train, step {event.step}: {event.text}")
        self._run.tracker.log_warning(event.name, f"step {event.step}: {event.text}")


def _packing_shares(sizes: PassesPacked) -> dict:
    """Return the passes, their tokens, the share of padding, and the share that packing saves."""
    return dict(
        passes=sizes.passes,
        tokens=sizes.packed_tokens,
        padding_share=round(1 - sizes.packed_tokens / max(1, sizes.padded), 4),
        saved_share=round(1 - sizes.packed_tokens / max(1, sizes.separate), 4),
    )
