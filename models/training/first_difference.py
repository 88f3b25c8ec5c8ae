"""Common prefixes of wrong and right responses, which `train.negatives = "first_difference"` spares.

Ours, after likelihood displacement (arXiv 2505.18830): lowering the probability of a wrong response also lowers that of
right ones, mostly through the tokens that they share. Shapes: T response tokens, R responses.
"""

from collections.abc import Sequence

import torch

from masters.models.packing.packed_batch import PackedBatch
from masters.rewards.verdict import RIGHT


def spared_tokens(packed: PackedBatch, score_R: torch.Tensor) -> torch.Tensor:
    """Return whether a token belongs to the longest prefix that its response shares with a right response, bool [T].

    In a right response these are all tokens; for a question without a right response there are none. `score_R`: R_acc,
    NaN where there is none.
    """
    ends = torch.bincount(packed.response_T, minlength=packed.responses).cumsum(0).tolist()
    tokens = packed.token_T.tolist()
    responses = [tokens[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    right_R = (score_R >= RIGHT).tolist()
    spared: list[bool] = []
    for members in packed.responses_by_question:
        right = [responses[r] for r in members if right_R[r]]
        for r in members:
            shared = max((_common_prefix(responses[r], other) for other in right), default=0)
            spared += [t < shared for t in range(len(responses[r]))]
    return torch.tensor(spared, device=packed.response_T.device)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
