"""Who does what on Ray: which model an engine serves and which piece it does next. Knows nothing of Ray."""

from collections import deque

WORTH = 4  # pieces that each engine of a model must have before one that serves another model is exchanged for it


class WorkScheduler:
    """The pieces of several models. An engine is bound to one model: to serve another, it must be exchanged."""

    def __init__(self, pieces: list[list[dict]], costs: list[float]) -> None:
        """`pieces` by model; `costs`: what all of a model's pieces cost, in any unit."""
        self._waiting = [deque(of) for of in pieces]
        self._each = [cost / max(1, len(of)) for cost, of in zip(costs, pieces, strict=True)]
        self._engines = [0] * len(pieces)

    def join(self, model: int) -> None:
        """One more engine serves this model."""
        self._engines[model] += 1

    def leave(self, model: int) -> None:
        self._engines[model] -= 1

    def take(self, model: int) -> dict | None:
        """The model's next piece, in order; None if there is none."""
        return self._waiting[model].popleft() if self._waiting[model] else None

    def give_back(self, model: int, piece: dict) -> None:
        """What was taken and not done is next."""
        self._waiting[model].appendleft(piece)

    def first(self) -> int | None:
        """The model that the next of the first engines serves: each has one before any has two."""
        return self._costliest(1)

    def next(self) -> int | None:
        """The model that an engine without work is worth exchanging for; None if it is to end."""
        return self._costliest(WORTH)

    def instead_of(self, model: int) -> int | None:
        """The model of the engine that replaces a dead one of `model`; None if there is nothing for it to do."""
        return model if self._waiting[model] else self.next()

    def _costliest(self, worth: int) -> int | None:
        """A model without an engine, else the one whose engines have most left, if a further one had `worth` pieces."""
        served = self._engines
        some = [m for m, of in enumerate(self._waiting) if of]
        wanted = [m for m in some if not served[m] or len(self._waiting[m]) >= worth * (served[m] + 1)]
        return max(wanted, key=lambda m: (not served[m], self._outstanding(m) / (served[m] + 1)), default=None)

    def _outstanding(self, model: int) -> float:
        return len(self._waiting[model]) * self._each[model]
