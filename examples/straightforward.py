"""The whole method in one file of plain PyTorch, without Masters. Read it from top to bottom as documentation.

The method (arXiv 2512.22238): mask a large teacher at several ratios, let the masked teachers and the student answer
each question, and train the student stage by stage with distillation and offline GRPO.

The script imports nothing of this project and is not optimized: it saves one masked checkpoint for each ratio, starts
one engine for each checkpoint, trains on one sequence for each response (with its own copy of prompt and image), and
computes full logits. `python -m benchmarks end-to-end` uses it as the baseline. On the same responses it computes the
same rewards, advantages and losses as `masters.models.training` (tests/examples/test_straightforward.py). Models are
Qwen3-VL; verdicts come from string comparison.

    python -m examples.straightforward JOB.json      # JSON with the fields of `Settings`

Shapes: N sequences of a batch, L their padded length, R tokens of the longest response, V vocabulary, G responses to
one question. A name's suffix is its shape: `logits_NRV`.
"""

import json
import math
import multiprocessing
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor

Response = tuple[list[int], str, bool]  # token ids, text, whether it was cut at the length limit
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Settings:
    """Settings of the run."""

    questions: str  # JSONL file with the columns image (path relative to the file), question, answer
    teacher: str  # model folders
    student: str
    out: str  # new folder
    ratios: list[float]  # mask ratio of each mask stage, from r_max down to 0
    samples: int  # responses to a question from the teacher, and as many from the student
    sampling: dict  # vLLM's temperature, top_p, top_k, repetition_penalty, max_tokens
    max_model_len: int
    learning_rate: float
    beta: float
    epochs: int
    questions_per_step: int
    seed: int


@dataclass(frozen=True)
class Question:
    """A row of the JSONL file."""

    image: Path
    question: str
    answer: str


@dataclass(frozen=True)
class Group:
    """A question, the token ids of its responses, their verdicts R_acc, and which of them were cut off."""

    question: Question
    responses: list[list[int]]
    scores: list[float]
    is_truncated: list[bool]


def main(settings: Settings) -> dict:
    """Distill the student. Returns the seconds that each part took and the loss of every step."""
    out, start = Path(settings.out), time.monotonic()
    questions = read_questions(Path(settings.questions))
    stages = mask_stages(questions, len(settings.ratios), settings.seed)
    teachers = [masked_checkpoint(settings.teacher, ratio, out / f"teacher-{ratio}") for ratio in settings.ratios]
    masking_end = time.monotonic()
    groups = generate(teachers, stages, settings)
    generation_end = time.monotonic()
    student, losses = train(teachers, groups, settings)
    student.save_pretrained(out / "student")
    AutoProcessor.from_pretrained(settings.student).save_pretrained(out / "student")
    seconds = dict(
        mask=masking_end - start,
        generate=generation_end - masking_end,
        train=time.monotonic() - generation_end,
    )
    return dict(seconds=seconds, questions=len(questions), losses=losses)


def read_questions(file: Path) -> list[Question]:
    """Read the JSONL file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [Question(file.parent / row["image"], row["question"], row["answer"]) for row in rows]


def mask_stages(questions: list[Question], count: int, seed: int) -> list[list[Question]]:
    """Assign an equal share of the questions to each mask stage (Eq. 3): training goes from ratio r_max down to 0."""
    shuffled = random.Random(seed).sample(questions, len(questions))
    return [shuffled[len(shuffled) * k // count : len(shuffled) * (k + 1) // count] for k in range(count)]


# 1. Masked teachers


@torch.no_grad()
def masked_checkpoint(folder: str, ratio: float, out: Path) -> str:
    """Save the teacher with its smallest weights set to zero (Eq. 1-2).

    A weight is kept if |w| >= the magnitude at rank floor(r N) of its matrix, with N weights in the matrix.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d) and name != "lm_head" and ratio:
            magnitude = module.weight.abs()
            rank = math.floor(Fraction(str(ratio)) * magnitude.numel())
            threshold = magnitude.flatten().float().kthvalue(rank + 1).values
            module.weight[magnitude < threshold] = 0
    model.save_pretrained(out)
    AutoProcessor.from_pretrained(folder).save_pretrained(out)
    return str(out)


# 2. Responses, generated before training


def generate(teachers: list[str], stages: list[list[Question]], settings: Settings) -> list[list[Group]]:
    """Make the groups of every mask stage: the masked teacher of the stage and the student answer its questions."""
    all_questions = [question for stage in stages for question in stage]
    student_responses = iter(generate_responses(settings.student, all_questions, settings))
    groups = []
    for teacher, stage in zip(teachers, stages, strict=True):
        teacher_responses = generate_responses(teacher, stage, settings)
        groups.append(
            [
                make_group(question, responses + next(student_responses))
                for question, responses in zip(stage, teacher_responses, strict=True)
            ]
        )
    return groups


def make_group(question: Question, responses: list[Response]) -> Group:
    """Give every response a verdict: 1 if its text is the answer. Empty responses are left out."""
    responses = [response for response in responses if response[0]]
    scores = [float(normalize(text) == normalize(question.answer)) for _, text, _ in responses]
    return Group(question, [tokens for tokens, _, _ in responses], scores, [is_cut for _, _, is_cut in responses])


def normalize(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,!?;:\"'")


def generate_responses(folder: str, questions: list[Question], settings: Settings) -> list[list[Response]]:
    """Run vLLM in a child process, whose end frees the memory. Returns the responses to each question."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run_engine, folder, questions, settings).result()


def run_engine(folder: str, questions: list[Question], settings: Settings) -> list[list[Response]]:
    """Sample responses to each question with vLLM, in this process."""
    # the fastest start of vLLM on a CPU
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    one_image, eager = {"image": 1, "video": 0}, DEVICE == "cpu"
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=eager,
        max_model_len=settings.max_model_len,
        limit_mm_per_prompt=one_image,
        seed=settings.seed,
    )
    processor = AutoProcessor.from_pretrained(folder)
    prompts: Any = [
        {"prompt": chat_prompt(processor, q.question), "multi_modal_data": {"image": open_image(q)}} for q in questions
    ]
    outputs = llm.generate(prompts, SamplingParams(n=settings.samples, **settings.sampling), use_tqdm=False)
    return [
        [(list(sample.token_ids), sample.text, sample.finish_reason == "length") for sample in output.outputs]
        for output in outputs
    ]


def chat_prompt(processor, question: str) -> str:
    """Return the prompt text: one user turn with the image and the question."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)


def open_image(question: Question) -> Image.Image:
    return Image.open(question.image).convert("RGB")


# 3. Training


@dataclass(frozen=True)
class Batch:
    """One sequence for each response: prompt with image, then the response, padded on the right."""

    inputs: dict[str, torch.Tensor]  # keyword arguments of the model
    prompt_length_N: torch.Tensor
    token_NR: torch.Tensor  # response tokens, padded
    mask_NR: torch.Tensor  # 1 for a token, 0 for padding


@dataclass(frozen=True)
class Outcome:
    """Loss of a step, with the reward R and the advantage A of each response."""

    loss: torch.Tensor
    reward_N: torch.Tensor
    advantage_N: torch.Tensor


def train(teachers: list[str], stages: list[list[Group]], settings: Settings) -> tuple[Any, list[float]]:
    """Train mask stage by mask stage, each with its masked teacher. Returns the student and the loss of every step."""
    processor, student = AutoProcessor.from_pretrained(settings.student), load(settings.student)
    reference = load(settings.student)  # pi_ref
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    rng, losses = random.Random(settings.seed), []
    for folder, groups in zip(teachers, stages, strict=True):
        teacher = load(folder)
        for _ in range(settings.epochs):
            shuffled = rng.sample(groups, len(groups))
            for begin in range(0, len(shuffled), settings.questions_per_step):
                step_groups = shuffled[begin : begin + settings.questions_per_step]
                outcome = step_outcome(student, teacher, reference, processor, step_groups, settings.beta)
                outcome.loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(outcome.loss.item())
    return student, losses


def load(folder: str) -> Any:
    """Load a model, without dropout."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.to(DEVICE).eval()


def collate(processor, groups: list[Group]) -> Batch:
    """Make the batch of all responses to the questions of a step."""
    sequences, prompts = [], []  # one each for every response
    for group in groups:
        text, image = chat_prompt(processor, group.question.question), open_image(group.question)
        prompt = processor(text=[text], images=[image], return_tensors="pt")
        for response in group.responses:
            sequences.append(torch.cat([prompt["input_ids"][0], torch.tensor(response)]))
            prompts.append(prompt)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    input_ids = pad_sequence(sequences, batch_first=True)
    inputs = dict(
        input_ids=input_ids,
        attention_mask=(torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        mm_token_type_ids=(input_ids == processor.image_token_id).int(),
        pixel_values=torch.cat([prompt["pixel_values"] for prompt in prompts]),
        image_grid_thw=torch.cat([prompt["image_grid_thw"] for prompt in prompts]),
    )
    prompt_length_N = torch.tensor([prompt["input_ids"].shape[1] for prompt in prompts])
    responses = [torch.tensor(response) for group in groups for response in group.responses]
    token_NR = pad_sequence(responses, batch_first=True)
    mask_NR = pad_sequence([torch.ones(len(response)) for response in responses], batch_first=True)
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    return Batch(inputs, prompt_length_N.to(DEVICE), token_NR.to(DEVICE), mask_NR.to(DEVICE))


def response_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits that predict each response token, [N, R, V]: those at the position before it."""
    logits_NLV = model(**batch.inputs, use_cache=False).logits
    position_NR = batch.prompt_length_N[:, None] - 1 + torch.arange(batch.token_NR.shape[1], device=DEVICE)
    position_NR = position_NR.clamp(max=logits_NLV.shape[1] - 1)  # padding
    return logits_NLV.gather(1, position_NR[..., None].expand(-1, -1, logits_NLV.shape[2]))


def log_probs(logits_NRV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return log pi of the response tokens, [N, R]."""
    from trl.trainer.utils import selective_log_softmax  # not at the top, because the engine processes need no TRL

    return selective_log_softmax(logits_NRV, batch.token_NR)


def divergences(student_NRV: torch.Tensor, teacher_NRV: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence of student and teacher at each token, [N, R] (Eq. 4-5)."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(student_NRV, teacher_NRV, beta=0.5, reduction="none").sum(-1)


def kl_to_reference(student_NRV: torch.Tensor, reference_NRV: torch.Tensor) -> torch.Tensor:
    """Return D_KL(pi || pi_ref) at each token, summed over the vocabulary, [N, R] (Eq. 8-11)."""
    logp_NRV, reference_logp_NRV = student_NRV.log_softmax(-1), reference_NRV.log_softmax(-1)
    return (logp_NRV.exp() * (logp_NRV - reference_logp_NRV)).sum(-1)


def step_outcome(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    reference: torch.nn.Module,
    processor,
    groups: list[Group],
    beta: float,
) -> Outcome:
    """Compute the loss L_GRPO + D of a step (Eq. 4-11).

    It is a mean over the step's questions, of means over a question's responses, of means over a response's tokens.
    A truncated response counts in the rewards of its group, but its terms are 0 (DAPO, arXiv 2503.14476).
    """
    batch = collate(processor, groups)
    student_NRV = response_logits(student, batch)
    with torch.no_grad():
        teacher_NRV, reference_NRV = response_logits(teacher, batch), response_logits(reference, batch)
    divergence_N = token_means(divergences(student_NRV, teacher_NRV), batch)
    sizes = [len(group.responses) for group in groups]
    divergence_by_group = divergence_N.detach().cpu().split(sizes)
    reward_N = torch.cat([rewards(d_G, group) for d_G, group in zip(divergence_by_group, groups, strict=True)])
    advantage_N = torch.cat([advantages(reward_G) for reward_G in reward_N.split(sizes)])
    logp_NR = log_probs(student_NRV, batch)
    kl_NR = kl_to_reference(student_NRV, reference_NRV)
    ratio_NR = (logp_NR - logp_NR.detach()).exp()  # pi / pi_old: equal to 1, with the gradient of log pi
    grpo_N = -token_means(ratio_NR * advantage_N.to(DEVICE)[:, None] - beta * kl_NR, batch)
    is_trained_N = ~torch.tensor([is_cut for group in groups for is_cut in group.is_truncated], device=DEVICE)
    loss_N = (grpo_N + divergence_N) * is_trained_N
    loss = torch.stack([loss_G.mean() for loss_G in loss_N.split(sizes)]).mean()
    return Outcome(loss, reward_N, advantage_N)


def token_means(value_NR: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the mean over the tokens of each response, [N]."""
    return (value_NR * batch.mask_NR).sum(1) / batch.mask_NR.sum(1)


def rewards(divergence_G: torch.Tensor, group: Group) -> torch.Tensor:
    """Return R = R_acc + (D_max - D) / (D_max - D_min), [G] (Eq. 6-7). Identical responses share their mean D."""
    same_GG = torch.tensor([[float(a == b) for b in group.responses] for a in group.responses])
    shared_G = same_GG @ divergence_G / same_GG.sum(1)
    spread = shared_G.max() - shared_G.min()
    distill_G = (shared_G.max() - shared_G) / spread if spread > 1e-5 else torch.zeros_like(shared_G)
    return torch.tensor(group.scores) + distill_G


def advantages(reward_G: torch.Tensor) -> torch.Tensor:
    """Return A = (R - mean) / standard deviation over a question's responses (Eq. 8); 0 if all rewards are equal."""
    deviation = reward_G.std(correction=0)
    return (reward_G - reward_G.mean()) / deviation if deviation > 1e-4 else torch.zeros_like(reward_G)


if __name__ == "__main__":
    job = Settings(**json.loads(Path(sys.argv[1]).read_text()))
    Path(job.out, "report.json").write_text(json.dumps(main(job)))
