"""The switches that decide who answers what, and what is trained on: each one's own effect."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from masters.config import Config
from masters.config.mask_schedule import stage_of
from masters.data import question_shards
from masters.models.generation.shards import ShardRequest
from masters.models.training.groups import Group, label_groups, plan_steps, response_groups
from masters.models.training.round_part import Part
from masters.store.artifacts import Artifact
from masters.tasks import evaluate
from masters.tasks.data import data
from masters.tasks.generate import orders
from masters.tasks.mask import mask
from masters.tasks.run_context import Context, Run
from masters.tasks.train import _job
from tests.handmade_run import by_hand, first_round, made_run
from tests.shape_data import write_questions

RATIOS = [0.2, 0.0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("source"), 40, bad=False)


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made_run(tmp_path_factory.mktemp("store"), source)


@pytest.fixture(scope="module")
def questions(run: Run) -> Artifact:
    return data.fn(run)


@pytest.fixture(scope="module")
def refs(questions: Artifact) -> list[question_shards.Ref]:
    return question_shards.references(questions, "train")


@pytest.fixture(scope="module")
def tables(run: Run, questions: Artifact) -> dict[str, Artifact]:
    return by_hand(run, first_round(run), questions)


@pytest.fixture(scope="module")
def ask(run: Run, questions: Artifact) -> Callable[..., list[ShardRequest]]:
    """The orders of a configuration with other values."""
    masks = mask.fn(run, first_round(run))

    def orders_of(r_max: float = 0.2, **generate: object) -> list[ShardRequest]:
        values = run.config.model_dump()
        values["teachers"][0]["r_max"] = r_max
        values["generate"] |= generate
        values["train"]["objective"] = "kd"  # "masters" needs two responses a question
        context = Context(Config.model_validate(values), run.ready)
        return orders(context, first_round(context), questions, masks)

    return orders_of


def responses_per_question(asked: list[ShardRequest]) -> dict[str, Counter]:
    """How many responses each (source, mask ratio) gives a question."""
    count: dict[str, Counter] = {}
    for order in asked:
        for ref in order.shard.refs:
            count.setdefault(ref.digest, Counter())[order.source, order.mask_ratio] += order.samples
    return count


@pytest.mark.parametrize(("responses", "share"), [(8, 0.5), (8, 0.0), (8, 0.25), (8, 1.0), (1, 0.0), (4, 0.5)])
def test_the_mix_decides_who_gives_how_many_responses(ask, refs, responses: int, share: float) -> None:
    counted = responses_per_question(ask(responses=responses, student_share=share))
    assert counted.keys() == {ref.digest for ref in refs}
    for digest, count in counted.items():
        student = round(responses * share)
        expected = Counter({("student", None): student, ("teacher", RATIOS[stage_of(digest, 2)]): responses - student})
        assert count == +expected


def test_full_coverage_has_every_masked_teacher_answer_and_the_student_once(ask, refs) -> None:
    counted = responses_per_question(ask(coverage="full", responses=4))
    assert len(counted) == len(refs)
    assert all(c == Counter({("teacher", 0.2): 2, ("teacher", 0.0): 2, ("student", None): 2}) for c in counted.values())


def test_without_masks_one_whole_teacher_answers_everything(ask, refs) -> None:
    counted = responses_per_question(ask(r_max=0.0, responses=4))
    assert len(counted) == len(refs)
    assert all(c == Counter({("teacher", 0.0): 2, ("student", None): 2}) for c in counted.values())


def by_stage(groups: Sequence[Group]) -> Counter:
    return Counter(group.stage for group in groups)


def test_a_partition_trains_on_each_question_in_its_own_stage(refs, tables) -> None:
    groups, empty = response_groups(refs, tables["responses"], tables["verdicts"], RATIOS, "partition")
    assert empty == 0
    assert [(g.ref, g.stage) for g in groups] == [(ref, stage_of(ref.digest, 2)) for ref in refs]
    # the stage's teacher, rewarded, before the student, not rewarded; another stage's teacher takes no part
    assert all(len(g.responses) == 2 and g.scores.tolist() == [1.0, 0.0] for g in groups)


def test_full_coverage_trains_on_every_question_in_every_stage(refs, tables) -> None:
    groups, _ = response_groups(refs, tables["responses"], tables["verdicts"], RATIOS, "full")
    assert by_stage(groups) == {0: len(refs), 1: len(refs)}
    assert all(len(g.responses) == 2 for g in groups)


def test_without_verdicts_responses_are_the_same_and_unrewarded(refs, tables) -> None:
    with_them, _ = response_groups(refs, tables["responses"], tables["verdicts"], RATIOS, "partition")
    without, _ = response_groups(refs, tables["responses"], None, RATIOS, "partition")
    assert [g.responses for g in without] == [g.responses for g in with_them]
    assert all(all(score != score for score in g.scores) for g in without)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_validation_questions_are_watched_and_never_trained_on(source: Path, split: str, tmp_path: Path) -> None:
    run = made_run(tmp_path, source, data=dict(validation_share=0.3), evaluate=dict(split=split))
    current, questions = first_round(run), data.fn(run)
    inputs = {"data": questions, "masks": mask.fn(run, current), **by_hand(run, current, questions)}
    job = _job(run, current, inputs, Part(), "", tmp_path)
    evaluated = [ref for order in evaluate.orders(run, questions, [current.student]) for ref in order.shard.refs]
    told = {name: sorted(question_shards.Ref(*ref) for ref in job[name]) for name in ("refs", "probe")} | {
        split: evaluated
    }
    expected = {"refs": "train", "probe": "validation", split: split}
    assert told == {name: question_shards.references(questions, of) for name, of in expected.items()}
    assert all(told.values())


@pytest.mark.parametrize("coverage", ["partition", "full"])
def test_labels_take_the_place_of_responses(refs, coverage: str) -> None:
    labels = {ref.question_id: [number, 2] for number, ref in enumerate(refs)}
    groups = label_groups(refs, labels, RATIOS, coverage)
    assert all(g.responses == [labels[g.ref.question_id]] for g in groups)
    assert len(groups) == (len(refs) if coverage == "partition" else 2 * len(refs))
    steps = plan_steps(groups, 2, 3, 4, seed=0)
    trained = Counter(groups[g].ref for step in steps for g in step.groups)
    assert trained == {ref: 3 * (1 if coverage == "partition" else 2) for ref in refs}
    assert [s.stage for s in steps] == sorted(s.stage for s in steps)
    assert all(groups[g].stage == step.stage for step in steps for g in step.groups)
