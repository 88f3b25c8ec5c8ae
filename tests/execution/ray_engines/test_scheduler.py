"""Which engine does what: whatever finishes when, each piece is done once; no more engines are started than help."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from masters.execution.ray_engines.scheduler import WORTH, WorkScheduler

MODELS = st.lists(st.tuples(st.integers(0, 12), st.floats(0.1, 100)), min_size=1, max_size=4)


class Engines:
    """Engines that finish, and die, in the order that a test draws."""

    def __init__(self, models: list[tuple[int, float]], at_most: int) -> None:
        self.pieces = [[dict(out=(model, n)) for n in range(count)] for model, (count, _) in enumerate(models)]
        self.deal = WorkScheduler(self.pieces, [cost for _, cost in models])
        self.seats: list[list] = []  # model, piece
        self.done: Counter = Counter()
        self.started = 0
        while len(self.seats) < at_most and (model := self.deal.first()) is not None:
            self.start(model)
        self.firsts = [model for model, _ in self.seats]

    def start(self, model: int) -> None:
        self.deal.join(model)
        self.seats.append([model, None])
        self.started += 1

    def finish(self, which: int) -> None:
        seat = self.seats[which]
        if seat[1]:
            self.done[seat[1]["out"]] += 1
        seat[1] = self.deal.take(seat[0])
        if seat[1] is None:
            self.seats.remove(seat)
            self.deal.leave(seat[0])
            if (model := self.deal.next()) is not None:
                self.start(model)

    def die(self, which: int) -> None:
        model, piece = self.seats.pop(which)
        self.deal.leave(model)
        if piece:
            self.deal.give_back(model, piece)
        if (instead := self.deal.instead_of(model)) is not None:
            self.start(instead)


@given(MODELS, st.integers(1, 6), st.data())
def test_every_piece_is_done_once_whoever_dies(
    models: list[tuple[int, float]], at_most: int, data: st.DataObject
) -> None:
    engines, deaths = Engines(models, at_most), data.draw(st.integers(0, 5))
    while engines.seats:
        assert len(engines.seats) <= at_most
        which = data.draw(st.integers(0, len(engines.seats) - 1))
        if deaths and data.draw(st.booleans()):
            deaths -= 1
            engines.die(which)
        else:
            engines.finish(which)
    assert engines.done == Counter(piece["out"] for of in engines.pieces for piece in of)


@given(MODELS, st.integers(1, 6))
def test_models_have_an_engine_each_before_one_has_two(models: list[tuple[int, float]], at_most: int) -> None:
    firsts = Engines(models, at_most).firsts
    wanted = sum(count > 0 for count, _ in models)
    assert len(set(firsts)) == min(wanted, at_most)
    assert len(firsts) == min(at_most, sum(count for count, _ in models))


def test_further_engines_go_where_most_is_outstanding() -> None:
    assert Counter(Engines([(10, 90.0), (10, 10.0)], 5).firsts) == {0: 4, 1: 1}


def test_an_engine_is_exchanged_only_where_that_is_worth_its_start() -> None:
    few, many = 2 * WORTH, 2 * WORTH + 1
    for count, started in ((few, 2), (many, 3)):
        engines = Engines([(count, 100.0), (1, 1.0)], 2)
        engines.finish(0)  # started; it takes one piece, and `count - 1` are left
        engines.finish(1)
        engines.finish(1)
        assert engines.started == started
