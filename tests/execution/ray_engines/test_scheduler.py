"""Each piece is done once, in whatever order engines end, and no more engines start than help."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from masters.execution.ray_engines.scheduler import PIECES_WORTH_A_START, WorkScheduler

MODELS = st.lists(st.tuples(st.integers(0, 12), st.floats(0.1, 100)), min_size=1, max_size=4)  # pieces, cost
Piece = tuple[int, int]  # model, number


class Engines:
    """Engines that finish, and die, in the order that a test draws."""

    def __init__(self, models: list[tuple[int, float]], max_engines: int) -> None:
        self.pieces = [[(model, n) for n in range(count)] for model, (count, _) in enumerate(models)]
        self.scheduler: WorkScheduler[Piece] = WorkScheduler(self.pieces, [cost for _, cost in models])
        self.running: list[tuple[int, Piece | None]] = []  # model, piece
        self.done: Counter = Counter()
        self.started = 0
        while len(self.running) < max_engines and (model := self.scheduler.choose_initial_model()) is not None:
            self.start(model)
        self.initial_models = [model for model, _ in self.running]

    def start(self, model: int) -> None:
        self.scheduler.add_engine(model)
        self.running.append((model, None))
        self.started += 1

    def finish(self, index: int) -> None:
        """Have an engine finish its piece, or its start, and go on."""
        model, piece = self.running[index]
        if piece:
            self.done[piece] += 1
        if (piece := self.scheduler.take_piece(model)) is not None:
            self.running[index] = (model, piece)
            return
        del self.running[index]
        self.scheduler.remove_engine(model)
        if (model := self.scheduler.choose_next_model()) is not None:
            self.start(model)

    def die(self, index: int) -> None:
        model, piece = self.running.pop(index)
        self.scheduler.remove_engine(model)
        if piece:
            self.scheduler.return_piece(model, piece)
        if (replacement := self.scheduler.choose_replacement_model(model)) is not None:
            self.start(replacement)


@given(MODELS, st.integers(1, 6), st.data())
def test_every_piece_is_done_once_whichever_engine_dies(
    models: list[tuple[int, float]], max_engines: int, data: st.DataObject
) -> None:
    engines, deaths = Engines(models, max_engines), data.draw(st.integers(0, 5))
    while engines.running:
        assert len(engines.running) <= max_engines
        index = data.draw(st.integers(0, len(engines.running) - 1))
        if deaths and data.draw(st.booleans()):
            deaths -= 1
            engines.die(index)
        else:
            engines.finish(index)
    assert engines.done == Counter(piece for pieces in engines.pieces for piece in pieces)


@given(MODELS, st.integers(1, 6))
def test_models_have_an_engine_each_before_one_has_two(models: list[tuple[int, float]], max_engines: int) -> None:
    initial_models = Engines(models, max_engines).initial_models
    models_with_pieces = sum(count > 0 for count, _ in models)
    assert len(set(initial_models)) == min(models_with_pieces, max_engines)
    assert len(initial_models) == min(max_engines, sum(count for count, _ in models))


def test_further_engines_go_where_most_work_is_left() -> None:
    assert Counter(Engines([(10, 90.0), (10, 10.0)], 5).initial_models) == {0: 4, 1: 1}


def test_an_engine_is_exchanged_only_where_that_is_worth_its_start() -> None:
    few, many = 2 * PIECES_WORTH_A_START, 2 * PIECES_WORTH_A_START + 1
    for count, started in ((few, 2), (many, 3)):
        engines = Engines([(count, 100.0), (1, 1.0)], 2)
        engines.finish(0)  # started; it takes one piece, and `count - 1` are left
        engines.finish(1)
        engines.finish(1)
        assert engines.started == started
