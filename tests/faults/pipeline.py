"""The stages that need no engine, as one process: data, mask, responses by hand, score, train."""

import sys
import traceback

import torch

from masters.errors import MastersError
from masters.tasks.data import data
from masters.tasks.mask import mask
from masters.tasks.score import score
from masters.tasks.train import train
from tests.trained import by_hand, first_round, made_run

assert torch.__version__  # imported here, before the forks
UNEXPECTED = 70


def main(store: str, source: str, mlflow: str, with_train: bool, runtime: dict | None = None) -> int:
    """Exit code: 0, that of an expected error (one line was written), or `UNEXPECTED` (a traceback was)."""
    try:
        settled = dict(mlflow_uri=mlflow) | (runtime or {})
        run = made_run(store, source, data=dict(max_rejected_share=0.2), runtime=settled)
        current, questions = first_round(run), data.fn(run)
        inputs = {"data": questions, "masks": mask.fn(run, current), **by_hand(run, current, questions)}
        inputs["verdicts"] = score.fn(run, current, questions, inputs["responses"])
        if with_train:
            train.fn(run, current, inputs)
        run.tracker.finish("FINISHED")
    except MastersError as error:
        print(f"masters: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return UNEXPECTED
    return 0
