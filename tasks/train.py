"""train: mask-progressive distillation and offline GRPO, in processes of its own."""

import math
import os
from dataclasses import asdict
from pathlib import Path

from prefect import task

from masters.common.errors import InputError, WorkerError
from masters.common.hashing import digest, file_digest
from masters.data import question_shards
from masters.data.question_shards import QuestionRef
from masters.execution import processes
from masters.models.training import history
from masters.models.training.round_part import Part
from masters.store import artifacts
from masters.store.artifacts import Artifact, Identity
from masters.tasks.build import TASK_OPTIONS, StageResult, build_or_reuse
from masters.tasks.mask import read_thresholds
from masters.tasks.progress import Progress, warn
from masters.tasks.refresh import mask_stage_refs
from masters.tasks.run_context import Context, Round, Run

# 3: identical responses are read once, questions of one image share its tokens; 4: history and rewards; 5: inputs by
# what they hold, so that a student that was made from other answers under the same identity keeps its files; 6: the
# learning rate's schedule, clipping, and switches of the objective; history has learning rate and gradient norm;
# 7: history has diagnostics
VERSION = 7
PROBE = 128  # questions watched while it trains: of the evaluation split, as long as nothing is chosen by them
HELD_OUT = 10  # with `train.max_validation_drop` they are training questions instead, at most one in so many
GUARD = {"max_validation_drop", "on_drop"}
STATE = "state"  # of weights, optimizer and random numbers, for the mask stage that goes on from them


Inputs = dict[str, Artifact]  # data, masks and, where the configuration needs them, responses and verdicts


def make_identity(context: Context, current: Round, inputs: Inputs) -> Identity:
    train, rewards = context.config.train, context.config.rewards
    plain = set() if train.max_validation_drop is not None else GUARD  # without it, no part in what is made
    if train.compute_dtype == "float32":
        plain = plain | {"compute_dtype"}  # as before there was a choice
    if train.control == "none":
        plain = plain | {"control"}  # likewise
    if train.balance == "sum" or train.objective != "masters":
        plain = plain | {"balance"}  # likewise
    config: dict = dict(
        train=train.model_dump(exclude=plain), ratios=current.ratios, coverage=context.config.generate.coverage
    )
    if current.mask_stage:
        config["mask_stage"] = current.mask_stage.number
    if train.objective == "masters":
        config["rewards"] = rewards.model_dump(exclude={"judge", "judge_model"})  # theirs are the verdicts' identity
    made_from = {"teacher": current.teacher.digest, "student": current.student.digest}
    made_from |= {name: artifact.content_digest for name, artifact in read(current, inputs).items()}
    return Identity(f"train{current.suffix}", VERSION, config, made_from, slug=context.config.name)


def read(current: Round, inputs: Inputs) -> Inputs:
    """Every artifact but models that a training reads: also the training of the mask stage before."""
    earlier = current.mask_stage.previous if current.mask_stage else None
    return inputs | {"earlier": earlier} if earlier else inputs


@task(name="train", task_run_name="train{current.suffix}", **TASK_OPTIONS)
def train(run: Run, current: Round, inputs: Inputs) -> Artifact:
    """The trained student as a Hugging Face folder under `model/`; tables `history` and `rewards`.

    Of a mask stage that is trained alone and not its round's last also `state/`, from which the next one goes on.
    """
    made_of = make_identity(run, current, inputs)
    checkpoints = f"{made_of.folder}/checkpoints"

    def build() -> StageResult:
        work = run.work_folder(made_of)
        part = part_of(run, current, inputs["data"], f"{made_of.folder}/{STATE}")
        job = _job(run, current, inputs, part, checkpoints, work / "model")
        with run.track_progress(made_of, "steps") as progress:
            watch = _Watch(run, progress, current.ratios, part.steps_before)
            ran = _ran(run, job, work, watch)
        if artifacts.find(run.storage, made_of):  # another machine was first: its files stay what its record says
            return StageResult({})
        run.storage.upload(work / "model", f"{made_of.folder}/model")
        files = {f"model/{p.name}": file_digest(p) for p in sorted((work / "model").iterdir())}
        files |= _tables(run, made_of, checkpoints, part, watch.taken) | _state(run, part, made_of, watch)
        how = dict(
            **watch.held, steps=watch.steps, resumed_at_step=watch.resumed,
            remask_seconds=watch.remasks, planned=watch.planned, packed=watch.packed,
            token_budgets=watch.budgets, refused_checkpoints=watch.refused, **ran.summarize(),
        )  # fmt: skip
        facts = dict(
            rows=watch.groups,
            steps=watch.steps,
            empty_responses=watch.empty,
            last=watch.last,
            probes=watch.probes,
            warnings=watch.warnings,
        )
        if current.mask_stage:
            facts["steps_before"] = part.steps_before
        if run.config.train.max_validation_drop is not None:
            facts |= dict(held_out=len(job["probe"]), rolled_back=watch.rolled_back)
        return StageResult(files, facts, how)

    models = dict(teacher=current.teacher.origin, student=current.student.origin)
    artifact = build_or_reuse(run, made_of, read(current, inputs) | models, build)
    # not before the record is there: without the rows beside it a checkpoint that is still there would lose them
    for name in run.storage.names(checkpoints):
        run.storage.remove(name)
    return artifact


def part_of(context: Context, current: Round, data: Artifact, state: str) -> Part:
    """Where in its round the training of `current` lies. `state`: where it leaves what a part after it goes on from."""
    if current.mask_stage is None:
        return Part()
    train, earlier = context.config.train, current.mask_stage.previous
    # known before their responses are: a question that gets none takes no part in its step
    refs, _ = learnt_from(context, data)
    expected = (len(mask_stage_refs(context.config, current, refs, stage)) for stage in current.mask_stage.remaining)
    return Part(
        steps_before=earlier.facts["steps_before"] + earlier.facts["steps"] if earlier else 0,
        steps_after=sum(train.epochs * math.ceil(count / train.questions_per_step) for count in expected),
        handed_over=f"{earlier.folder}/{STATE}" if earlier else "",
        hand_over=state if current.mask_stage.remaining else "",
        histories=[artifact.folder for artifact in _trained_before(earlier)],
    )


def _trained_before(earlier: Artifact | None) -> list[Artifact]:
    """The trainings of a round's mask stages up to one, in order."""
    return [*_trained_before(earlier.upstream("earlier")), earlier] if earlier else []


def learnt_from(context: Context, data: Artifact) -> tuple[list[QuestionRef], list[QuestionRef]]:
    """The questions of all mask stages to learn from, and those that are only looked at."""
    refs = question_shards.read_refs(data, "train")
    probe = question_shards.read_refs(data, context.config.probe_split)[:PROBE]
    if context.config.train.max_validation_drop is not None:
        return held_out(refs)
    return refs, probe


def _job(run: Run, current: Round, inputs: Inputs, part: Part, checkpoints: str, out: Path) -> dict:
    refs, probe = learnt_from(run, inputs["data"])
    if current.mask_stage:
        refs = mask_stage_refs(run.config, current, refs, current.mask_stage.number)
    return dict(
        store=run.storage.uri(""), tables={name: artifact.folder for name, artifact in inputs.items()},
        refs=_refs(refs), probe=_refs(probe), part=asdict(part), mask_stage=current.mask_stage and current.mask_stage.number,
        teacher=str(current.teacher.folder), student=str(current.student.folder), ratios=current.ratios,
        thresholds={str(ratio): values for ratio, values in read_thresholds(inputs["masks"]).items()},
        coverage=run.config.generate.coverage,
        train=run.config.train.model_dump(), rewards=run.config.rewards.model_dump(),
        checkpoints=checkpoints, checkpoint_steps=run.config.runtime.checkpoint_steps, out=str(out),
        token_budget=run.config.runtime.token_budget, sharding=run.config.runtime.sharding,
        activation_checkpointing=run.config.runtime.activation_checkpointing,
    )  # fmt: skip


def held_out(refs: list[QuestionRef]) -> tuple[list[QuestionRef], list[QuestionRef]]:
    """Training questions to learn from, and those that only the probe looks at, of whatever mask stage.

    Raises InputError where there are too few to hold any out.
    """
    count = min(PROBE, len(refs) // HELD_OUT)
    if not count:
        raise InputError(
            f"train.max_validation_drop holds one training question in {HELD_OUT} out: expected {HELD_OUT} or more, "
            f"found {len(refs)}; leave it out"
        )
    # not the digest itself: its leading bits choose the mask stage
    probe = set(sorted(refs, key=lambda ref: digest(f"probe {ref.digest}".encode()))[:count])
    return [ref for ref in refs if ref not in probe], [ref for ref in refs if ref in probe]


def _ran(run: Run, job: dict, work: Path, watch: "_Watch") -> processes.ProcessUsage:
    """The trainers' work. Where one ran out of memory in a pass that needs all of them, all begin again with less."""
    runtime = run.config.runtime
    while True:
        try:
            return processes.run(
                _ranks(run, job, work), runtime.train_processes, watch, runtime.heartbeat_timeout_minutes * 60
            )
        except WorkerError as error:
            if not watch.smaller:
                raise
            warn(str(error))
            job = job | dict(token_budget=min(watch.smaller))
            watch.smaller.clear()


def _ranks(run: Run, job: dict, work: Path) -> list[processes.Child]:
    """One child a rank. Ranks meet through a new file in the work folder, over loopback."""
    world = run.config.runtime.train_processes
    meeting = work / "rendezvous"
    meeting.unlink(missing_ok=True)
    shared = {"WORLD_SIZE": str(world), "MASTERS_RENDEZVOUS": str(meeting)}
    # with spinning barriers one busy neighbor on a core stalls every step (measured: 0.08 s a step became 2.5 s)
    shared["OMP_WAIT_POLICY"] = "PASSIVE"
    shared["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // world))
    return [
        processes.Child(f"rank-{rank}", "masters.models.training.worker", job, work, shared | {"RANK": str(rank)})
        for rank in range(world)
    ]


def _state(run: Run, part: Part, made_of: Identity, watch: "_Watch") -> dict[str, str]:
    """What the trainers left for the part of the round that follows, if one does. Returns {name: SHA-256}."""
    if not part.hand_over or watch.rolled_back:
        return {}
    names = run.storage.names(part.hand_over)
    return {name.removeprefix(f"{made_of.folder}/"): run.storage.digest(name) for name in names}


def _tables(run: Run, made_of: Identity, checkpoints: str, part: Part, steps: int) -> dict[str, str]:
    """The trainers' tables put into the artifact. Returns {name: SHA-256}.

    Raises ArtifactError where they are not of these steps, each once.
    """
    written, census = {}, history.HistoryCheck()
    for table in history.SCHEMAS:
        for number, content in enumerate(history.files(run.storage, checkpoints, table)):
            name = f"{table}/{number:04d}.parquet"
            run.storage.write(f"{made_of.folder}/{name}", content)
            written[name] = digest(content)
            census.count(table, content)
    census.check(steps, rewarded=run.config.train.objective == "masters", before=part.steps_before)
    return written


def _refs(refs: list[QuestionRef]) -> list[list]:
    return [[r.digest, r.question_id, r.file, r.row] for r in refs]


def steps_taken(facts: dict) -> int:
    """Optimizer steps of a training by what its record says, without those after which a student was put back."""
    back = facts.get("rolled_back")
    return back["at"] - facts.get("steps_before", 0) if back else facts["steps"]


def _shares(sizes: dict) -> dict:
    """What the passes of this run were made of, beside a sequence a response."""
    separate, packed, padded = (sizes[name] for name in ("separate", "packed_tokens", "padded"))
    return dict(
        passes=sizes["passes"], tokens=packed, padding_share=round(1 - packed / max(1, padded), 4),
        saved_share=round(1 - packed / max(1, separate), 4),
    )  # fmt: skip


class _Watch:
    """Follows the trainer's progress lines: the progress shown, metrics, and what the record keeps."""

    def __init__(self, run: Run, progress: Progress, mask_ratios: list[float], steps_before: int = 0) -> None:
        self._run, self._progress, self._mask_ratios = run, progress, mask_ratios
        self._steps_before = steps_before
        self.groups = self.steps = self.empty = self.resumed = 0
        self.last: dict = {}
        self.probes: list[dict] = []
        self.warnings: list[dict] = []  # limits that the run crossed, each once: step, name, text
        self.remasks: list[float] = []  # seconds, a mask stage each
        self.planned: dict = {}
        self.packed: dict = {}
        self.budgets: list[dict] = []  # where memory did not hold a pass: the rank, and its budget from then on
        self.smaller: list[int] = []  # budgets with which all are to begin again
        self.held: dict = {}  # processes, and how they hold the weights
        self.rolled_back: dict | None = None
        self.refused: list[str] = []  # checkpoints that could not be gone on with, and why

    @property
    def taken(self) -> int:
        """Steps that there are: a student that fell and was put back takes no more."""
        return self.rolled_back["at"] - self._steps_before if self.rolled_back else self.steps

    def __call__(self, _: str, line: dict) -> None:
        event = line.pop("event")
        if event == "start":
            self.groups, self.steps, self.empty = line["groups"], line["steps"], line["empty_responses"]
            self.planned = line["planned"]
        elif event == "resumed":
            self.resumed = line["step"]
            self.probes = [look for look in self.probes if look["step"] <= self.resumed]
        elif event == "refused_checkpoint":
            self.refused.append(line["why"])
            warn(f"{line['why']}; going on from the one before")
        elif event == "reference":
            share = line["done"] / line["of"]
            self._progress.update(0, self.steps, f"reference log-probabilities {share:.0%}")
        elif event == "step":
            self._step(line)
        elif event == "remask":
            self.remasks.append(round(line["seconds"], 3))
        elif event == "packed":
            self.packed = _shares(line)
        elif event == "held":
            self.held = line
        elif event in ("token_budget", "again"):
            self.budgets.append(line)
            self.smaller += [line["tokens"]] if event == "again" else []
        elif event == "rolled_back":
            self.rolled_back = line
        elif event == "warning":
            self._warning(line)
        elif event == "probe":
            self.probes.append(line)
            self._run.tracker.metrics({"probe_accuracy": line["accuracy"]}, line["step"])

    def _warning(self, line: dict) -> None:
        if any(line["name"] == known["name"] for known in self.warnings):
            return  # said again by a trainer that went on from a checkpoint
        self.warnings.append(line)
        warn(f"train, step {line['step']}: {line['text']}")
        self._run.tracker.warning(line["name"], f"step {line['step']}: {line['text']}")

    def _step(self, line: dict) -> None:
        step, of = line.pop("step"), line.pop("of")
        line["mask_ratio"] = self._mask_ratios[line["stage"]]
        self.last = {name: value for name, value in line.items() if math.isfinite(value)}
        self._run.tracker.metrics(self.last, step)
        self._progress.update(step, of, f"loss {line['loss']:.4f} mask {line['mask_ratio']:.2f}")
