"""The stages as one process: data, mask, responses by hand, score, train, predictions by hand, evaluate, register.

No engine is started. What a run is to do, a `Shape` says.
"""

import sys
import traceback
from pathlib import Path

import torch

from masters.checks.model_folder import LocalModel
from masters.common.errors import MastersError
from masters.config.stages import Stage
from masters.tasks.data import data
from masters.tasks.evaluate import before, evaluate
from masters.tasks.mask import mask
from masters.tasks.register import register
from masters.tasks.score import score
from masters.tasks.train import train
from tests.faults.run_spec import Shape
from tests.handmade_run import by_hand, first_round, made_run, predicted

assert torch.__version__  # imported here, before the forks
UNEXPECTED = 70
CHECKPOINT_STEPS = 2


def main(store: str, source: str, mlflow: str, shape: dict) -> int:
    """Exit code: 0, that of an expected error (one line was written), or `UNEXPECTED` (a traceback was)."""
    try:
        _run(store, source, mlflow, Shape(**shape))
    except MastersError as error:
        print(f"masters: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return UNEXPECTED
    return 0


def _run(store: str, source: str, mlflow: str, shape: Shape) -> None:
    rewards = dict(accuracy="llm", judge=shape.judge) if shape.judge else dict(accuracy="rules")
    runtime = dict(mlflow_uri=mlflow, checkpoint_steps=CHECKPOINT_STEPS, train_processes=shape.ranks)
    key = shape.key and f"{shape.key}-{Path(store).name}"  # MLflow's one run of a key has one store
    run = made_run(store, source, key=key, data=dict(max_rejected_share=0.2), rewards=rewards, runtime=runtime)
    run.rebuild = frozenset([Stage(shape.rebuild)] if shape.rebuild else [])
    current, questions = first_round(run), data.fn(run)
    inputs = {"data": questions, "masks": mask.fn(run, current), **by_hand(run, current, questions)}
    inputs["verdicts"] = score.fn(run, current, questions, inputs["responses"])
    if shape.until != Stage.SCORE:
        trained = train.fn(run, current, inputs)
        if shape.until == Stage.REGISTER:
            models: list[LocalModel] = [*run.ready.teachers, before(run.ready), run.trained(trained)]
            predicted(run, questions, models)
            register.fn(run, trained, evaluate.fn(run, questions, models))
    run.tracker.finish("FINISHED")
