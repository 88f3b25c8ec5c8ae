"""Schedule engines on Ray: which model an engine serves, and which piece it does next. Imports no Ray."""

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

# pieces that each engine of a model must have before an engine of another model is exchanged for one more of it
PIECES_WORTH_A_START = 4

P = TypeVar("P")


class WorkScheduler(Generic[P]):
    """Holds the pieces of several models. An engine is bound to one model: to serve another, it must be exchanged."""

    def __init__(self, pieces: Sequence[Sequence[P]], costs: Sequence[float]) -> None:
        """Queue pieces. `pieces`: by model; `costs`: of all pieces of each model together, in any unit."""
        self._waiting = [deque(model_pieces) for model_pieces in pieces]
        self._piece_costs = [cost / max(1, len(each)) for cost, each in zip(costs, pieces, strict=True)]
        self._engines = [0] * len(pieces)

    def add_engine(self, model: int) -> None:
        """Count one more engine that serves the model."""
        self._engines[model] += 1

    def remove_engine(self, model: int) -> None:
        """Count one engine less that serves the model."""
        self._engines[model] -= 1

    def take_piece(self, model: int) -> P | None:
        """Return the model's next piece, in order; None if there is none."""
        return self._waiting[model].popleft() if self._waiting[model] else None

    def return_piece(self, model: int, piece: P) -> None:
        """Put a piece that was taken and not done back to the front."""
        self._waiting[model].appendleft(piece)

    def choose_initial_model(self) -> int | None:
        """Return the model of the next engine at the start: each model gets one engine before any gets two."""
        return self._choose_model(1)

    def choose_next_model(self) -> int | None:
        """Return the model that an idle engine is worth exchanging for; None if the engine should end."""
        return self._choose_model(PIECES_WORTH_A_START)

    def choose_replacement_model(self, model: int) -> int | None:
        """Return the model of the engine that replaces a dead one of `model`; None if nothing is left for it."""
        return model if self._waiting[model] else self.choose_next_model()

    def _choose_model(self, min_pieces: int) -> int | None:
        """Return a model without an engine, otherwise the one whose engines have the most work left each.

        The latter only if one more engine would leave each of them at least `min_pieces` pieces.
        """
        candidates = [
            model
            for model, (pieces, engines) in enumerate(zip(self._waiting, self._engines, strict=True))
            if pieces and (not engines or len(pieces) >= min_pieces * (engines + 1))
        ]
        return max(candidates, key=self._priority, default=None)

    def _priority(self, model: int) -> tuple[bool, float]:
        engines, cost_left = self._engines[model], len(self._waiting[model]) * self._piece_costs[model]
        return engines == 0, cost_left / (engines + 1)
