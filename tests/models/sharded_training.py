"""Training that one process and several, in either way of holding weights, must do alike. As a module it is a rank.

`python -m tests.models.sharded_training FOLDER WAY RANK WORLD` meets the others through a file in the folder, does all
of `found_by` with weights sharded in that way and writes it to FOLDER/found-WORLD-RANK.pt.
"""

import copy
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from demo import families
from masters.common.errors import MastersError
from masters.config import Train
from masters.models import model_loading
from masters.models.distributed import Sharding, make_sharding, to_local
from masters.models.distributed.activation_checkpointing import checkpoint_activations
from masters.models.distributed.collectives import gather_to_rank0
from masters.models.masking import is_masked, magnitude_thresholds
from masters.models.packing.packed_batch import pack, response_logits
from masters.models.packing.prefix_tree import Question, TokenCounts
from masters.models.training import trainer
from masters.models.training.groups import Step
from masters.models.training.history import HistoryWriter
from masters.models.training.job import StepFinished, TrainEvent
from masters.store.storage import Storage
from tests.models import tiny_models
from tests.models.paper import paper_train
from tests.models.tiny_contexts import make_context, references

FAMILY = "qwen3_vl"
BUDGET = 40  # tokens: several passes a step, of another number on each rank
CUT = 4  # steps until the checkpoint that others go on from
SPOILT = 6  # the question whose image becomes infinite
# one of them is of a single question: a second rank has none
STEPS = [Step(n // 3, 0, of) for n, of in enumerate([(0, 1, 2, 3), tuple(range(8)), (0, 4), (6,), (1, 3, 5), (2, 7)])]
RATIOS = [0.4, 0.2]
CASES = {
    "tied": (FAMILY, True, dict(kl="squared")),  # with a reference pass ahead; the next one holds pi_ref instead
    "untied": (FAMILY, False, dict(schedule="cosine", warmup_steps=2, max_gradient_norm=0.05)),
    "kd": ("qwen2_5_vl", True, dict(objective="kd")),
    "sft": ("internvl3", True, dict(objective="sft", targets="labels")),
}
MATRICES, SIDE = 4, 256
Tensors = dict[str, torch.Tensor]


class Trained:
    """Trainings by one world: `rank` of `world` processes, which shard weights in one way."""

    def __init__(self, folder: Path, way: str, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.way, self.sharded = way, partial(make_sharding, way, "cpu")

    def student(self, case: str) -> torch.nn.Module:
        family, tied, _ = CASES[case]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return families.build(family, tied)[1]

    def context(self, case: str, store: str = "", **train: Any) -> trainer.TrainContext:
        """Return a context of six steps with a store of its own; the teacher is masked again at each stage."""
        family, _, values = CASES[case]
        base, sharding = make_context(family), self.sharded()
        config = Train.model_validate(dict(learning_rate=1e-4) | values | train)
        teacher = sharding.shard_model(copy.deepcopy(base.teacher)) if config.objective != "sft" else None
        reference = sharding.shard_model(copy.deepcopy(base.reference)) if config.holds_reference else None
        *groups, last = base.groups
        image_word = [base.student.config.image_token_id, *last.responses[0][1:]]  # that one rank alone looks up
        groups.append(replace(last, responses=[image_word, *last.responses[1:]]))
        events: list[TrainEvent] = []
        made = replace(
            base,
            student=sharding.shard_model(self.student(case), config),
            teacher=teacher,
            reference=reference,
            groups=groups,
            steps=STEPS,
            ratios=RATIOS,
            train=config,
            token_budget=BUDGET,
            storage=Storage(str(self.folder / store)),
            checkpoints=case,
            checkpoint_steps=CUT,
            probe=[],
            report=events.append,
            rank=self.rank,
            world=self.world,
            sharding=sharding,
            remask=lambda stage: remask(self.folder, teacher, stage, sharding) if family == FAMILY else None,
            history=HistoryWriter(),
            token_counts=TokenCounts(),
        )
        made.events = events  # type: ignore[attr-defined]
        return made

    def weights(self, context: trainer.TrainContext) -> Tensors:
        held = context.sharding.local_parameters(context.student)
        return {k: v.clone() for k, v in gather_to_rank0(context.sharding, held, held).items()}

    def gradients(self, case: str, context: trainer.TrainContext | None = None) -> list[dict]:
        """Return for each step the sums, this rank's passes, and the gradients that the optimizer would get."""
        context = context or self.context(case)
        known = references(replace(make_context(CASES[case][0]), student=self.student(case), train=context.train))
        found, held, stage = [], context.sharding.local_parameters(context.student), None
        for step in STEPS:
            if step.stage != stage and context.teacher is not None:
                context.remask(stage := step.stage)
            before = context.token_counts.passes
            sums = trainer.run_step(context, step, known)
            grads = gather_to_rank0(
                context.sharding, {name: p.grad for name, p in held.items() if p.grad is not None}, held
            )
            found.append(dict(sums=sums, passes=context.token_counts.passes - before, gradients=grads))
            for p in held.values():
                p.grad = None
        return found

    def run(self, case: str, store: str, **train: Any) -> dict:
        """Run the whole training, from the checkpoint of that store if there is one."""
        context = self.context(case, store, **train)
        context.probe = probe_of(context, self.student(case))
        before = self.weights(context)
        trainer.fit(context)
        events = context.events  # type: ignore[attr-defined]
        means = [event.means for event in events if isinstance(event, StepFinished)]
        losses = [step["loss"] for step in means]
        norms = [step["gradient_norm"] for step in means if "gradient_norm" in step]
        # ranks share the reference passes, and each is reported by the rank that did it
        kinds = [event.event for event in events if event.event != "reference"]
        return dict(before=before, after=self.weights(context), losses=losses, norms=norms, events=kinds)

    def remasked(self) -> list[Tensors]:
        """Return the teacher at each stage, after a pass at the one before."""
        context, found = self.context("tied"), []
        known = references(replace(make_context(FAMILY), student=self.student("tied"), train=context.train))
        for stage in range(len(RATIOS)):
            context.remask(stage)
            held = context.sharding.local_parameters(context.teacher)
            found.append({k: v.clone() for k, v in gather_to_rank0(context.sharding, held, held).items()})
            trainer.run_step(context, STEPS[0], known)
        return found

    def spoilt(self) -> str:
        """Return the error of a run with a question that has an infinite loss."""
        context = self.context("tied", "spoilt", beta=0.0)
        question = context.question

        def spoil(group):
            made = question(group)
            pixels = made.prompt["pixel_values"].clone()
            pixels[0, 0] = float("inf")
            return replace(made, prompt=made.prompt | {"pixel_values": pixels}) if group.ref.row == SPOILT else made

        context.question = spoil
        return said(lambda: trainer.fit(context))

    def without_memory(self) -> tuple[str, list[TrainEvent]]:
        """Return error and events of a run whose first pass finds no memory."""
        context = self.context("tied", "memory", beta=0.0)

        def fail(*_: object) -> None:
            raise torch.OutOfMemoryError

        context.student.model.language_model.register_forward_hook(fail)
        return said(lambda: trainer.fit(context)), context.events  # type: ignore[attr-defined]


def probe_of(context: trainer.TrainContext, student: torch.nn.Module) -> list[Question]:
    """Return questions that the untrained student has right: their labels are its own greedy answers."""
    made = []
    for group in context.groups[:4]:
        question = replace(context.question(group), responses=[[20]])
        with torch.no_grad():
            first = response_logits(student, pack([question], student, context.family))[0]
        made.append(replace(question, responses=[[int(first.argmax())]]))
    return made


def said(work: Callable[[], object]) -> str:
    try:
        work()
    except MastersError as error:
        return str(error)
    return ""


def teacher_folder(folder: Path) -> Path:
    return folder / "teacher"


def prepare(folder: Path) -> None:
    """Write the checkpoint that all worlds read: a random teacher's weights."""
    tiny_models.model(FAMILY, seed=1).save_pretrained(teacher_folder(folder))


def remask(folder: Path, teacher: Any, stage: int, sharding: Sharding) -> None:
    tensors = model_loading.iterate_tensors(teacher_folder(folder))
    masked = {name: tensor for name, tensor in tensors if is_masked(name, tensor.ndim)}
    limits = {name: magnitude_thresholds(tensor, [RATIOS[stage]])[0] for name, tensor in masked.items()}
    model_loading.remask(teacher, teacher_folder(folder), limits, sharding)


def gradients_times(world: Trained, factor: float) -> Any:
    """A world whose gradients come out as their sum over the ranks times a factor."""
    divide = FSDPModule.set_gradient_divide_factor
    return patch.object(FSDPModule, "set_gradient_divide_factor", lambda module, _: divide(module, 1 / factor))


def unproven(world: Trained) -> list[dict]:
    """Gradients where a mean is taken, as a backend may, and nobody looks."""
    with patch(f"masters.models.distributed.{world.way}.check_gradient_sum"), gradients_times(world, 1 / world.world):
        return world.gradients("tied")


def refused(world: Trained, factor: float) -> str:
    with gradients_times(world, factor):
        return said(lambda: world.sharded())


def kept(world: Trained) -> int:
    """Bytes of the tensors that a model of `MATRICES` brings by its first gradients: its shares, these, what else the
    way holds."""
    before, sharding = alive(), world.sharded()
    layers = [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(MATRICES)]
    model = sharding.shard_model(torch.nn.Sequential(*layers), paper_train())
    states = torch.randn(2, SIDE)
    sharding.run_with_full_weights(
        model, lambda itself: reduce(lambda x, layer: layer(x), itself, states)
    ).square().mean().backward()
    sharding.sum_gradients(model)
    held = sharding.local_parameters(model)  # and what is gathered is released
    return alive() - before - states.nbytes if len(held) == MATRICES else 0


def alive() -> int:
    """Return the bytes of all tensors of this process."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    gradients = [item.grad for item in tensors if item.is_leaf and item.grad is not None]
    storages = [to_local(item).untyped_storage() for item in tensors + gradients]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def found_by(world: Trained) -> dict:
    """All that sharded ranks find; FOLDER/one is the store of a run of one process that was not sharded."""
    if world.world == 1:
        return dict(gradients={"tied": world.gradients("tied")})
    again = world.context("tied")
    checkpoint_activations(again.student)
    return dict(
        kept=kept(world),  # first: nothing else comes and goes then
        gradients={case: world.gradients(case) for case in CASES},
        again=world.gradients("tied", again),
        bfloat16=world.gradients("tied", world.context("tied", compute_dtype="bfloat16")),
        runs={case: world.run(case, "two") for case in ("tied", "untied")},
        resumed=world.run("tied", "from-one"),
        fallen=world.run("tied", "fallen", learning_rate=0.1, max_validation_drop=0.2, on_drop="rollback"),
        remasked=world.remasked(),
        spoilt=world.spoilt(),
        unproven=unproven(world),
        refused=[refused(world, factor) for factor in (1 / world.world, world.world, 1)],
        memory=world.without_memory(),  # last: what is left of the way after it is of no use
    )


def main(folder: Path, way: str, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{world}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    found = found_by(Trained(folder, way, rank, world))
    torch.save(found, folder / f"found-{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
