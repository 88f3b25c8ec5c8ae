"""Does this machine compute the method as written? Fast paths against plain ones on a few rows of real input.

`python -m masters.checks.parity_worker JOB.json`, started by `masters check --parity`. Shapes: T response tokens,
R responses.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoProcessor

from masters.config import Runtime
from masters.execution import processes
from masters.models import model_loading, prompts
from masters.models.families import family_of
from masters.models.generation.engine import Engine, Request
from masters.models.losses import chunked_head, formulas
from masters.models.losses.chunked_head import Projection
from masters.models.packing.packed_batch import pack, response_logits, response_states
from masters.models.packing.prefix_tree import Question

TERMS = 1e-4  # absolute, nats, float32
GRADIENTS = 1e-4  # relative to the largest gradient
LOG_PROBS = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}  # nats, engine against transformers in float32
TOKENS = 8  # greedy tokens compared a row


@dataclass(frozen=True)
class Difference:
    """A measured difference and the largest one that is rounding."""

    name: str
    found: float
    limit: float


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    for difference in measure_differences(job):
        processes.report(job_file, **asdict(difference))


def measure_differences(job: dict) -> list[Difference]:
    """Of a model: the packed batch against separate rows, and the engine against transformers at every ratio."""
    model, rows = job["model"], job["rows"]
    folder = Path(model["folder"])
    images = [bytes.fromhex(row["image"]) for row in rows]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    inputs = [prompts.model_inputs(processor, r["question"], i) for r, i in zip(rows, images, strict=True)]
    answers = [prompts.label_tokens(processor.tokenizer, row["answer"]) for row in rows]
    masked, family = model_loading.load_model(folder, "float32"), _family(folder)
    name = model["name"]
    found = compare_packing(name, masked, family, Question(name, inputs[0], answers))
    requests = [Request(image, row["question"], 1, 0) for row, image in zip(rows, images, strict=True)]
    with Engine(folder, job["dtype"], Runtime(**job["runtime"])) as engine:
        for ratio, thresholds in model["thresholds"].items():
            engine.remask(thresholds)
            said = engine.greedy(requests, TOKENS)
            model_loading.remask(masked, folder, thresholds)
            worst = max(
                compare_log_probs(masked, family, prompt, *reply) for prompt, reply in zip(inputs, said, strict=True)
            )
            what = f"{name}, mask {ratio}: engine against transformers, log-probability of chosen tokens"
            found.append(Difference(what, worst, LOG_PROBS[job["dtype"]]))
    return found


def compare_packing(name: str, model: torch.nn.Module, family, question: Question) -> list[Difference]:
    """The trainer's path, G responses behind one prompt and a chunked head, against G sequences and whole logits."""
    alone = [Question(question.question_id, question.prompt, [r]) for r in question.responses]
    plain_3T, plain = _terms_and_gradients(model, family, alone, _dense_terms)
    packed_3T, packed = _terms_and_gradients(model, family, [question], chunked_head.terms)
    scale = max(g.abs().max().item() for g in plain)
    worst = max((a - b).abs().max().item() for a, b in zip(plain, packed, strict=True))
    what = f"{name}: packed and chunked against separate and dense"
    return [
        Difference(f"{what}, log-probabilities and divergences", (plain_3T - packed_3T).abs().max().item(), TERMS),
        Difference(f"{what}, gradients", worst / scale, GRADIENTS),
    ]


@torch.no_grad()
def compare_log_probs(
    model: torch.nn.Module, family, prompt: dict, tokens: list[int], engine_log_probs: list[float]
) -> float:
    """Largest difference in nats over a response's tokens, both given the engine's own tokens."""
    packed = pack([Question("", prompt, [tokens])], model, family)
    logp_T = formulas.chosen_log_probs(response_logits(model, packed), packed.token_T)
    return (logp_T - torch.tensor(engine_log_probs)).abs().max().item()


def _terms_and_gradients(
    model: torch.nn.Module, family, questions: list[Question], terms_of: Callable[..., formulas.Terms]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log pi, D_t and the exact KL, [3, T], row after row, and the gradients of their sum.

    The parts of teacher and reference are taken by the model's own hidden states, read backwards and moved on by one:
    other distributions.
    """
    model.zero_grad(set_to_none=True)
    found = []
    for question in questions:
        packed = pack([question], model, family)
        states = response_states(model, packed)
        hidden_TH, weight_VH = states.hidden_TH.detach(), states.weight_VH.detach()
        others = Projection(hidden_TH.flip(1), weight_VH), Projection(hidden_TH.roll(1, 1), weight_VH)
        terms = packed.expand(terms_of(states, others[0], packed.token_U, "jsd", others[1]))
        assert terms.kl_T is not None
        values_3T = torch.stack([terms.logp_T, terms.divergence_T, terms.kl_T])
        values_3T.sum().backward()
        found.append(values_3T.detach())
    return torch.cat(found, 1), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _dense_terms(
    student: Projection, teacher: Projection, token_T: torch.Tensor, divergence: str, reference: Projection
) -> formulas.Terms:
    return formulas.terms(student.logits(), teacher.logits(), token_T, divergence, reference.logits())


def _family(folder: Path):
    return family_of(AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type)


if __name__ == "__main__":
    processes.child_main(main)
