"""What training needs in memory, estimated ahead: against what PyTorch keeps, and what is refused."""

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
from masters.models.training.memory_estimate import GIB, Footprint
from tests.models import tiny_models

STUDENT = Path(__file__).parents[3] / "demo" / "models" / "student"
TEACHER = STUDENT.with_name("teacher")


def kept(model: torch.nn.Module, words: int) -> tuple[int, tuple[int, int]]:
    """Bytes that a forward pass keeps for its backward pass, weights aside; its text and image tokens."""
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
    return size, (ids_BL.numel(), int((ids_BL == model.config.image_token_id).sum()))


@pytest.mark.parametrize("name", families.NAMES)
@pytest.mark.parametrize("words", [3, 60])
def test_activations_are_about_what_pytorch_keeps(name: str, words: int, tmp_path: Path) -> None:
    model = tiny_models.model(name, seed=0)
    model.save_pretrained(tmp_path)
    size, tokens = kept(model, words)
    made = memory_estimate.footprint(tmp_path, None, Train(), tokens, 1, False)
    vocabulary = model.get_input_embeddings().weight
    head = memory_estimate.CHUNKS * 4 * tokens[0] * len(vocabulary) + 4 * vocabulary.numel()
    assert made.activations - head == pytest.approx(size, rel=0.25)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_what_goes_with_them_are_counted_exactly(dtype: str) -> None:
    from masters.models.model_loading import load_model

    student, teacher = load_model(STUDENT, dtype), load_model(TEACHER, dtype)
    weights = sum(p.nbytes for p in student.parameters())
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    optimizer.step()
    states = sum(s[key].nbytes for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    made = memory_estimate.footprint(STUDENT, TEACHER, Train(dtype=dtype), (0, 0), 1, False)
    taught = sum(p.nbytes for p in teacher.parameters())
    assert (made.weights, made.gradients, made.optimizer, made.teacher) == (weights, weights, states, taught)
    assert made.reference == weights  # pi_ref, for the exact KL term
    assert made.total == weights * 3 + states + taught
    alone = Train(dtype=dtype, kl="squared")
    shared = memory_estimate.footprint(STUDENT, None, alone, (0, 0), 2, True)
    assert shared.total == weights * 5 + shared.saving and shared.saving == 5 * weights and shared.teacher == 0


@pytest.mark.parametrize("values", [dict(beta=0.0), dict(kl="k3"), dict(objective="kd")])
def test_pi_ref_is_counted_only_where_it_is_held(values: dict) -> None:
    made = memory_estimate.footprint(STUDENT, TEACHER, Train.model_validate(values), (0, 0), 1, False)
    assert made.reference == 0 and "reference" not in str(made)


@pytest.mark.parametrize("way", ["fsdp2"])
def test_ranks_share_pi_ref(way: str) -> None:
    runtime = Runtime.model_validate(dict(sharding=way, train_processes=2))
    held, stored = (
        memory_estimate.footprint(
            STUDENT, TEACHER, Train.model_validate(dict(kl=kl)), (0, 0), 2, False, runtime=runtime
        )
        for kl in ("exact", "squared")
    )
    assert held.reference == held.weights
    assert held.exchange > stored.exchange  # it is gathered too, block by block


def of(activations: int, saving: int = 0) -> Footprint:
    return Footprint(4 * GIB, 4 * GIB, 8 * GIB, 2 * GIB, activations * GIB, 0, saving * GIB)


def test_what_fits_is_let_through_and_what_does_not_is_told_with_its_numbers() -> None:
    memory_estimate.check(of(2), 20 * GIB, 1, "cpu", 500)
    with pytest.raises(InputError, match=r"about 20.00 GiB on cpu, 19.00 GiB are free .*activations 2.00.*500 tokens"):
        memory_estimate.check(of(2), 19 * GIB, 1, "cpu", 500)


@pytest.mark.parametrize(
    ("needed", "ranks", "advice"),
    [
        (of(3), 1, "lower runtime.token_budget"),
        (of(2), 2, "lower runtime.train_processes"),
        (of(2, 9), 1, "take a smaller model"),
        (Footprint(9 * GIB, 9 * GIB, 9 * GIB, 0, 0, 0, 0), 1, "take a smaller model"),
    ],
)
def test_the_advice_is_what_helps(needed: Footprint, ranks: int, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        memory_estimate.check(needed, 20 * GIB, ranks, "cpu", 500)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = machine.available()
    assert 0 < free < 1 << 50
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.available() == pytest.approx(free, rel=0.2)  # no groups here: the machine's alone
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\n")
    assert machine.available() == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine.available() == 1000 - (700 - 200)
