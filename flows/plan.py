"""What a run would build or reuse, and which fields changed since the stage was last built. Builds nothing."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType

from masters.checks.preflight import preflight
from masters.config import Config
from masters.config.loading import flatten
from masters.config.stages import Stage
from masters.flows.distill import response_stages
from masters.store import artifacts
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage
from masters.tasks import data, evaluate, generate, mask, refresh, register, score, train
from masters.tasks.run_context import Context, Round


class Unknown(Exception):
    """A stage's inputs are not built, so its identity, and those behind it, cannot be known yet."""


class Plan:
    """Lines of the plan; `find` adds one and gives the finished artifact, or raises Unknown."""

    def __init__(self, storage: Storage, rebuild: frozenset[Stage]) -> None:
        self.storage, self.rebuild, self.lines = storage, rebuild, []
        self.left_out: set[str] = set()  # suffixes of mask stages that a round does without

    def find(self, identity: Identity, upstream: Mapping[str, Artifact] = MappingProxyType({})) -> Artifact:
        artifact = None if identity.kind in self.rebuild else artifacts.find(self.storage, identity, upstream)
        outcome = "reused" if artifact else "built"
        changed = [] if artifact else changes(self.storage, identity)
        self.lines.append(dict(name=identity.stage, outcome=outcome, fingerprint=identity.fingerprint, changed=changed))
        if artifact is None:
            raise Unknown
        return artifact


def plan(config: Config, rebuild: Collection[Stage] = ()) -> list[dict]:
    """Per stage: `name`, `outcome` ("built", "reused"), `fingerprint` (None until its inputs are built), `changed`.

    `rebuild`: stages that the run would build again; what those behind them are made from is then not known either.
    Of a stage whose inputs are not known, `changed` names what changed in its own settings.
    """
    resources = preflight(config)
    context = Context(config, resources)
    found = Plan(resources.storage, frozenset(rebuild))
    with suppress(Unknown):
        _walk(context, found)
    known = {line["name"]: line for line in found.lines}
    return [
        known.get(identity.stage) or _behind(resources.storage, identity)
        for identity in stage_identities(context)
        if identity.stage.removeprefix(identity.kind) not in found.left_out
    ]


def changes(storage: Storage, identity: Identity) -> list[str]:
    """Fields of config and number of inputs that differ from the newest artifact of the stage under the same slug."""
    if (last := _newest(storage, identity)) is None:
        return []
    keys, ours, theirs = identity.inputs.keys() | last["inputs"].keys(), identity.inputs, last["inputs"]
    inputs = sum(ours.get(key) != theirs.get(key) for key in keys)
    return _fields(identity, last) + ([f"{inputs} inputs"] if inputs else [])


def _fields(identity: Identity, last: dict) -> list[str]:
    ours, theirs = flatten(identity.config), flatten(last["config"])
    fields = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    return fields + (["code version"] if last["version"] != identity.version else [])


def _newest(storage: Storage, identity: Identity) -> dict | None:
    """The record of the newest artifact of the stage under the same slug."""
    slug = identity.folder.removesuffix(identity.fingerprint).split("/")[1]
    known = re.compile(rf"{re.escape(slug)}[0-9a-f]{{{len(identity.fingerprint)}}}")
    names = [n for n in storage.children(identity.kind) if known.fullmatch(n)]
    paths = [f"{identity.kind}/{name}/record.json" for name in names]
    records = [json.loads(storage.read(path)) for path in paths if storage.exists(path)]
    return max(records, key=lambda record: record["provenance"]["created"], default=None)


def _behind(storage: Storage, identity: Identity) -> dict:
    """The line of a stage whose inputs are not built."""
    last = _newest(storage, identity)
    changed = _fields(identity, last) if last else []
    return dict(name=identity.stage, outcome="built", fingerprint=None, changed=changed)


def stage_identities(context: Context) -> Iterator[Identity]:
    """Every stage of the run in order, by its settings alone: as if made from nothing."""
    config, resources = context.config, context.resources
    yield data.make_identity(context)
    for number, (teacher, model) in enumerate(zip(config.teachers, resources.teachers, strict=True), 1):
        current = Round(number, teacher, model, resources.student)
        yield mask.make_identity(context, current)
        for part in refresh.planned_parts(config, current):
            if Stage.GENERATE in response_stages(config):
                yield generate.make_identity(context, part, [])
            if Stage.SCORE in response_stages(config):
                yield score.first_pass(context, part, [])
            yield train.make_identity(context, part, {})
    yield evaluate.make_identity(context, [])
    yield register.make_identity(context, {})


def _walk(context: Context, found: Plan) -> None:
    config, resources = context.config, context.resources
    questions = found.find(data.make_identity(context))
    student = resources.student
    for number, (teacher, model) in enumerate(zip(config.teachers, resources.teachers, strict=True), 1):
        current = Round(number, teacher, model, student)
        trained = _walk_round(context, found, current, questions)
        student = context.load_student(trained)
    asked = evaluate.prediction_requests(context, questions, [*resources.teachers, evaluate.initial_student(resources), student])
    evaluated = found.find(evaluate.make_identity(context, asked), {"data": questions})
    found.find(register.make_identity(context, {"train": trained, "evaluate": evaluated}))


def _walk_round(context: Context, found: Plan, current: Round, questions: Artifact) -> Artifact:
    """The training that ends a round."""
    config, masks = context.config, found.find(mask.make_identity(context, current))
    with_questions = {part.suffix for part in refresh.split_round(config, current, questions)}
    found.left_out |= {part.suffix for part in refresh.planned_parts(config, current) if part.mask_stage} - with_questions
    coming: Round | None = refresh.first_part(config, current, questions)
    while coming:
        current, inputs = coming, {"data": questions, "masks": masks}
        with_questions -= {current.suffix}
        if Stage.GENERATE in response_stages(config):
            asked = generate.shard_requests(context, current, questions, masks)
            inputs["responses"] = found.find(generate.make_identity(context, current, asked), inputs)
        if Stage.SCORE in response_stages(config):
            inputs["verdicts"] = found.find(score.make_identity(context, current, inputs["responses"]), inputs)
        trained = found.find(train.make_identity(context, current, inputs), train.read(current, inputs))
        coming = refresh.next_part(context, current, trained)
    found.left_out |= with_questions  # after a student that was put back
    return trained
