"""Parity of one model on this machine: fast code against plain code, and vLLM against transformers.

`python -m masters.checks.parity_worker JOB.json`, started by `masters check --parity`; the job is a `ParityJob`.

Shape suffixes: T response tokens, U distinct response tokens, H hidden size, 3 the terms log pi, divergence and KL.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoProcessor

from masters.checks.parity_job import MAX_TOKENS, Difference, ParityJob
from masters.execution import child_process
from masters.models import model_loading, prompts
from masters.models.families import family_of
from masters.models.generation.engine import Engine, Request
from masters.models.losses import chunked_head, formulas
from masters.models.losses.chunked_head import Projection
from masters.models.packing.packed_batch import pack, response_logits, response_states
from masters.models.packing.prefix_tree import Question

TERM_LIMIT = 1e-4  # absolute, in nats, computed in float32
GRADIENT_LIMIT = 1e-4  # relative to the largest gradient
# In nats, between the engine's log-probabilities and those of transformers in float32.
LOG_PROB_LIMITS = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}


def main(job_file: Path) -> None:
    job = ParityJob.model_validate_json(job_file.read_text())
    for difference in measure_differences(job):
        child_process.report_event(job_file, difference)


def measure_differences(job: ParityJob) -> list[Difference]:
    """Compare packed with separate sequences, and the engine with transformers at every mask ratio, in any order."""
    processor = AutoProcessor.from_pretrained(job.folder, trust_remote_code=False)
    vocabulary = prompts.vocabulary_size(processor.tokenizer)
    inputs = [prompts.model_inputs(processor, q.question, q.image) for q in job.questions]
    labels = [prompts.tokenize_label(processor.tokenizer, q.answer) for q in job.questions]
    requests = [Request(q.image, q.question, 1, 0) for q in job.questions]
    model, family = model_loading.load_model(job.folder, "float32"), _find_family(job.folder)
    differences = compare_packing(job.name, model, family, Question(job.name, inputs[0], labels), vocabulary)
    unmasked = {name: 0.0 for thresholds in job.thresholds.values() for name in thresholds}
    with Engine(job.folder, job.dtype, job.runtime) as engine:
        for ratio, thresholds in job.thresholds.items():
            engine.remask(thresholds)
            # the model is masked in place: a tensor without a threshold here may be masked from another ratio
            model_loading.remask(model, job.folder, unmasked | thresholds)
            replies = engine.decode_greedily(requests, MAX_TOKENS)
            largest = max(
                compare_log_probs(model, family, prompt, *reply, vocabulary)
                for prompt, reply in zip(inputs, replies, strict=True)
            )
            name = f"{job.name}, mask ratio {ratio}: engine against transformers, log-probability of chosen tokens"
            differences.append(Difference(name=name, found=largest, limit=LOG_PROB_LIMITS[job.dtype]))
    return differences


def compare_packing(
    name: str, model: torch.nn.Module, family, question: Question, vocabulary: int | None = None
) -> list[Difference]:
    """Compare the trainer's code with plain code, for the responses to one question.

    The trainer packs G responses behind one prompt and uses the chunked head; the plain code computes G sequences and
    full logits.
    """
    separate = [Question(question.question_id, question.prompt, [response]) for response in question.responses]
    plain_3T, plain_gradients = _terms_and_gradients(model, family, separate, vocabulary, _dense_terms)
    packed_3T, packed_gradients = _terms_and_gradients(model, family, [question], vocabulary, chunked_head.token_terms)
    scale = max(gradient.abs().max().item() for gradient in plain_gradients)
    gradient_difference = max(
        (plain - packed).abs().max().item() for plain, packed in zip(plain_gradients, packed_gradients, strict=True)
    )
    term_difference = (plain_3T - packed_3T).abs().max().item()
    prefix = f"{name}: packed and chunked against separate and dense"
    return [
        Difference(name=f"{prefix}, log-probabilities and divergences", found=term_difference, limit=TERM_LIMIT),
        Difference(name=f"{prefix}, gradients", found=gradient_difference / scale, limit=GRADIENT_LIMIT),
    ]


@torch.no_grad()
def compare_log_probs(
    model: torch.nn.Module,
    family,
    prompt: dict,
    tokens: list[int],
    engine_log_probs: list[float],
    vocabulary: int | None = None,
) -> float:
    """Return the largest difference in nats between engine and model over the engine's tokens."""
    packed = pack([Question("", prompt, [tokens])], model, family)
    logp_T = formulas.chosen_log_probs(response_logits(model, packed, vocabulary), packed.token_T)
    return (logp_T - torch.tensor(engine_log_probs)).abs().max().item()


def _terms_and_gradients(
    model: torch.nn.Module,
    family,
    questions: list[Question],
    vocabulary: int | None,
    compute_terms: Callable[..., formulas.Terms],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return log pi, D_t and the exact KL of all responses, [3, T], and the gradients of their sum.

    The model's own hidden states, reversed and shifted, stand for teacher and reference: they give other distributions.
    """
    model.zero_grad(set_to_none=True)
    values = []
    for question in questions:
        packed = pack([question], model, family)
        states = response_states(model, packed, vocabulary)
        frozen = states.detach()
        teacher = replace(frozen, hidden_TH=frozen.hidden_TH.flip(1))
        reference = replace(frozen, hidden_TH=frozen.hidden_TH.roll(1, 1))
        terms = packed.expand(compute_terms(states, teacher, packed.token_U, "jsd", reference))
        assert terms.kl_T is not None
        values_3T = torch.stack([terms.logp_T, terms.divergence_T, terms.kl_T])
        values_3T.sum().backward()
        values.append(values_3T.detach())
    return torch.cat(values, 1), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _dense_terms(
    student: Projection, teacher: Projection, token_T: torch.Tensor, divergence: str, reference: Projection
) -> formulas.Terms:
    return formulas.token_terms(student.logits(), teacher.logits(), token_T, divergence, reference.logits())


def _find_family(folder: Path):
    return family_of(AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type)


if __name__ == "__main__":
    child_process.child_main(main)
