"""The plan of a run: which stages it would build or reuse, and what changed since each was last built."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType

from masters.checks.preflight import preflight
from masters.common.errors import ArtifactError
from masters.config import Config
from masters.config.loading import flatten
from masters.config.stages import Stage
from masters.flows.distill import response_stages
from masters.store import artifacts
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage
from masters.tasks import data, evaluate, generate, mask, refresh, register, score, train
from masters.tasks.run_context import Context, Round


class InputsNotBuilt(Exception):
    """A stage is not built, so the identities of the stages that read it are not known yet."""


class PlanBuilder:
    """Collects the lines of a plan in `lines`.

    `skipped` holds the suffixes of mask stages that the run would not build by themselves.
    """

    def __init__(self, storage: Storage, rebuild: frozenset[Stage]) -> None:
        self._storage, self._rebuild = storage, rebuild
        self.lines: list[dict] = []
        self.skipped: set[str] = set()

    def find(self, identity: Identity, upstream: Mapping[str, Artifact] = MappingProxyType({})) -> Artifact:
        """Add the line of a stage and return its artifact. Raises InputsNotBuilt if the stage would be built."""
        artifact = None if identity.kind in self._rebuild else artifacts.find(self._storage, identity, upstream)
        outcome = "reused" if artifact else "built"
        changed = [] if artifact else find_changes(self._storage, identity)
        self.lines.append(dict(name=identity.stage, outcome=outcome, fingerprint=identity.fingerprint, changed=changed))
        if artifact is None:
            raise InputsNotBuilt
        return artifact


def plan(config: Config, rebuild: Collection[Stage] = ()) -> list[dict]:
    """Return the plan of a run without building anything.

    There is a line per stage: `name`, `outcome` ("built" or "reused"), `fingerprint` (None while the stage's inputs
    are not built) and `changed`, the fields that differ from the last build. If the inputs are not built, `changed`
    covers the stage's own settings only. `rebuild`: stages that the run would build again.
    """
    context = Context(config, preflight(config))
    builder = PlanBuilder(context.storage, frozenset(rebuild))
    with suppress(InputsNotBuilt):
        _plan_stages(context, builder)
    lines = {line["name"]: line for line in builder.lines}
    return [
        lines.get(identity.stage) or _line_without_inputs(context.storage, identity)
        for identity in stage_identities(context)
        if identity.stage.removeprefix(identity.kind) not in builder.skipped
    ]


def find_changes(storage: Storage, identity: Identity) -> list[str]:
    """Return the settings and the number of inputs that differ from the newest artifact with the same slug."""
    record = _newest_record(storage, identity)
    if record is None:
        return []
    inputs = len(_differing_keys(identity.inputs, record["inputs"]))
    return _changed_settings(identity, record) + ([f"{inputs} inputs"] if inputs else [])


def _changed_settings(identity: Identity, record: dict) -> list[str]:
    settings = _differing_keys(flatten(identity.config), flatten(record["config"]))
    return settings + (["code version"] if record["version"] != identity.version else [])


def _differing_keys(left: Mapping, right: Mapping) -> list[str]:
    return [key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)]


def _newest_record(storage: Storage, identity: Identity) -> dict | None:
    """Return the record of the stage's newest artifact with the same slug. Unreadable records are skipped."""
    slug = identity.folder.removesuffix(identity.fingerprint).split("/")[1]
    has_slug = re.compile(rf"{re.escape(slug)}[0-9a-f]{{{len(identity.fingerprint)}}}")
    names = [name for name in storage.children(identity.kind) if has_slug.fullmatch(name)]
    records = []
    for name in names:
        with suppress(ArtifactError):
            records.append(artifacts.load(storage, f"{identity.kind}/{name}").record)
    return max(records, key=lambda record: record["provenance"]["created"], default=None)


def _line_without_inputs(storage: Storage, identity: Identity) -> dict:
    """Return the line of a stage whose inputs are not built."""
    record = _newest_record(storage, identity)
    changed = _changed_settings(identity, record) if record else []
    return dict(name=identity.stage, outcome="built", fingerprint=None, changed=changed)


def stage_identities(context: Context) -> Iterator[Identity]:
    """Yield an identity per stage in order, computed from the settings alone, without any inputs."""
    config = context.config
    yield data.make_identity(context)
    for current in _first_rounds(context):
        yield mask.make_identity(context, current)
        for part in refresh.planned_parts(config, current):
            if Stage.GENERATE in response_stages(config):
                yield generate.make_identity(context, part, [])
            if Stage.SCORE in response_stages(config):
                yield score.first_pass(context, part, [])
            yield train.make_identity(context, part, {})
    yield evaluate.make_identity(context, [])
    yield register.make_identity(context, {})


def _first_rounds(context: Context) -> Iterator[Round]:
    """Yield a round per teacher, as if each started from the initial student."""
    teachers = zip(context.config.teachers, context.resources.teachers, strict=True)
    for number, (config, teacher) in enumerate(teachers, 1):
        yield Round(number, config, teacher, context.resources.student)


def _plan_stages(context: Context, builder: PlanBuilder) -> None:
    resources = context.resources
    questions = builder.find(data.make_identity(context))
    student = resources.student
    for current in _first_rounds(context):
        trained = _plan_round(context, builder, replace(current, student=student), questions)
        student = context.load_student(trained)
    models = [*resources.teachers, evaluate.initial_student(resources), student]
    requests = evaluate.prediction_requests(context, questions, models)
    evaluated = builder.find(evaluate.make_identity(context, requests), {"data": questions})
    builder.find(register.make_identity(context, {"train": trained, "evaluate": evaluated}))


def _plan_round(context: Context, builder: PlanBuilder, current: Round, questions: Artifact) -> Artifact:
    """Plan a round and return the train artifact that ends it."""
    config = context.config
    masks = builder.find(mask.make_identity(context, current))
    remaining = {part.suffix for part in refresh.split_round(config, current, questions)}
    separate = {part.suffix for part in refresh.planned_parts(config, current) if part.mask_stage}
    builder.skipped |= separate - remaining  # mask stages without questions
    following: Round | None = refresh.first_part(config, current, questions)
    while following:
        current, inputs = following, {"data": questions, "masks": masks}
        remaining -= {current.suffix}
        if Stage.GENERATE in response_stages(config):
            requests = generate.shard_requests(context, current, questions, masks)
            inputs["responses"] = builder.find(generate.make_identity(context, current, requests), inputs)
        if Stage.SCORE in response_stages(config):
            inputs["verdicts"] = builder.find(score.make_identity(context, current, inputs["responses"]), inputs)
        trained = builder.find(train.make_identity(context, current, inputs), train.upstream_artifacts(current, inputs))
        following = refresh.next_part(context, current, trained)
    builder.skipped |= remaining  # mask stages after a rollback
    return trained
