"""The training behind `loss_curve.json`: 20 steps of the method on tiny random models.

`make golden` writes the file again: only after a change of the method's definition, never to make a test pass.
"""

import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from masters.config import Train
from masters.models.masking import apply_mask, is_masked, magnitude_thresholds
from masters.models.packing.prefix_tree import TokenCounts
from masters.models.training import trainer
from masters.models.training.groups import Step
from masters.models.training.history import HistoryWriter
from masters.models.training.job import StepFinished, TrainEvent
from masters.store.storage import Storage
from tests.models import tiny_models
from tests.models.paper import paper_train
from tests.models.tiny_contexts import make_context

FILE = Path(__file__).with_name("loss_curve.json")
FAMILY = "qwen3_vl"
STEPS, RATIOS = 20, [0.4, 0.2, 0.1, 0.0]
COLUMNS = ("loss", "divergence", "reward_distillation", "kl_to_reference")
SETTINGS = paper_train(learning_rate=1e-3)


def loss_curve(settings: Train = SETTINGS) -> list[dict[str, float]]:
    """Return loss and its parts at each step, to six digits. The teacher is restored over four mask stages."""
    events: list[TrainEvent] = []
    with tempfile.TemporaryDirectory() as folder:
        base, teacher = make_context(FAMILY), tiny_models.model(FAMILY, seed=1)
        groups = [tuple(range(number % 3, 8, 1 + number % 2)) for number in range(STEPS)]
        context = replace(
            base,
            student=copy.deepcopy(base.student),
            reference=base.student,
            teacher=teacher,
            train=settings,
            ratios=RATIOS,
            steps=[Step(0, number * len(RATIOS) // STEPS, of) for number, of in enumerate(groups)],
            remask=lambda stage: mask(teacher, RATIOS[stage]),
            storage=Storage(folder),
            checkpoints="checkpoints",
            checkpoint_steps=STEPS,
            report=events.append,
            history=HistoryWriter(),
            token_counts=TokenCounts(),
        )
        trainer.fit(context)
    steps = [event.means for event in events if isinstance(event, StepFinished)]
    return [{name: float(f"{means[name]:.6g}") for name in COLUMNS} for means in steps]


def mask(teacher, ratio: float) -> None:
    """Mask the untouched weights at this ratio, in place."""
    untouched = tiny_models.model(FAMILY, seed=1).state_dict()
    for name, parameter in teacher.named_parameters():
        if is_masked(name, parameter.ndim):
            parameter.data = apply_mask(untouched[name], *magnitude_thresholds(untouched[name], [ratio]))


def main() -> None:
    FILE.write_text(json.dumps(loss_curve(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
