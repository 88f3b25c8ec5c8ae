"""The memory estimate of training against the memory that PyTorch uses, and the errors it causes."""

from pathlib import Path

import pytest
import torch

from demo import families
from masters.common import machine
from masters.common.errors import InputError
from masters.config import Runtime, Train
from masters.models.families import family_of
from masters.models.packing.packed_batch import pack, response_states
from masters.models.training import memory_estimate
from masters.models.training.memory_estimate import GIB, NO_PASS, MemoryEstimate, PassSize
from tests.models import tiny_models

STUDENT = Path(__file__).parents[3] / "demo" / "models" / "student"
TEACHER = STUDENT.with_name("teacher")


def measure_activations(model: torch.nn.Module, words: int) -> tuple[int, PassSize]:
    """Return the bytes that a forward pass keeps for its backward pass besides weights, and the size of the pass."""
    questions = [tiny_models.question(model, n, words, tiny_models.random_responses(n, [6] * 4)) for n in range(3)]
    packed = pack(questions, model, family_of(model.config.model_type))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_states(model, packed)
    size = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    ids_BL = packed.inputs["input_ids"]
    return size, PassSize(ids_BL.numel(), int((ids_BL == model.config.image_token_id).sum()))


@pytest.mark.parametrize("name", families.NAMES)
@pytest.mark.parametrize("words", [3, 60])
def test_activations_are_about_those_that_pytorch_keeps(name: str, words: int, tmp_path: Path) -> None:
    model = tiny_models.model(name, seed=0)
    model.save_pretrained(tmp_path)
    size, largest_pass = measure_activations(model, words)
    estimated = memory_estimate.estimate_memory(tmp_path, None, Train(), largest_pass, 1, False)
    vocabulary = model.get_input_embeddings().weight
    head = memory_estimate.HEAD_BUFFERS * 4 * largest_pass.tokens * len(vocabulary) + 4 * vocabulary.numel()
    assert estimated.activations - head == pytest.approx(size, rel=0.25)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_optimizer_are_counted_exactly(dtype: str) -> None:
    from masters.models.model_loading import load_model

    student, teacher = load_model(STUDENT, dtype), load_model(TEACHER, dtype)
    weights = sum(p.nbytes for p in student.parameters())
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    optimizer.step()
    states = sum(s[key].nbytes for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    estimated = memory_estimate.estimate_memory(STUDENT, TEACHER, Train(dtype=dtype, beta=0.1), NO_PASS, 1, False)
    taught = sum(p.nbytes for p in teacher.parameters())
    assert (estimated.weights, estimated.gradients, estimated.optimizer, estimated.teacher) == (
        weights,
        weights,
        states,
        taught,
    )
    assert estimated.reference == weights  # pi_ref, for the exact KL term
    assert estimated.total == weights * 3 + states + taught
    alone = Train(dtype=dtype, kl="squared", beta=0.1)
    shared = memory_estimate.estimate_memory(STUDENT, None, alone, NO_PASS, 2, True)
    assert shared.total == weights * 5 + shared.saving and shared.saving == 5 * weights and shared.teacher == 0


@pytest.mark.parametrize("values", [dict(beta=0.0), dict(kl="k3", beta=0.1), dict(objective="kd", beta=0.1)])
def test_pi_ref_is_counted_only_where_it_is_held(values: dict) -> None:
    estimated = memory_estimate.estimate_memory(STUDENT, TEACHER, Train.model_validate(values), NO_PASS, 1, False)
    assert estimated.reference == 0 and "reference" not in str(estimated)


@pytest.mark.parametrize("way", ["fsdp2"])
def test_ranks_share_pi_ref(way: str) -> None:
    runtime = Runtime.model_validate(dict(sharding=way, train_processes=2))
    held, stored = (
        memory_estimate.estimate_memory(
            STUDENT, TEACHER, Train.model_validate(dict(kl=kl, beta=0.1)), NO_PASS, 2, False, runtime=runtime
        )
        for kl in ("exact", "squared")
    )
    assert held.reference == held.weights
    assert held.exchange > stored.exchange  # it is gathered too, block by block


def estimate(activations: int, saving: int = 0) -> MemoryEstimate:
    return MemoryEstimate(4 * GIB, 4 * GIB, 8 * GIB, 2 * GIB, activations * GIB, 0, saving * GIB)


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    memory_estimate.check_memory(estimate(2), 20 * GIB, 1, "cpu", 500)
    with pytest.raises(InputError, match=r"about 20.00 GiB on cpu, 19.00 GiB are free .*activations 2.00.*500 tokens"):
        memory_estimate.check_memory(estimate(2), 19 * GIB, 1, "cpu", 500)


@pytest.mark.parametrize(
    ("needed", "ranks", "advice"),
    [
        (estimate(3), 1, "lower runtime.token_budget"),
        (estimate(2), 2, "lower runtime.train_processes"),
        (estimate(2, 9), 1, "take a smaller model"),
        (MemoryEstimate(9 * GIB, 9 * GIB, 9 * GIB, 0, 0, 0, 0), 1, "take a smaller model"),
    ],
)
def test_the_advice_would_help(needed: MemoryEstimate, ranks: int, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        memory_estimate.check_memory(needed, 20 * GIB, ranks, "cpu", 500)


def test_the_memory_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = machine.available_memory()
    assert 0 < free < 1 << 50
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.available_memory() == pytest.approx(free, rel=0.2)  # no groups here: the machine's alone
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\n")
    assert machine.available_memory() == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine.available_memory() == 1000 - (700 - 200)
