"""Estimates of a run before it starts: the FLOPs of each stage, and the hours at this machine's measured speed.

The cost model is that of docs/performance.md: a token costs 2 N FLOPs in the forward and 4 N in the backward pass of a
model with N weights. Embedding lookups and the products of attention are left out. The estimates are orders of
magnitude: decoding is bound by memory, small models by everything else, and equal images and responses are computed
only once.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from masters.config import Config, Teacher
from masters.config.fields import TEACHER
from masters.data.question_selection import Selection
from masters.models.model_loading import tensor_shapes
from masters.models.training.memory_estimate import PATCHES, VISION
from masters.rewards.judge_probe import ProbeResult

if TYPE_CHECKING:
    from masters.checks.preflight import Resources

UTILIZATION = 0.4  # share of the speed of a large matrix product that models with many weights reach
JUDGE_TOKENS = 665  # tokens of a judge's two calls per response, on average over the demo's responses
MATMUL_SIZE, MATMUL_SECONDS = 2048, 0.5  # of the matrix products that measure the device's speed
SAMPLED_QUESTIONS = 32  # whose prompts are measured


@dataclass(frozen=True)
class QuestionCounts:
    """Numbers of training and evaluation questions, and the average tokens of a prompt and of its image."""

    train: float
    evaluation: float
    prompt: float
    image: float


@dataclass(frozen=True)
class ParameterCounts:
    """Weights of a model by use: per text token, per image patch, and per state that becomes logits."""

    text: float
    vision: float = 0.0
    head: float = 0.0

    def forward_flops(self, questions: QuestionCounts, response_tokens: float) -> float:
        """Return the FLOPs of a forward pass over a prompt with its image and over the tokens of its responses."""
        text_tokens, patches = questions.prompt + response_tokens, PATCHES * questions.image
        return 2 * (self.text * text_tokens + self.vision * patches + self.head * response_tokens)


def count_parameters(folder: Path) -> ParameterCounts:
    """Count a model's parameters, from the headers of its files. A tied head is stored as the embedding table."""
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(folder).items()}
    head = max((size for name, size in sizes.items() if "embed_tokens" in name or "lm_head" in name), default=0)
    others = {name: size for name, size in sizes.items() if "embed_tokens" not in name and "lm_head" not in name}
    vision = sum(size for name, size in others.items() if any(part in name for part in VISION))
    return ParameterCounts(sum(others.values()) - vision, vision, head)


def estimate_flops(
    config: Config, student: ParameterCounts, teachers: list[ParameterCounts], questions: QuestionCounts
) -> dict[str, float]:
    """Return the FLOPs of each stage, if all responses have `generate.max_tokens` tokens and no two are equal."""
    flops: dict[str, float] = dict.fromkeys(("generate", "score", "reference", "train", "evaluate"), 0.0)
    for teacher, teacher_config in zip(teachers, config.teachers, strict=True):
        passes = _count_passes(config, teacher_config)
        for stage, per_question in _round_flops(config, student, teacher, questions, passes).items():
            flops[stage] += questions.train * per_question
    models = [*teachers, student, student]  # the student is evaluated before and after training
    per_question = sum(model.forward_flops(questions, config.generate.max_tokens) for model in models)
    flops["evaluate"] = questions.evaluation * per_question
    return flops


def _count_passes(config: Config, teacher: Teacher) -> int:
    """Return the number of a teacher's mask stages in which a question is used."""
    return round(teacher.r_max / teacher.mask_step) + 1 if config.generate.coverage == "full" else 1


def _count_student_passes(config: Config, passes: int) -> int:
    return passes if config.generate.refresh == "stage" else 1


def _count_responses(config: Config, passes: int) -> int:
    """Return the number of responses to a question in a teacher's round."""
    generate = config.generate
    return passes * generate.teacher_responses + _count_student_passes(config, passes) * generate.student_responses


def count_judged_texts(config: Config, questions: QuestionCounts) -> float:
    """Return how many texts an LLM judges, if no two are equal."""
    texts = 0.0
    if config.needs_verdicts and config.rewards.accuracy == "llm":
        passes = [_count_passes(config, teacher) for teacher in config.teachers]
        texts += questions.train * sum(_count_responses(config, count) for count in passes)
    if config.evaluate.accuracy == "llm":
        texts += questions.evaluation * (len(config.teachers) + 2)  # the student before and after training
    return texts


def _round_flops(
    config: Config, student: ParameterCounts, teacher: ParameterCounts, questions: QuestionCounts, passes: int
) -> dict[str, float]:
    """Return the FLOPs per question of a teacher's round. `passes`: mask stages in which a question is used."""
    generate, train, length = config.generate, config.train, config.generate.max_tokens
    uses_labels = train.targets == "labels"
    trained_tokens = length * (1 if uses_labels else generate.responses)
    trainings = train.epochs * passes
    flops = {"train": 3 * trainings * student.forward_flops(questions, trained_tokens)}
    if train.objective != "sft":
        flops["train"] += trainings * teacher.forward_flops(questions, trained_tokens)
    if uses_labels:
        return flops
    student_passes, responses = _count_student_passes(config, passes), _count_responses(config, passes)
    flops["generate"] = 0.0
    if generate.teacher_responses:
        flops["generate"] += passes * teacher.forward_flops(questions, generate.teacher_responses * length)
    if generate.student_responses:
        flops["generate"] += student_passes * student.forward_flops(questions, generate.student_responses * length)
    if train.holds_reference:
        flops["reference"] = trainings * student.forward_flops(questions, trained_tokens)
    if train.stores_reference:
        flops["reference"] = student.forward_flops(questions, responses * length)
    if config.needs_verdicts and config.rewards.accuracy == "llm" and config.rewards.judge == TEACHER:
        flops["score"] = 2 * teacher.text * JUDGE_TOKENS * responses
    return flops


def count_questions(config: Config, selection: Selection, prompts: list[tuple[int, int]]) -> QuestionCounts:
    """Return the numbers of selected questions. `prompts`: tokens and image tokens of some prompts."""
    splits = selection.splits
    evaluation = splits["validation"] if config.evaluate.split == "validation" else splits["test"]
    tokens, image = (sum(numbers) / len(prompts) for numbers in zip(*prompts, strict=True))
    return QuestionCounts(splits["train"], evaluation, tokens, image)


def measure_flops_per_second(device: str, dtype: str) -> float:
    """Measure the FLOP/s of a large matrix product on a device."""
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device=device).to(getattr(torch, dtype))
    count, started = 0, 0.0
    while count < 2 or time.perf_counter() - started < MATMUL_SECONDS:
        if count == 1:
            started = time.perf_counter()  # the first product is not measured: it loads libraries
        torch.matmul(a, b)
        count += 1
        if device != "cpu":
            torch.cuda.synchronize()
    return 2 * MATMUL_SIZE**3 * (count - 1) / (time.perf_counter() - started)


def estimate_hours(flops: dict[str, float], flops_per_second: float) -> dict[str, float]:
    """Return the hours of each stage on one device."""
    return {stage: count / (UTILIZATION * flops_per_second) / 3600 for stage, count in flops.items()}


def measure_prompts(folder: Path, rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Return the number of tokens of each question's prompt, and how many of them are image tokens."""
    from transformers import AutoConfig, AutoProcessor

    from masters.models.prompts import model_inputs

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    image_token = AutoConfig.from_pretrained(folder, trust_remote_code=False).image_token_id
    prompts = (model_inputs(processor, row["question"], row["image"])["input_ids"][0] for row in rows)
    return [(len(ids), int((ids == image_token).sum())) for ids in prompts]


def describe_memory(config: Config, resources: "Resources") -> str:
    """Return a line on the memory that training needs at least. Raises InputError if there is not enough."""
    from masters.models import devices
    from masters.models.training import memory_estimate

    train, ranks = config.train, config.runtime.train_processes
    device = devices.select_device(0, ranks)
    teachers = [None] if train.objective == "sft" else [teacher.folder for teacher in resources.teachers]
    estimates = [
        memory_estimate.estimate_memory(
            resources.student.folder,
            teacher,
            train,
            memory_estimate.NO_PASS,
            ranks,
            saves=False,
            device=device,
            runtime=config.runtime,
        ).on(device)
        for teacher in teachers
    ]
    largest = max(estimates, key=lambda estimate: estimate.total)
    available, ranks_per_device = memory_estimate.free_memory(device, ranks)
    memory_estimate.check_memory(largest, available, ranks_per_device, device, 0)
    needed = ranks_per_device * largest.total / memory_estimate.GIB
    free = available / memory_estimate.GIB
    return f"training takes {needed:.2f} GiB and its activations, {free:.2f} GiB are free on {device}"


def describe_judging(config: Config, questions: QuestionCounts, probe: ProbeResult) -> str:
    """Return a line on what a judge's server is asked in a run. `probe`: its answer to one question."""
    texts, tokens = count_judged_texts(config, questions), probe.tokens or JUDGE_TOKENS
    hours = texts * probe.seconds / config.runtime.judge_requests / 3600
    counted = "as counted by the server" if probe.tokens else "as of the demo's judge"
    return (
        f"at most {texts:,.0f} texts (equal ones are judged once) of {tokens:,} tokens each, {counted}: "
        f"{texts * tokens:.2g} tokens, {hours:.2g} hours at {config.runtime.judge_requests} requests at a time"
    )


def describe_estimates(
    config: Config,
    resources: "Resources",
    selection: Selection,
    price: float | None,
    probe: ProbeResult | None = None,
) -> Iterator[str]:
    """Yield lines on the work of a run, the time it takes on this machine at least, and its cost.

    `selection`: the questions that the run uses. `price`: of a device hour. `probe`: the answer of the judge's server
    to one question, None if there is no server.
    """
    from masters.checks.parity import sample_questions
    from masters.models.distributed.mixed_precision import frozen_dtype

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    student, teachers = resources.student.folder, [teacher.folder for teacher in resources.teachers]
    rows = sample_questions(config, resources, SAMPLED_QUESTIONS)
    questions = count_questions(config, selection, measure_prompts(student, rows))
    flops = estimate_flops(
        config, count_parameters(student), [count_parameters(folder) for folder in teachers], questions
    )
    dtype = frozen_dtype(config.train)
    flops_per_second = measure_flops_per_second(device, dtype)
    hours = estimate_hours(flops, flops_per_second)
    total = sum(hours.values())
    shares = ", ".join(f"{stage} {share / total:.0%}" for stage, share in hours.items() if share)
    yield (
        f"work       {questions.train:,.0f} training and {questions.evaluation:,.0f} evaluation questions, prompts of "
        f"{questions.prompt:.0f} tokens (average of {len(rows)}): {sum(flops.values()):.2g} FLOPs if no two responses "
        f"are equal ({shares})"
    )
    yield (
        f"time       about {total:.2g} hours on {device}, at {UTILIZATION:.0%} of the {flops_per_second / 1e12:.3g} "
        f"TFLOP/s measured now in {dtype}; decoding and small models are slower"
    )
    cost = f"{total * price:.2f} at {price:g} an hour" if price is not None else "add --price to see the cost"
    yield f"cost       {total:.2g} device hours: {cost}"
    if probe:
        yield f"judging    {describe_judging(config, questions, probe)}"
