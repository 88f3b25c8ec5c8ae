"""The method in plain PyTorch, as one would write it in a day without Masters: the baseline of `bench end-to-end`.

It can be read as documentation of the method (arXiv 2512.22238), from top to bottom. It imports nothing of this
project and takes no shortcut of it: a masked checkpoint a ratio, an engine a checkpoint, a sequence a response (its
prompt and image each time), whole logits. Fixed responses get the rewards, advantages and losses of
`masters.models.training.objective` (tests/examples/test_straightforward.py). Models are Qwen3-VL; a rule gives every
verdict.

    python -m examples.straightforward JOB.json      # the job: the fields of `Settings`

Shapes: N sequences of a batch, L their padded length, R tokens of the longest response, V vocabulary, G responses of
one question.
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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the models while they train


@dataclass(frozen=True)
class Settings:
    """What to run: `questions` is a JSONL file of image (relative to it), question and answer; `out` a new folder."""

    questions: str
    teacher: str
    student: str
    out: str
    ratios: list[float]  # of the mask stages, from r_max down to 0
    samples: int  # of the teacher and of the student, each
    sampling: dict  # vLLM's temperature, top_p, top_k, repetition_penalty, max_tokens
    max_model_len: int
    learning_rate: float
    beta: float
    epochs: int
    questions_per_step: int
    seed: int


@dataclass(frozen=True)
class Question:
    image: Path
    question: str
    answer: str


@dataclass(frozen=True)
class Group:
    """A question with its responses' tokens and their verdicts R_acc."""

    question: Question
    responses: list[list[int]]
    scores: list[float]


def main(settings: Settings) -> dict:
    """Distil the student. Returns seconds of each part and the loss of every step."""
    out, began = Path(settings.out), time.monotonic()
    questions = read_questions(Path(settings.questions))
    stages = mask_stages(questions, len(settings.ratios), settings.seed)
    teachers = [masked_checkpoint(settings.teacher, ratio, out / f"teacher-{ratio}") for ratio in settings.ratios]
    masked = time.monotonic()
    groups = generate(teachers, stages, settings)
    generated = time.monotonic()
    student, losses = train(teachers, groups, settings)
    student.save_pretrained(out / "student")
    AutoProcessor.from_pretrained(settings.student).save_pretrained(out / "student")
    seconds = dict(mask=masked - began, generate=generated - masked, train=time.monotonic() - generated)
    return dict(seconds=seconds, questions=len(questions), losses=losses)


def read_questions(file: Path) -> list[Question]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [Question(file.parent / row["image"], row["question"], row["answer"]) for row in rows]


def mask_stages(questions: list[Question], count: int, seed: int) -> list[list[Question]]:
    """Eq. 3: training passes through the ratios from r_max to 0, an equal share of the questions at each."""
    shuffled = random.Random(seed).sample(questions, len(questions))
    return [shuffled[len(shuffled) * k // count : len(shuffled) * (k + 1) // count] for k in range(count)]


# Masked teachers


@torch.no_grad()
def masked_checkpoint(folder: str, ratio: float, out: Path) -> str:
    """Eq. 1-2: a weight is kept where |w| >= the magnitude at rank floor(r N) of its matrix, else it is zero."""
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


# Responses, generated ahead


def generate(teachers: list[str], stages: list[list[Question]], settings: Settings) -> list[list[Group]]:
    """Groups of every stage: its masked teacher answers its questions, the student answers all."""
    everything = [question for stage in stages for question in stage]
    by_student = iter(answered(settings.student, everything, settings))
    groups = []
    for teacher, stage in zip(teachers, stages, strict=True):
        by_teacher = answered(teacher, stage, settings)
        groups.append([group(q, said + next(by_student)) for q, said in zip(stage, by_teacher, strict=True)])
    return groups


def group(question: Question, said: list[tuple[list[int], str]]) -> Group:
    """Tokens and verdicts of what was said; a response of no tokens is none."""
    said = [(tokens, text) for tokens, text in said if tokens]
    scores = [float(normalized(text) == normalized(question.answer)) for _, text in said]
    return Group(question, [tokens for tokens, _ in said], scores)


def normalized(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,!?;:\"'")


def answered(folder: str, questions: list[Question], settings: Settings) -> list[list[tuple[list[int], str]]]:
    """Responses of a model, from an engine in a process of its own: its memory comes back when it ends."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(engine_answers, folder, questions, settings).result()


def engine_answers(folder: str, questions: list[Question], settings: Settings) -> list[list[tuple[list[int], str]]]:
    """Token ids and text of each question's samples."""
    # what starts vLLM fastest on a CPU
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    one_image, eager = {"image": 1, "video": 0}, DEVICE == "cpu"
    llm = LLM(folder, dtype="float32", enforce_eager=eager, max_model_len=settings.max_model_len,
              limit_mm_per_prompt=one_image, seed=settings.seed)  # fmt: skip
    processor = AutoProcessor.from_pretrained(folder)
    prompts: Any = [
        {"prompt": chat(processor, q.question), "multi_modal_data": {"image": opened(q)}} for q in questions
    ]
    outputs = llm.generate(prompts, SamplingParams(n=settings.samples, **settings.sampling), use_tqdm=False)
    return [[(list(one.token_ids), one.text) for one in output.outputs] for output in outputs]


def chat(processor, question: str) -> str:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)


def opened(question: Question) -> Image.Image:
    return Image.open(question.image).convert("RGB")


# Training


@dataclass(frozen=True)
class Batch:
    """A sequence a response: prompt, image, response, padded on the right."""

    inputs: dict[str, torch.Tensor]
    prompt_N: torch.Tensor  # prompt tokens of each sequence
    token_NR: torch.Tensor  # the responses, padded
    there_NR: torch.Tensor  # 1 where there is a token


@dataclass(frozen=True)
class Outcome:
    loss: torch.Tensor
    reward_N: torch.Tensor
    advantage_N: torch.Tensor


def train(teachers: list[str], stages: list[list[Group]], settings: Settings) -> tuple[Any, list[float]]:
    """Stage by stage, each with its masked teacher. Returns the student and the loss of every step."""
    processor, student = AutoProcessor.from_pretrained(settings.student), load(settings.student)
    reference = load(settings.student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    size, shuffle, losses = settings.questions_per_step, random.Random(settings.seed), []
    for folder, groups in zip(teachers, stages, strict=True):
        teacher = load(folder)
        for _ in range(settings.epochs):
            order = shuffle.sample(range(len(groups)), len(groups))
            for at in range(0, len(order), size):
                chosen = [groups[n] for n in order[at : at + size]]
                outcome = step_outcome(student, teacher, reference, processor, chosen, settings.beta)
                outcome.loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(outcome.loss.item())
    return student, losses


def load(folder: str) -> Any:
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.to(DEVICE).eval()


def collate(processor, groups: list[Group]) -> Batch:
    sequences, images, prompts = [], [], []
    for one in groups:
        prompt = processor(text=[chat(processor, one.question.question)], images=[opened(one.question)],
                           return_tensors="pt")  # fmt: skip
        for response in one.responses:
            sequences.append(torch.cat([prompt["input_ids"][0], torch.tensor(response)]))
            images.append(prompt)
            prompts.append(prompt["input_ids"].shape[1])
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    input_ids = pad_sequence(sequences, batch_first=True)
    inputs = dict(
        input_ids=input_ids,
        attention_mask=(torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        mm_token_type_ids=(input_ids == processor.image_token_id).int(),
        pixel_values=torch.cat([prompt["pixel_values"] for prompt in images]),
        image_grid_thw=torch.cat([prompt["image_grid_thw"] for prompt in images]),
    )
    responses = [torch.tensor(response) for one in groups for response in one.responses]
    token_NR = pad_sequence(responses, batch_first=True)
    there_NR = pad_sequence([torch.ones(len(response)) for response in responses], batch_first=True)
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    return Batch(inputs, torch.tensor(prompts).to(DEVICE), token_NR.to(DEVICE), there_NR.to(DEVICE))


def response_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """What predicts each response token: of the whole sequences' logits [N, L, V] those one place before, [N, R, V]."""
    logits_NLV = model(**batch.inputs, use_cache=False).logits
    at_NR = batch.prompt_N[:, None] - 1 + torch.arange(batch.token_NR.shape[1], device=DEVICE)
    at_NR = at_NR.clamp(max=logits_NLV.shape[1] - 1)  # padding
    return logits_NLV.gather(1, at_NR[..., None].expand(-1, -1, logits_NLV.shape[2]))


def log_probs(logits_NRV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """log pi of the responses' tokens, [N, R]."""
    from trl.trainer.utils import selective_log_softmax  # here, and not above: the engines' processes need no TRL

    return selective_log_softmax(logits_NRV, batch.token_NR)


def divergences(student_NRV: torch.Tensor, teacher_NRV: torch.Tensor) -> torch.Tensor:
    """Eq. 4-5: the Jensen-Shannon divergence of each token's two distributions, [N, R]."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(student_NRV, teacher_NRV, beta=0.5, reduction="none").sum(-1)


def kl_to_reference(student_NRV: torch.Tensor, reference_NRV: torch.Tensor) -> torch.Tensor:
    """Eq. 8-11: D_KL(pi || pi_ref) of each token, over the vocabulary, [N, R]."""
    logp_NRV, known_NRV = student_NRV.log_softmax(-1), reference_NRV.log_softmax(-1)
    return (logp_NRV.exp() * (logp_NRV - known_NRV)).sum(-1)


def step_outcome(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    reference: torch.nn.Module,
    processor,
    groups: list[Group],
    beta: float,
) -> Outcome:
    """L_GRPO + D (Eq. 4-11): mean over a response's tokens, a question's responses, the step's questions."""
    batch = collate(processor, groups)
    logits_NRV = response_logits(student, batch)
    with torch.no_grad():
        taught_NRV, known_NRV = response_logits(teacher, batch), response_logits(reference, batch)
    divergence_N = token_means(divergences(logits_NRV, taught_NRV), batch)
    sizes = [len(one.responses) for one in groups]
    parts = zip(divergence_N.detach().cpu().split(sizes), groups, strict=True)
    reward_N = torch.cat([rewards(divergence_G, one) for divergence_G, one in parts])
    advantage_N = torch.cat([advantages(reward_G) for reward_G in reward_N.split(sizes)])
    logp_NR = log_probs(logits_NRV, batch)
    kl_NR = kl_to_reference(logits_NRV, known_NRV)
    ratio_NR = (logp_NR - logp_NR.detach()).exp()  # 1, with the gradient of log pi
    grpo_N = -token_means(ratio_NR * advantage_N.to(DEVICE)[:, None] - beta * kl_NR, batch)
    loss = torch.stack([loss_G.mean() for loss_G in (grpo_N + divergence_N).split(sizes)]).mean()
    return Outcome(loss, reward_N, advantage_N)


def token_means(value_NR: torch.Tensor, batch: Batch) -> torch.Tensor:
    return (value_NR * batch.there_NR).sum(1) / batch.there_NR.sum(1)


def rewards(divergence_G: torch.Tensor, one: Group) -> torch.Tensor:
    """Eq. 6-7: R = R_acc + (D_max - D) / (D_max - D_min); identical responses share one D."""
    same_GG = torch.tensor([[float(a == b) for b in one.responses] for a in one.responses])
    shared_G = same_GG @ divergence_G / same_GG.sum(1)
    spread = shared_G.max() - shared_G.min()
    distill_G = (shared_G.max() - shared_G) / spread if spread > 1e-5 else torch.zeros_like(shared_G)
    return torch.tensor(one.scores) + distill_G


def advantages(reward_G: torch.Tensor) -> torch.Tensor:
    """Eq. 8: rewards of a question's responses against their mean, in standard deviations."""
    deviation = reward_G.std(correction=0)
    return (reward_G - reward_G.mean()) / deviation if deviation > 1e-4 else torch.zeros_like(reward_G)


if __name__ == "__main__":
    job = Settings(**json.loads(Path(sys.argv[1]).read_text()))
    Path(job.out, "report.json").write_text(json.dumps(main(job)))
