"""train: mask-progressive distillation and offline GRPO, in trainer processes."""

import math
import os
from pathlib import Path

from prefect import task

from masters.common.errors import InputError, WorkerError
from masters.common.hashing import digest, file_digest
from masters.data import question_shards
from masters.data.question_shards import QuestionRef
from masters.execution import processes
from masters.execution.processes import WorkerModule
from masters.models.training import history
from masters.models.training.job import RoundPart, TrainJob
from masters.store import artifacts
from masters.store.artifacts import Artifact, Identity
from masters.tasks.build_or_reuse import TASK_OPTIONS, StageResult, build_or_reuse, write_file
from masters.tasks.mask import read_thresholds
from masters.tasks.progress import warn
from masters.tasks.refresh import mask_stage_refs
from masters.tasks.run_context import Context, Round, Run
from masters.tasks.training_monitor import TrainingMonitor
from masters.tasks.training_signal import advantage_shares

# 3: identical responses are read once, questions about one image share its tokens; 4: history and rewards; 5: inputs
# by content, so that a student made from other responses under the same identity keeps its files; 6: the learning
# rate's schedule, clipping, and switches of the objective; history has learning rate and gradient norm; 7: history has
# diagnostics
VERSION = 7
# Probe questions only measure accuracy while the student trains. They are evaluation questions, unless training
# decides by them (`train.max_validation_drop`): then training questions are held out, at most one in HELD_OUT_INTERVAL.
MAX_PROBE = 128
HELD_OUT_INTERVAL = 10
GUARD_FIELDS = {"max_validation_drop", "on_drop"}
STATE = "state"  # folder of weights, optimizer and random state that the next mask stage starts from

Inputs = dict[str, Artifact]  # data, masks and, where the configuration needs them, responses and verdicts


def make_identity(context: Context, current: Round, inputs: Inputs) -> Identity:
    """Return the identity of a training. Settings without effect are left out, so that they do not cause a rebuild."""
    train, rewards = context.config.train, context.config.rewards
    without_effect = set() if train.max_validation_drop is not None else GUARD_FIELDS
    if train.compute_dtype == "float32":
        without_effect = without_effect | {"compute_dtype"}
    if train.control == "none":
        without_effect = without_effect | {"control"}
    if train.balance == "sum" or train.objective != "masters":
        without_effect = without_effect | {"balance"}
    config: dict = dict(
        train=train.model_dump(exclude=without_effect),
        ratios=current.ratios,
        coverage=context.config.generate.coverage,
    )
    if train.targets == "responses" and context.config.generate.truncated != "keep":
        config["truncated"] = context.config.generate.truncated  # absent: as before there was a choice
    if current.mask_stage:
        config["mask_stage"] = current.mask_stage.number
    if any(m.processor_output and m.processor_output.padding for m in (context.resources.student, current.teacher)):
        config["vocabulary"] = "tokenizer"  # before, rows that pad the embedding counted as tokens
    if train.objective == "masters":
        of_verdicts = {"judge", "judge_model", "judge_tokens"}  # part of the verdicts' identity
        config["rewards"] = rewards.model_dump(exclude=of_verdicts)
    made_from = {"teacher": current.teacher.digest, "student": current.student.digest}
    made_from |= {name: artifact.content_digest for name, artifact in upstream_artifacts(current, inputs).items()}
    return Identity(f"train{current.suffix}", VERSION, config, made_from, slug=context.config.name)


def upstream_artifacts(current: Round, inputs: Inputs) -> Inputs:
    """Return the artifacts that a training reads: its inputs, and that of the previous mask stage, if any."""
    previous = current.mask_stage.previous if current.mask_stage else None
    return inputs | {"earlier": previous} if previous else inputs


@task(name="train", task_run_name="train{current.suffix}", **TASK_OPTIONS)
def train(run: Run, current: Round, inputs: Inputs) -> Artifact:
    """Train the student: a Hugging Face folder `model/`, and the tables `history` and `rewards`.

    A mask stage that is trained alone also leaves `state/` for the next one, unless it is the round's last.
    """
    identity = make_identity(run, current, inputs)
    checkpoints = f"{identity.folder}/checkpoints"

    def build() -> StageResult:
        work = run.work_folder(identity)
        part = make_round_part(run, current, inputs["data"], f"{identity.folder}/{STATE}")
        job = make_job(run, current, inputs, part, checkpoints, work / "model")
        with run.track_progress(identity, "steps") as progress:
            monitor = TrainingMonitor(run, progress, current.ratios, part.steps_before)
            usage = _run_trainers(run, job, work, monitor)
        if artifacts.find(run.storage, identity):  # another machine was first; its record lists its files, not these
            return StageResult({})
        run.storage.upload(work / "model", f"{identity.folder}/model")
        files = {f"model/{file.name}": file_digest(file) for file in sorted((work / "model").iterdir())}
        files |= _write_tables(run, identity, checkpoints, part, monitor.steps_taken)
        files |= _state_files(run, identity, part, monitor)
        signal = advantage_shares(history.steps(run.storage, checkpoints))
        facts = _facts(run, current, job, monitor) | dict(signal=signal)
        return StageResult(files, facts, _execution(monitor, usage))

    models = dict(teacher=current.teacher.origin, student=current.student.origin)
    artifact = build_or_reuse(run, identity, upstream_artifacts(current, inputs) | models, build)
    # only now that the record exists: an interrupted build needs the checkpoints and the rows beside them
    for name in run.storage.names(checkpoints):
        run.storage.remove(name)
    return artifact


def _facts(run: Run, current: Round, job: TrainJob, monitor: TrainingMonitor) -> dict:
    """Return the training's facts for the artifact's record."""
    facts: dict = dict(
        rows=monitor.groups,
        steps=monitor.steps,
        empty_responses=monitor.empty_responses,
        last=monitor.last_step,
        probes=monitor.probes,
        warnings=monitor.warnings,
    )
    if current.mask_stage:
        facts["steps_before"] = job.part.steps_before
    if monitor.dropped_settings:
        facts["dropped_generation_settings"] = monitor.dropped_settings
    if run.config.train.max_validation_drop is not None:
        facts |= dict(held_out=len(job.probe), rolled_back=monitor.rolled_back)
    return facts


def _execution(monitor: TrainingMonitor, usage: processes.ProcessUsage) -> dict:
    """Return how the training ran, for the summary of the run."""
    return dict(
        **monitor.models,
        steps=monitor.steps,
        resumed_at_step=monitor.resumed_at_step,
        remask_seconds=monitor.remask_seconds,
        planned=monitor.planned,
        packed=monitor.packed,
        token_budgets=monitor.token_budgets,
        refused_checkpoints=monitor.refused_checkpoints,
        **usage.summarize(),
    )


def steps_taken(facts: dict) -> int:
    """Return the optimizer steps of a training according to its record; fewer than planned if it was rolled back."""
    rolled_back = facts.get("rolled_back")
    return rolled_back["at"] - facts.get("steps_before", 0) if rolled_back else facts["steps"]


def make_round_part(context: Context, current: Round, data: Artifact, state: str) -> RoundPart:
    """Return the part of its round that a training covers. `state`: store prefix for what the next part starts from."""
    if current.mask_stage is None:
        return RoundPart()
    train, previous = context.config.train, current.mask_stage.previous
    refs, _ = split_probe(context, data)
    # later stages have no responses yet: a question that gets none is still counted, and its step is smaller
    expected = (len(mask_stage_refs(context.config, current, refs, stage)) for stage in current.mask_stage.remaining)
    return RoundPart(
        steps_before=previous.facts["steps_before"] + previous.facts["steps"] if previous else 0,
        steps_after=sum(train.epochs * math.ceil(count / train.questions_per_step) for count in expected),
        start_state=f"{previous.folder}/{STATE}" if previous else "",
        end_state=state if current.mask_stage.remaining else "",
        earlier_parts=[artifact.folder for artifact in _trainings_up_to(previous)],
    )


def _trainings_up_to(training: Artifact | None) -> list[Artifact]:
    """Return the trainings of a round's mask stages up to this one, in order."""
    return [*_trainings_up_to(training.upstream("earlier")), training] if training else []


def split_probe(context: Context, data: Artifact) -> tuple[list[QuestionRef], list[QuestionRef]]:
    """Return the questions to train on, of all mask stages, and the probe questions."""
    refs = question_shards.read_refs(data, "train")
    if context.config.train.max_validation_drop is not None:
        return hold_out(refs)
    return refs, question_shards.read_refs(data, context.config.probe_split)[:MAX_PROBE]


def hold_out(refs: list[QuestionRef]) -> tuple[list[QuestionRef], list[QuestionRef]]:
    """Split training questions, of all mask stages alike, into those to train on and the probe questions.

    Raises InputError if there are too few to hold any out.
    """
    count = min(MAX_PROBE, len(refs) // HELD_OUT_INTERVAL)
    if not count:
        raise InputError(
            f"train.max_validation_drop holds one training question in {HELD_OUT_INTERVAL} out: expected "
            f"{HELD_OUT_INTERVAL} or more, found {len(refs)}; leave it out"
        )
    # not the question's digest itself, whose leading bits choose the mask stage
    probe = set(sorted(refs, key=lambda ref: digest(f"probe {ref.digest}".encode()))[:count])
    return [ref for ref in refs if ref not in probe], [ref for ref in refs if ref in probe]


def make_job(run: Run, current: Round, inputs: Inputs, part: RoundPart, checkpoints: str, out: Path) -> TrainJob:
    """Return the job of the trainer processes."""
    config, mask_stage = run.config, current.mask_stage.number if current.mask_stage else None
    refs, probe = split_probe(run, inputs["data"])
    return TrainJob(
        store=run.storage.uri(""),
        tables={name: artifact.folder for name, artifact in inputs.items()},
        refs=refs if mask_stage is None else mask_stage_refs(config, current, refs, mask_stage),
        probe=probe,
        part=part,
        mask_stage=mask_stage,
        teacher=current.teacher.folder,
        student=current.student.folder,
        ratios=current.ratios,
        thresholds=read_thresholds(inputs["masks"]),
        coverage=config.generate.coverage,
        truncated=config.generate.truncated,
        train=config.train,
        rewards=config.rewards,
        checkpoints=checkpoints,
        checkpoint_steps=config.runtime.checkpoint_steps,
        out=out,
        token_budget=config.runtime.token_budget,
        sharding=config.runtime.sharding,
        activation_checkpointing=config.runtime.activation_checkpointing,
    )


def _run_trainers(run: Run, job: TrainJob, work: Path, monitor: TrainingMonitor) -> processes.ProcessUsage:
    """Run all ranks; restart them with a smaller token budget if one ran out of memory in a pass that needs all."""
    runtime = run.config.runtime
    while True:
        children = _rank_processes(job, work, runtime.train_processes)
        try:
            timeout = runtime.heartbeat_timeout_minutes * 60
            return processes.run(children, runtime.train_processes, monitor, timeout)
        except WorkerError as error:
            if not monitor.restart_budgets:
                raise
            warn(str(error))
            job = job.model_copy(update=dict(token_budget=min(monitor.restart_budgets)))
            monitor.restart_budgets.clear()


def _rank_processes(job: TrainJob, work: Path, world: int) -> list[processes.Child]:
    """Return a child process for each rank. They meet through a new file in the work folder, over loopback."""
    rendezvous = work / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    environment = {"WORLD_SIZE": str(world), "MASTERS_RENDEZVOUS": str(rendezvous)}
    # with spinning barriers one busy neighbor on a core delays every step (measured: 2.5 s instead of 0.08 s)
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // world))
    return [
        processes.Child(f"rank-{rank}", WorkerModule.TRAINING, job, work, environment | {"RANK": str(rank)})
        for rank in range(world)
    ]


def _state_files(run: Run, identity: Identity, part: RoundPart, monitor: TrainingMonitor) -> dict[str, str]:
    """Return SHA-256 by name of the files that the next part of the round starts from; none if no part follows."""
    if not part.end_state or monitor.rolled_back:
        return {}
    names = run.storage.names(part.end_state)
    return {name.removeprefix(f"{identity.folder}/"): run.storage.digest(name) for name in names}


def _write_tables(run: Run, identity: Identity, checkpoints: str, part: RoundPart, steps: int) -> dict[str, str]:
    """Write the tables `history` and `rewards` to the artifact. Returns SHA-256 by file name.

    Raises ArtifactError unless they have the rows of each step exactly once.
    """
    written: dict[str, str] = {}
    check = history.HistoryCheck()
    for table in history.SCHEMAS:
        for number, content in enumerate(history.files(run.storage, checkpoints, table)):
            written |= write_file(run.storage, identity, f"{table}/{number:04d}.parquet", content)
            check.add_file(table, content)
    check.check(steps, rewarded=run.config.train.objective == "masters", before=part.steps_before)
    return written
