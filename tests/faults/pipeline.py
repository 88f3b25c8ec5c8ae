"""Runs the stages in one process, with handmade responses and predictions.

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
from masters.tasks.evaluate import evaluate, initial_student
from masters.tasks.mask import mask
from masters.tasks.register import register
from masters.tasks.score import score
from masters.tasks.train import train
from tests.faults.run_spec import Shape
from tests.handmade_run import first_round, make_run, write_predictions, write_training_inputs

assert torch.__version__  # imported here, before the forks
UNEXPECTED = 70
CHECKPOINT_STEPS = 2


def main(store: str, source: str, mlflow: str, shape: dict) -> int:
    """Run the pipeline. Returns 0, the exit code of an expected error, or `UNEXPECTED` after a traceback."""
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
    run = make_run(store, source, key=key, data=dict(max_rejected_share=0.2), rewards=rewards, runtime=runtime)
    run.stages_to_rebuild = frozenset([Stage(shape.rebuild)] if shape.rebuild else [])
    current, questions = first_round(run), data.fn(run)
    inputs = {"data": questions, "masks": mask.fn(run, current), **write_training_inputs(run, current, questions)}
    inputs["verdicts"] = score.fn(run, current, questions, inputs["responses"])
    if shape.until != Stage.SCORE:
        trained = train.fn(run, current, inputs)
        if shape.until == Stage.REGISTER:
            models: list[LocalModel] = [
                *run.resources.teachers,
                initial_student(run.resources),
                run.load_student(trained),
            ]
            write_predictions(run, questions, models)
            register.fn(run, trained, evaluate.fn(run, questions, models))
    run.tracker.finish("FINISHED")
