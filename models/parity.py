"""Does this machine compute the method as written? Fast paths against plain ones on a few rows of real input.

`python -m masters.models.parity JOB.json`, started by `masters check --parity`. Shapes: T response tokens,
R responses.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoProcessor

from masters import processes
from masters.config import Runtime
from masters.models import checkpoints, losses, prompts
from masters.models.engine import Engine, Request
from masters.models.families import family_of
from masters.models.packing import Question, pack, response_logits

LOGITS = 1e-4  # absolute, float32
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
    for difference in differences(job):
        processes.report(job_file, **asdict(difference))


def differences(job: dict) -> list[Difference]:
    """Of a model: the packed batch against separate rows, and the engine against transformers at every ratio."""
    model, rows = job["model"], job["rows"]
    folder = Path(model["folder"])
    images = [bytes.fromhex(row["image"]) for row in rows]
    processor = AutoProcessor.from_pretrained(folder)
    inputs = [prompts.model_inputs(processor, r["question"], i) for r, i in zip(rows, images, strict=True)]
    answers = [prompts.label_tokens(processor.tokenizer, row["answer"]) for row in rows]
    loaded, family = checkpoints.load_model(folder, "float32"), _family(folder)
    name = model["name"]
    found = packed_against_separate(name, loaded, family, Question(name, inputs[0], answers))
    del loaded
    requests = [Request(image, row["question"], 1, 0) for row, image in zip(rows, images, strict=True)]
    with Engine(folder, job["dtype"], Runtime(**job["runtime"])) as engine:
        for ratio, thresholds in model["thresholds"].items():
            engine.remask(thresholds)
            said = engine.greedy(requests, TOKENS)
            masked = checkpoints.load_masked(folder, thresholds, "float32")
            worst = max(
                log_prob_difference(masked, family, prompt, *reply) for prompt, reply in zip(inputs, said, strict=True)
            )
            what = f"{name}, mask {ratio}: engine against transformers, log-probability of chosen tokens"
            found.append(Difference(what, worst, LOG_PROBS[job["dtype"]]))
    return found


def packed_against_separate(name: str, model: torch.nn.Module, family, question: Question) -> list[Difference]:
    """Logits and gradients of G responses behind one prompt against G separate sequences."""
    alone = [Question(question.question_id, question.prompt, [r]) for r in question.responses]
    plain_TV, plain = _logits_and_gradients(model, family, alone)
    packed_TV, packed = _logits_and_gradients(model, family, [question])
    scale = max(g.abs().max().item() for g in plain)
    worst = max((a - b).abs().max().item() for a, b in zip(plain, packed, strict=True))
    return [
        Difference(f"{name}: packed against separate, logits", (plain_TV - packed_TV).abs().max().item(), LOGITS),
        Difference(f"{name}: packed against separate, gradients", worst / scale, GRADIENTS),
    ]


@torch.no_grad()
def log_prob_difference(
    model: torch.nn.Module, family, prompt: dict, tokens: list[int], engine_log_probs: list[float]
) -> float:
    """Largest difference in nats over a response's tokens, both given the engine's own tokens."""
    packed = pack([Question("", prompt, [tokens])], model, family)
    logp_T = losses.chosen_log_probs(response_logits(model, packed), packed.token_T)
    return (logp_T - torch.tensor(engine_log_probs)).abs().max().item()


def _logits_and_gradients(
    model: torch.nn.Module, family, questions: list[Question]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [T, V], row after row, and the gradients of their chosen tokens' summed log-probability."""
    model.zero_grad(set_to_none=True)
    every_TV = []
    for question in questions:
        packed = pack([question], model, family)
        logits_TV = response_logits(model, packed)
        losses.chosen_log_probs(logits_TV, packed.token_T).sum().backward()
        every_TV.append(logits_TV.detach())
    return torch.cat(every_TV), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _family(folder: Path):
    return family_of(AutoConfig.from_pretrained(folder).model_type)


if __name__ == "__main__":
    processes.child_main(main)
