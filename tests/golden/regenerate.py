"""The fixed case behind `objective.json`. `python -m tests.golden.regenerate` writes the file anew: only after a change
of the method's definition, never to make a test pass. The numbers are of the code, and the test also compares the
float64 reference with them.
"""

import json
from pathlib import Path

import numpy as np
import torch

from masters.config import Rewards, Train
from masters.models import objective
from tests.models.compare import dense_terms, packed, tensors
from tests.models.reference import Batch, log_pi

FILE = Path(__file__).with_name("objective.json")
NAN = float("nan")
VOCABULARY = 12
SETTINGS = {
    "masters": (Train(), Rewards()),
    "masters, kl": (Train(divergence="kl"), Rewards()),
    "masters, raw": (Train(), Rewards(distillation="raw")),
}


def case() -> Batch:
    """Three questions of four, three and two responses; a repeated response and two missing verdicts.

    The logits are waves, not random numbers, so that no library's generator takes part.
    """
    questions: list[list[tuple[int, ...]]] = [
        [(3, 1, 4), (1, 5), (3, 1, 4), (9, 2, 6, 5)],
        [(3, 5, 8), (9,), (7, 9)],
        [(3, 2), (3, 8, 4)],
    ]
    scores = [[1.0, 0.0, 1.0, 0.0], [0.0, NAN, 1.0], [NAN, 1.0]]
    tokens = np.array([t for one in questions for response in one for t in response])
    t, v = np.arange(len(tokens))[:, None], np.arange(VOCABULARY)[None]
    student = 2 * np.sin(1.7 * t + 0.9 * v + 0.13 * t * v)
    teacher = student + 1.5 * np.cos(0.8 * t - 1.1 * v + 0.07 * t * v)
    pi_ref = log_pi(student + 0.3 * np.sin(2.3 * t * v + 0.4), tokens)
    return Batch(questions, scores, student, teacher, pi_ref)


def compute(train: Train, rewards: Rewards) -> dict[str, float | list[float]]:
    """What the code makes of the case: loss summed over questions, values of every response, gradient norm."""
    batch = case()
    pack, (student, teacher, pi_ref, score_R) = packed(batch), tensors(batch)
    terms = dense_terms(student, teacher, pack, train)
    outcome = objective.masters(terms, pi_ref, score_R, pack, train, rewards)
    outcome.loss.backward()
    divergence_R = objective.divergences(terms, pack).detach()
    distill_R, advantage_R = objective.advantages(divergence_R, score_R, pack, rewards)
    assert student.grad is not None
    return {
        "loss": rounded(outcome.loss.detach()),
        "divergence": rounded(divergence_R),
        "distillation_reward": rounded(distill_R),
        "advantage": rounded(advantage_R),
        "gradient_norm": rounded(student.grad.norm()),
    }


def rounded(value: torch.Tensor) -> float | list[float]:
    """To what float32 holds, so that the file does not change with the last bit."""
    return json.loads(json.dumps(value.tolist()), parse_float=lambda text: float(f"{float(text):.6g}"))


def main() -> None:
    made = {name: compute(*settings) for name, settings in SETTINGS.items()}
    FILE.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
