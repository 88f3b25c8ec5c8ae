"""Effects of the settings that decide which model answers what, and what is trained on."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from masters.config import Config
from masters.config.mask_schedule import mask_stage_of
from masters.data import question_shards
from masters.models.generation.shards import ShardRequest
from masters.models.training.groups import Group, label_groups, plan_steps, response_groups
from masters.models.training.job import RoundPart
from masters.store.artifacts import Artifact
from masters.tasks import evaluate
from masters.tasks.data import data
from masters.tasks.generate import shard_requests
from masters.tasks.mask import mask
from masters.tasks.run_context import Context, Run
from masters.tasks.train import make_job
from tests.handmade_run import first_round, make_run, write_training_inputs
from tests.shape_data import write_questions

RATIOS = [0.2, 0.0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("source"), 40, bad=False)


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("store"), source)


@pytest.fixture(scope="module")
def questions(run: Run) -> Artifact:
    return data.fn(run)


@pytest.fixture(scope="module")
def refs(questions: Artifact) -> list[question_shards.QuestionRef]:
    return question_shards.read_refs(questions, "train")


@pytest.fixture(scope="module")
def tables(run: Run, questions: Artifact) -> dict[str, Artifact]:
    return write_training_inputs(run, first_round(run), questions)


@pytest.fixture(scope="module")
def request_shards(run: Run, questions: Artifact) -> Callable[..., list[ShardRequest]]:
    """Return a function that requests shards for changed values of the configuration."""
    masks = mask.fn(run, first_round(run))

    def request(r_max: float = 0.2, **generate: object) -> list[ShardRequest]:
        values = run.config.model_dump()
        values["teachers"][0]["r_max"] = r_max
        values["generate"] |= generate
        values["train"]["objective"] = "kd"  # "masters" needs two responses a question
        context = Context(Config.model_validate(values), run.resources)
        return shard_requests(context, first_round(context), questions, masks)

    return request


def responses_per_question(requests: list[ShardRequest]) -> dict[str, Counter]:
    """Count the requested responses by question digest, source and mask ratio."""
    count: dict[str, Counter] = {}
    for request in requests:
        for ref in request.shard.refs:
            count.setdefault(ref.digest, Counter())[request.source, request.mask_ratio] += request.samples
    return count


@pytest.mark.parametrize(("responses", "share"), [(8, 0.5), (8, 0.0), (8, 0.25), (8, 1.0), (1, 0.0), (4, 0.5)])
def test_student_share_splits_responses_between_teacher_and_student(
    request_shards, refs, responses: int, share: float
) -> None:
    counted = responses_per_question(request_shards(responses=responses, student_share=share))
    assert counted.keys() == {ref.digest for ref in refs}
    for digest, count in counted.items():
        student = round(responses * share)
        expected = Counter(
            {("student", None): student, ("teacher", RATIOS[mask_stage_of(digest, 2)]): responses - student}
        )
        assert count == +expected


def test_full_coverage_asks_every_masked_teacher_and_the_student_once(request_shards, refs) -> None:
    counted = responses_per_question(request_shards(coverage="full", responses=4))
    assert len(counted) == len(refs)
    assert all(c == Counter({("teacher", 0.2): 2, ("teacher", 0.0): 2, ("student", None): 2}) for c in counted.values())


def test_without_masks_the_unmasked_teacher_answers_every_question(request_shards, refs) -> None:
    counted = responses_per_question(request_shards(r_max=0.0, responses=4))
    assert len(counted) == len(refs)
    assert all(c == Counter({("teacher", 0.0): 2, ("student", None): 2}) for c in counted.values())


def by_stage(groups: Sequence[Group]) -> Counter:
    return Counter(group.stage for group in groups)


def test_partition_trains_on_each_question_in_its_mask_stage(refs, tables) -> None:
    groups, empty = response_groups(refs, tables["responses"], tables["verdicts"], RATIOS, "partition")
    assert empty == 0
    assert [(g.ref, g.stage) for g in groups] == [(ref, mask_stage_of(ref.digest, 2)) for ref in refs]
    # the teacher of the stage with a score of 1, then the student with 0; the other stage's teacher is left out
    assert all(len(g.responses) == 2 and g.scores.tolist() == [1.0, 0.0] for g in groups)


def test_full_coverage_trains_on_every_question_in_every_stage(refs, tables) -> None:
    groups, _ = response_groups(refs, tables["responses"], tables["verdicts"], RATIOS, "full")
    assert by_stage(groups) == {0: len(refs), 1: len(refs)}
    assert all(len(g.responses) == 2 for g in groups)


def test_without_verdicts_responses_are_equal_and_have_no_score(refs, tables) -> None:
    with_them, _ = response_groups(refs, tables["responses"], tables["verdicts"], RATIOS, "partition")
    without, _ = response_groups(refs, tables["responses"], None, RATIOS, "partition")
    assert [g.responses for g in without] == [g.responses for g in with_them]
    assert all(all(score != score for score in g.scores) for g in without)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_validation_questions_are_probed_and_never_trained_on(source: Path, split: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, source, data=dict(validation_share=0.3), evaluate=dict(split=split))
    current, questions = first_round(run), data.fn(run)
    inputs = {"data": questions, "masks": mask.fn(run, current), **write_training_inputs(run, current, questions)}
    job = make_job(run, current, inputs, RoundPart(), "", tmp_path)
    evaluated = [
        ref for request in evaluate.prediction_requests(run, questions, [current.student]) for ref in request.shard.refs
    ]
    found = {"train": sorted(job.refs), "validation": sorted(job.probe)}
    assert evaluated == question_shards.read_refs(questions, split)
    assert found == {name: question_shards.read_refs(questions, name) for name in found}
    assert all(found.values())


@pytest.mark.parametrize("coverage", ["partition", "full"])
def test_labels_replace_responses(refs, coverage: str) -> None:
    labels = {ref.question_id: [number, 2] for number, ref in enumerate(refs)}
    groups = label_groups(refs, labels, RATIOS, coverage)
    assert all(g.responses == [labels[g.ref.question_id]] for g in groups)
    assert len(groups) == (len(refs) if coverage == "partition" else 2 * len(refs))
    steps = plan_steps(groups, 2, 3, 4, seed=0)
    trained = Counter(groups[g].ref for step in steps for g in step.groups)
    assert trained == {ref: 3 * (1 if coverage == "partition" else 2) for ref in refs}
    assert [s.stage for s in steps] == sorted(s.stage for s in steps)
    assert all(groups[g].stage == step.stage for step in steps for g in step.groups)
