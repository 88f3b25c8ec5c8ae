"""generate.refresh = "stage": a round's mask stages are answered, scored and trained one after the other."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from masters.checks.model_folder import LocalModel
from masters.common.errors import InputError
from masters.config import Config
from masters.config.mask_schedule import stage_of
from masters.data import question_shards
from masters.execution.pool_request import StageRequest
from masters.flows.plan import settings
from masters.flows.pool_stage import _round
from masters.models.generation.shards import ShardRequest, narrowed
from masters.store import tables
from masters.store.artifacts import Artifact
from masters.tasks import generate, score
from masters.tasks.data import data
from masters.tasks.mask import mask
from masters.tasks.refresh import begun, every_part, following, parts
from masters.tasks.run_context import Context, Round, Run
from masters.tasks.train import identity, train
from tests.handmade_run import by_hand, first_round, made_run, write_table
from tests.shape_data import write_questions
from tests.tasks.test_work_pools import wanted

STAGE = dict(generate=dict(responses=2, max_tokens=8, refresh="stage"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("source"), 52, bad=False)


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made_run(tmp_path_factory.mktemp("store"), source, **STAGE)


@pytest.fixture(scope="module")
def questions(run: Run) -> Artifact:
    return data.fn(run)


@pytest.fixture(scope="module")
def masks(run: Run) -> Artifact:
    return mask.fn(run, first_round(run))


def changed(run: Run, **values: object) -> Context:
    """The run's context with other values, by key (`__` stands for a dot)."""
    own = run.config.model_dump()
    for key, value in values.items():
        *path, last = key.split("__")
        section = own
        for part in path:
            section = section[int(part) if part.isdigit() else part]
        section[last] = value
    return Context(Config.model_validate(own), run.ready)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of at most 5 questions, so that some lie across two mask stages."""
    monkeypatch.setattr(question_shards.plan, "__defaults__", (5,))


def of(asked: list[ShardRequest], source: str) -> list[ShardRequest]:
    return [order for order in asked if order.source == source]


@pytest.mark.parametrize("coverage", ["partition", "full"])
def test_with_equal_weights_the_parts_ask_what_the_round_asks(run, questions, masks, coverage: str) -> None:
    """The teacher's shards are the round's own. The student's are parts of the round's, answered in the same batch."""
    context = changed(run, generate__coverage=coverage, teachers__0__mask_step=0.1)
    whole = generate.orders(context, first_round(context), questions, masks)
    student = {order.fingerprint: order for order in of(whole, "student")}
    teacher, asked = [], []
    for part in parts(context.config, first_round(context), questions):
        found = generate.orders(context, part, questions, masks)
        teacher += of(found, "teacher")
        asked.append(of(found, "student"))
    assert len(asked) == 3 and teacher == of(whole, "teacher")
    for stage, orders in enumerate(asked):
        own = [ref.digest for order in orders for ref in order.shard.refs]
        every = [ref.digest for ref in question_shards.references(questions, "train")]
        assert own == [d for d in every if coverage == "full" or stage_of(d, 3) == stage]
        for order in orders:
            same = student[order.part_of or order.fingerprint]
            assert order.asked == same.shard.refs and order.job()["sampling"] == same.job()["sampling"]
            assert replace(order, shard=same.shard, stored=None, part_of=None, batch=()) == same
    crossing = [order for orders in asked for order in orders if order.part_of]
    assert bool(crossing) == (coverage == "partition")


def test_a_part_of_a_part_is_cut_from_the_same_shard(run, questions, masks) -> None:
    """What an earlier night left is itself cut: its batch is not known any more, the shard is there."""
    order = of(generate.orders(run, first_round(run), questions, masks), "student")[0]
    refs = order.shard.refs
    assert narrowed(order, refs) == order and narrowed(order, ()) is None
    once = narrowed(order, refs[1:])
    cut = narrowed(replace(once, batch=()), refs[2:])
    assert once and cut and once.batch == refs and cut.batch == ()
    assert cut.part_of == once.part_of == order.fingerprint and cut.fingerprint == narrowed(order, refs[2:]).fingerprint
    assert len({order.fingerprint, once.fingerprint, cut.fingerprint}) == 3


def test_the_first_part_asks_the_teacher_ahead_for_all_that_follow(run, questions, masks) -> None:
    first, second = parts(run.config, first_round(run), questions)
    ahead = generate.teachers_ahead(run, first, questions, masks)
    assert ahead == of(generate.orders(run, second, questions, masks), "teacher") != []
    later = replace(second, only=replace(second.only, earlier=questions))  # any artifact: it is not the first
    assert generate.teachers_ahead(run, later, questions, masks) == []
    assert generate.teachers_ahead(run, first_round(run), questions, masks) == []


def test_the_student_answers_with_the_weights_that_it_has_when_the_stage_begins(run, questions, masks) -> None:
    first, second = parts(run.config, first_round(run), questions)
    moved = LocalModel("student-after", Path("elsewhere"), "another digest")
    second = replace(second, only=replace(second.only, student=moved))
    asked = [of(generate.orders(run, part, questions, masks), "student") for part in (first, second)]
    assert {order.answerer.digest for order in asked[0]} == {run.ready.student.digest}
    assert {order.answerer.digest for order in asked[1]} == {"another digest"}
    assert second.student == run.ready.student  # pi_ref stays
    assert {order.stage for orders in asked for order in orders} == {0}  # and with it the seeds


def test_one_mask_stage_alone_is_a_round(run, questions) -> None:
    whole, stage = changed(run, teachers__0__r_max=0.0, generate__refresh="round"), changed(run, teachers__0__r_max=0.0)
    for context in (whole, stage):
        current = first_round(context)
        assert parts(context.config, current, questions) == [] and begun(context.config, current, questions) == current
    assert [made.folder for made in settings(whole)] == [made.folder for made in settings(stage)]


def test_asking_once_a_round_has_no_part_in_identity(run) -> None:
    """As long as nobody refreshes, artifacts that were built before there was a choice are found."""
    context = changed(run, generate__refresh="round")
    for made in settings(context):
        assert "refresh" not in str(made.config) and "mask_stage" not in str(made.config)
    assert [made.stage for made in settings(context)] == [
        "data", "mask", "generate", "score", "train", "evaluate", "register",
    ]  # fmt: skip


def test_names_and_identities_tell_parts_apart(run) -> None:
    context = changed(run, teachers=run.config.model_dump()["teachers"] * 2)
    context.ready = replace(run.ready, teachers=run.ready.teachers * 2)
    found = list(settings(context))
    assert [made.stage for made in found] == [
        "data", "mask", "generate-mask0", "score-mask0", "train-mask0", "generate-mask1", "score-mask1", "train-mask1",
        "mask-2", "generate-2-mask0", "score-2-mask0", "train-2-mask0", "generate-2-mask1", "score-2-mask1",
        "train-2-mask1", "evaluate", "register",
    ]  # fmt: skip
    first = {made.stage: made.fingerprint for made in found}
    assert first["train-mask0"] != first["train-mask1"] and first["generate-mask0"] != first["generate-mask1"]
    assert {made.kind for made in found} == {"data", "mask", "generate", "score", "train", "evaluate", "register"}


@pytest.mark.parametrize(
    ("stage", "number", "mask_stage"),
    [("train-mask0", 1, 0), ("generate-2-mask10", 2, 10), ("train-3", 3, None), ("evaluate-champion", 1, None)],
)
def test_an_assignment_says_round_and_mask_stage(stage: str, number: int, mask_stage: int | None) -> None:
    asked: StageRequest = wanted(stage=stage)
    assert (asked.round, asked.mask_stage, asked.kind) == (number, mask_stage, stage.split("-")[0])


def test_mask_stages_without_questions_are_left_out(run, questions) -> None:
    refs = [ref for ref in question_shards.references(questions, "train") if stage_of(ref.digest, 2) == 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(question_shards, "references", lambda *_: refs)
        (only,) = parts(run.config, first_round(run), questions)
    assert only.only.number == 1 and only.begins and only.ends
    assert len(every_part(run.config, first_round(run))) == 2


class ByHand:
    """Responses and verdicts that were written by hand, a mask stage's apart."""

    def __init__(self, run: Run, current: Round, questions: Artifact) -> None:
        self.whole = by_hand(run, current, questions)
        self._run = run
        self._stage = {
            ref.question_id: stage_of(ref.digest, 2) for ref in question_shards.references(questions, "train")
        }

    def of(self, stage: int) -> dict[str, Artifact]:
        kinds = dict(responses=tables.RESPONSES, verdicts=tables.VERDICTS)
        return {
            kind: write_table(self._run, kind, list(self._rows(kind, stage)), schema, f"mask{stage}")
            for kind, schema in kinds.items()
        }

    def _rows(self, kind: str, stage: int) -> Iterator[dict]:
        for row in self.whole[kind].rows(kind):
            if self._stage[row["question_id"]] == stage:
                yield row


def weights(trained: Artifact) -> dict[str, torch.Tensor]:
    return load_file(Path(trained.uri) / "model/model.safetensors")


def check_handed_over(run: Run, common: dict, first: Artifact, said: dict, last: Artifact) -> None:
    """A pool's worker makes of references to artifacts what the run that asks has."""
    questions, masks = common["data"], common["masks"]
    second = following(run, begun(run.config, first_round(run), questions), first)
    asked = _round(run, wanted(stage="generate-mask1"), common | {"student": first})
    assert asked == second and asked.only and asked.only.student.digest == first.parts["model"]
    assert generate.orders(run, asked, questions, masks) == generate.orders(run, second, questions, masks)
    trains = _round(run, wanted(stage="train-mask1"), common | said | {"earlier": first})
    assert identity(run, trains, common | said).fingerprint == last.fingerprint
    assert _round(run, wanted(stage="generate-mask0"), common) == begun(run.config, first_round(run), questions)
    with pytest.raises(InputError, match="expected one of score-mask0, score-mask1, found score-mask2"):
        _round(run, wanted(stage="score-mask2"), common)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_mask_stages_trained_one_by_one_end_where_the_round_ends(ranks: int, source: Path, tmp_path: Path) -> None:
    """On the same responses: the same student, tables and looks at the probe; each knows what it went on from."""
    learning = dict(learning_rate=1e-3, questions_per_step=4, schedule="cosine", warmup_steps=3)
    shared = dict(train_processes=ranks, sharding="fsdp2" if ranks > 1 else "replicate")
    run = made_run(tmp_path, source, train=learning, runtime=shared, **STAGE)
    current, questions = first_round(run), data.fn(run)
    said, common = ByHand(run, current, questions), {"data": questions, "masks": mask.fn(run, current)}
    whole = train.fn(run, current, common | said.whole)
    made: list[Artifact] = []
    coming: Round | None = begun(run.config, current, questions)
    while coming:
        assert coming.only
        made.append(train.fn(run, coming, common | said.of(coming.only.number)))
        coming = following(run, coming, made[-1])
    first, last = made
    assert {name for name, value in weights(whole).items() if not torch.equal(value, weights(last)[name])} == set()
    for table in ("history", "rewards"):
        rows = [row for part in made for row in part.rows(table)]
        assert sorted(rows, key=repr) == sorted(whole.rows(table), key=repr)
    assert first.facts["probes"] + last.facts["probes"] == whole.facts["probes"]
    assert (first.facts["steps_before"], last.facts["steps_before"]) == (0, first.facts["steps"])
    assert first.facts["steps"] + last.facts["steps"] == whole.facts["steps"]
    assert set(first.parts) - set(last.parts) == {"state"} and last.upstream("earlier") == first
    assert run.storage.names(f"{first.folder}/checkpoints") == []
    again = train.fn(run, begun(run.config, current, questions), common | said.of(0))
    assert run.stages[-1]["outcome"] == "reused" and again == first
    check_handed_over(run, common, first, said.of(1), last)
    other = replace(first, record=first.record | dict(digest="0" * 64))
    second = following(run, begun(run.config, current, questions), first)
    assert second and second.only
    inputs = common | said.of(1)
    moved = replace(second, only=replace(second.only, earlier=other))
    assert identity(run, second, inputs).fingerprint == last.fingerprint != identity(run, moved, inputs).fingerprint
    assert score.first(run, second, []).stage == "score-mask1"
