"""`generate.refresh = "stage"`: the mask stages of a round are generated, scored and trained one after the other."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from masters.checks.model_folder import LocalModel
from masters.common.errors import InputError
from masters.config import Config
from masters.config.mask_schedule import mask_stage_of
from masters.data import question_shards
from masters.execution.pool_request import StageRequest
from masters.flows.plan import stage_identities
from masters.flows.pool_stage import find_round
from masters.models.generation.shards import ShardRequest
from masters.store import tables
from masters.store.artifacts import Artifact
from masters.tasks import generate, score
from masters.tasks.data import data
from masters.tasks.mask import mask
from masters.tasks.refresh import first_part, next_part, planned_parts, split_round
from masters.tasks.run_context import Context, Round, Run
from masters.tasks.train import make_identity, train
from tests.handmade_run import first_round, make_run, write_table, write_training_inputs
from tests.shape_data import write_questions
from tests.tasks.test_work_pools import make_request

REFRESH_BY_STAGE = dict(generate=dict(responses=2, max_tokens=8, refresh="stage"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("source"), 52, bad=False)


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("store"), source, **REFRESH_BY_STAGE)


@pytest.fixture(scope="module")
def questions(run: Run) -> Artifact:
    return data.fn(run)


@pytest.fixture(scope="module")
def masks(run: Run) -> Artifact:
    return mask.fn(run, first_round(run))


def change_config(run: Run, **values: object) -> Context:
    """Return the run's context with other values by key, where `__` stands for a dot."""
    tree = run.config.model_dump()
    for key, value in values.items():
        *path, last = key.split("__")
        section = tree
        for part in path:
            section = section[int(part) if part.isdigit() else part]
        section[last] = value
    return Context(Config.model_validate(tree), run.resources)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit shards to 5 questions, so that some have questions of two mask stages."""
    monkeypatch.setattr(question_shards.plan_shards, "__defaults__", (5,))


def by_source(requests: list[ShardRequest], source: str) -> list[ShardRequest]:
    return [request for request in requests if request.source == source]


@pytest.mark.parametrize("coverage", ["partition", "full"])
def test_parts_request_the_same_as_the_round_with_equal_weights(run, questions, masks, coverage: str) -> None:
    """The teacher's shards equal those of the round. The student's are parts of them, answered in the same batches."""
    context = change_config(run, generate__coverage=coverage, teachers__0__mask_step=0.1)
    whole = generate.shard_requests(context, first_round(context), questions, masks)
    student = {request.fingerprint: request for request in by_source(whole, "student")}
    teacher, student_requests = [], []
    for part in split_round(context.config, first_round(context), questions):
        found = generate.shard_requests(context, part, questions, masks)
        teacher += by_source(found, "teacher")
        student_requests.append(by_source(found, "student"))
    assert len(student_requests) == 3 and teacher == by_source(whole, "teacher")
    for stage, requests in enumerate(student_requests):
        digests = [ref.digest for request in requests for ref in request.shard.refs]
        all_digests = [ref.digest for ref in question_shards.read_refs(questions, "train")]
        assert digests == [d for d in all_digests if coverage == "full" or mask_stage_of(d, 3) == stage]
        for request in requests:
            same = student[request.part_of or request.fingerprint]
            assert request.batch_refs == same.shard.refs and request.sampling == same.sampling
            assert replace(request, shard=same.shard, stored_name=None, part_of=None, batch=()) == same
    crossing = [request for requests in student_requests for request in requests if request.part_of]
    assert bool(crossing) == (coverage == "partition")


def test_restricting_a_request_twice_keeps_its_whole_shard(run, questions, masks) -> None:
    """A part that an earlier night stored has no batch, as only the whole shard is in the store."""
    request = by_source(generate.shard_requests(run, first_round(run), questions, masks), "student")[0]
    refs = request.shard.refs
    assert request.restrict_to(refs) == request and request.restrict_to(()) is None
    once = request.restrict_to(refs[1:])
    cut = replace(once, batch=()).restrict_to(refs[2:])
    assert once and cut and once.batch == refs and cut.batch == ()
    assert (
        cut.part_of == once.part_of == request.fingerprint
        and cut.fingerprint == request.restrict_to(refs[2:]).fingerprint
    )
    assert len({request.fingerprint, once.fingerprint, cut.fingerprint}) == 3


def test_first_part_requests_teacher_responses_of_all_later_parts(run, questions, masks) -> None:
    first, second = split_round(run.config, first_round(run), questions)
    later = generate.later_teacher_requests(run, first, questions, masks)
    assert later == by_source(generate.shard_requests(run, second, questions, masks), "teacher") != []
    later = replace(second, mask_stage=replace(second.mask_stage, previous=questions))  # any artifact, so not the first
    assert generate.later_teacher_requests(run, later, questions, masks) == []
    assert generate.later_teacher_requests(run, first_round(run), questions, masks) == []


def test_student_generates_with_its_weights_at_the_start_of_the_mask_stage(run, questions, masks) -> None:
    first, second = split_round(run.config, first_round(run), questions)
    moved = LocalModel("student-after", Path("elsewhere"), "another digest")
    second = replace(second, mask_stage=replace(second.mask_stage, student=moved))
    by_part = [by_source(generate.shard_requests(run, part, questions, masks), "student") for part in (first, second)]
    assert {request.model.digest for request in by_part[0]} == {run.resources.student.digest}
    assert {request.model.digest for request in by_part[1]} == {"another digest"}
    assert second.student == run.resources.student  # pi_ref stays
    assert {request.stage for requests in by_part for request in requests} == {0}  # and with it the seeds


def test_round_with_one_mask_stage_is_not_split(run, questions) -> None:
    contexts = [change_config(run, teachers__0__r_max=0.0, generate__refresh=refresh) for refresh in ("round", "stage")]
    for context in contexts:
        current = first_round(context)
        assert split_round(context.config, current, questions) == []
        assert first_part(context.config, current, questions) == current
    by_round, by_stage = ([identity.folder for identity in stage_identities(context)] for context in contexts)
    assert by_round == by_stage


def test_refresh_by_round_does_not_enter_identity(run) -> None:
    """Artifacts that were built before the setting existed are still found."""
    identities = list(stage_identities(change_config(run, generate__refresh="round")))
    for identity in identities:
        assert "refresh" not in str(identity.config) and "mask_stage" not in str(identity.config)
    expected = ["data", "mask", "generate", "score", "train", "evaluate", "register"]
    assert [identity.stage for identity in identities] == expected


def test_parts_have_different_names_and_identities(run) -> None:
    context = change_config(run, teachers=run.config.model_dump()["teachers"] * 2)
    context.resources = replace(run.resources, teachers=run.resources.teachers * 2)
    identities = list(stage_identities(context))
    assert [identity.stage for identity in identities] == [
        "data", "mask", "generate-mask0", "score-mask0", "train-mask0", "generate-mask1", "score-mask1", "train-mask1",
        "mask-2", "generate-2-mask0", "score-2-mask0", "train-2-mask0", "generate-2-mask1", "score-2-mask1",
        "train-2-mask1", "evaluate", "register",
    ]  # fmt: skip
    fingerprints = {identity.stage: identity.fingerprint for identity in identities}
    assert fingerprints["train-mask0"] != fingerprints["train-mask1"]
    assert fingerprints["generate-mask0"] != fingerprints["generate-mask1"]
    kinds = {"data", "mask", "generate", "score", "train", "evaluate", "register"}
    assert {identity.kind for identity in identities} == kinds


@pytest.mark.parametrize(
    ("stage", "number", "mask_stage"),
    [("train-mask0", 1, 0), ("generate-2-mask10", 2, 10), ("train-3", 3, None), ("evaluate-champion", 1, None)],
)
def test_stage_request_has_round_and_mask_stage(stage: str, number: int, mask_stage: int | None) -> None:
    request: StageRequest = make_request(stage=stage)
    assert (request.round, request.mask_stage, request.kind) == (number, mask_stage, stage.split("-")[0])


def test_mask_stages_without_questions_are_skipped(run, questions) -> None:
    refs = [ref for ref in question_shards.read_refs(questions, "train") if mask_stage_of(ref.digest, 2) == 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(question_shards, "read_refs", lambda *_: refs)
        (part,) = split_round(run.config, first_round(run), questions)
    assert part.mask_stage.number == 1 and part.starts_round and part.ends_round
    assert len(planned_parts(run.config, first_round(run))) == 2


class StageTables:
    """Responses and verdicts of each mask stage in separate artifacts."""

    def __init__(self, run: Run, current: Round, questions: Artifact) -> None:
        self.whole = write_training_inputs(run, current, questions)
        self._run = run
        self._stage = {
            ref.question_id: mask_stage_of(ref.digest, 2) for ref in question_shards.read_refs(questions, "train")
        }

    def of_stage(self, stage: int) -> dict[str, Artifact]:
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


def check_pool_rounds(run: Run, common: dict, first: Artifact, stage_tables: dict, last: Artifact) -> None:
    """Check that a worker of a pool restores the same rounds from references to artifacts."""
    questions, masks = common["data"], common["masks"]
    second = next_part(run, first_part(run.config, first_round(run), questions), first)
    generating = find_round(run, make_request(stage="generate-mask1"), common | {"student": first})
    assert generating == second and generating.mask_stage
    assert generating.mask_stage.student.digest == first.part_digests["model"]
    requests = generate.shard_requests(run, generating, questions, masks)
    assert requests == generate.shard_requests(run, second, questions, masks)
    training = find_round(run, make_request(stage="train-mask1"), common | stage_tables | {"earlier": first})
    assert make_identity(run, training, common | stage_tables).fingerprint == last.fingerprint
    part = find_round(run, make_request(stage="generate-mask0"), common)
    assert part == first_part(run.config, first_round(run), questions)
    with pytest.raises(InputError, match="expected one of score-mask0, score-mask1, found score-mask2"):
        find_round(run, make_request(stage="score-mask2"), common)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_separate_mask_stages_train_the_same_student_as_the_whole_round(
    ranks: int, source: Path, tmp_path: Path
) -> None:
    """On equal responses, weights, tables and probes are equal, and each part has the one before as an input."""
    learning = dict(learning_rate=1e-3, questions_per_step=4, schedule="cosine", warmup_steps=3)
    shared = dict(train_processes=ranks, sharding="fsdp2" if ranks > 1 else "replicate")
    run = make_run(tmp_path, source, train=learning, runtime=shared, **REFRESH_BY_STAGE)
    current, questions = first_round(run), data.fn(run)
    stage_tables, common = StageTables(run, current, questions), {"data": questions, "masks": mask.fn(run, current)}
    whole = train.fn(run, current, common | stage_tables.whole)
    made: list[Artifact] = []
    part: Round | None = first_part(run.config, current, questions)
    while part:
        assert part.mask_stage
        made.append(train.fn(run, part, common | stage_tables.of_stage(part.mask_stage.number)))
        part = next_part(run, part, made[-1])
    first, last = made
    assert {name for name, value in weights(whole).items() if not torch.equal(value, weights(last)[name])} == set()
    for table in ("history", "rewards"):
        rows = [row for part in made for row in part.rows(table)]
        assert sorted(rows, key=repr) == sorted(whole.rows(table), key=repr)
    assert first.facts["probes"] + last.facts["probes"] == whole.facts["probes"]
    assert (first.facts["steps_before"], last.facts["steps_before"]) == (0, first.facts["steps"])
    assert first.facts["steps"] + last.facts["steps"] == whole.facts["steps"]
    assert set(first.part_digests) - set(last.part_digests) == {"state"} and last.upstream("earlier") == first
    assert run.storage.names(f"{first.folder}/checkpoints") == []
    again = train.fn(run, first_part(run.config, current, questions), common | stage_tables.of_stage(0))
    assert run.stages[-1]["outcome"] == "reused" and again == first
    check_pool_rounds(run, common, first, stage_tables.of_stage(1), last)
    other = replace(first, record=first.record | dict(digest="0" * 64))
    second = next_part(run, first_part(run.config, current, questions), first)
    assert second and second.mask_stage
    inputs = common | stage_tables.of_stage(1)
    moved = replace(second, mask_stage=replace(second.mask_stage, previous=other))
    assert (
        make_identity(run, second, inputs).fingerprint
        == last.fingerprint
        != make_identity(run, moved, inputs).fingerprint
    )
    assert score.first_pass(run, second, []).stage == "score-mask1"
