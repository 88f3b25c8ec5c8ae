"""What a run will take, calculated before it starts: the FLOPs of each stage, and hours at this machine's speed.

The cost model of docs/performance.md. A token costs 2 N FLOPs forward and 4 N backward in a model of N weights (tables
that are looked up left out, and attention's products). An order of magnitude: decoding waits for memory and small
models for everything else, images and answers that come twice are computed once.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from masters.config import Config
from masters.config.fields import TEACHER
from masters.data.sources import Source
from masters.data.validation import TEST_SHARE
from masters.models.training.memory_estimate import PATCHES, VISION, tensor_shapes

if TYPE_CHECKING:
    from masters.checks.preflight import Resources

UTILIZATION = 0.4  # of the speed of a large matrix product, reached where weights are many
JUDGE_TOKENS = 665  # tokens of a judge's two calls on a response, on average on the demo's
MATMUL_SIZE, MATMUL_SECONDS = 2048, 0.5  # of the matrix products that are timed

SAMPLED_QUESTIONS = 32  # questions


@dataclass(frozen=True)
class QuestionCounts:
    """How many there are to train on and to evaluate, and the tokens of a prompt on average, an image's among them."""

    train: float
    evaluation: float
    prompt: float
    image: float


@dataclass(frozen=True)
class ParameterCounts:
    """Of a model: what each text token passes, each image patch, and each state that becomes logits."""

    text: float
    vision: float = 0.0
    head: float = 0.0

    def forward(self, of: QuestionCounts, said: float) -> float:
        """FLOPs of a prompt with its image, and of so many tokens of responses."""
        return 2 * (self.text * (of.prompt + said) + self.vision * PATCHES * of.image + self.head * said)


def count_parameters(folder: Path) -> ParameterCounts:
    """From the headers of a model's files; a tied head is there as the table of embeddings."""
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(folder).items()}
    head = max((size for name, size in sizes.items() if "embed_tokens" in name or "lm_head" in name), default=0)
    passed = {name: size for name, size in sizes.items() if "embed_tokens" not in name and "lm_head" not in name}
    vision = sum(size for name, size in passed.items() if any(part in name for part in VISION))
    return ParameterCounts(sum(passed.values()) - vision, vision, head)


def estimate_flops(config: Config, student: ParameterCounts, teachers: list[ParameterCounts], of: QuestionCounts) -> dict[str, float]:
    """By stage, with responses as long as `generate.max_tokens`, none of them alike."""
    found: dict[str, float] = dict.fromkeys(("generate", "score", "reference", "train", "evaluate"), 0.0)
    for teacher, round_ in zip(teachers, config.teachers, strict=True):
        passes = round(round_.r_max / round_.mask_step) + 1 if config.generate.coverage == "full" else 1
        for stage, count in _round(config, student, teacher, of, passes).items():
            found[stage] += of.train * count
    asked = [*teachers, student, student]
    found["evaluate"] = of.evaluation * sum(model.forward(of, config.generate.max_tokens) for model in asked)
    return found


def _round(config: Config, student: ParameterCounts, teacher: ParameterCounts, of: QuestionCounts, passes: int) -> dict[str, float]:
    """FLOPs a question of one teacher's round."""
    generate, train, rewards, length = config.generate, config.train, config.rewards, config.generate.max_tokens
    labels = train.targets == "labels"
    said = length * (1 if labels else generate.responses)
    counts = {"train": train.epochs * passes * 3 * student.forward(of, said)}
    if train.objective != "sft":
        counts["train"] += train.epochs * passes * teacher.forward(of, said)
    if labels:
        return counts
    theirs, ours = generate.teacher_responses, generate.student_responses
    anew = passes if generate.refresh == "stage" else 1
    answers = passes * theirs + anew * ours
    counts["generate"] = passes * teacher.forward(of, theirs * length) if theirs else 0.0
    counts["generate"] += anew * student.forward(of, ours * length) if ours else 0.0
    if train.holds_reference:
        counts["reference"] = train.epochs * passes * student.forward(of, said)
    if train.stores_reference:
        counts["reference"] = student.forward(of, answers * length)
    if config.needs_verdicts and rewards.accuracy == "llm" and rewards.judge == TEACHER:
        counts["score"] = 2 * teacher.text * JUDGE_TOKENS * answers
    return counts


def count_questions(config: Config, source: Source, prompts: list[tuple[int, int]]) -> QuestionCounts:
    """The source's rows, counted and not looked into; `prompts`: tokens of some, and how many are an image's."""
    splits = {"train": 0.0, "test": 0.0}
    for row in source.rows():
        if isinstance(row.split, str) and row.split in splits:
            splits[row.split] += 1
        else:
            splits["train"] += 1 - TEST_SHARE
            splits["test"] += TEST_SHARE
    train = min(splits["train"], config.data.train_limit or math.inf)
    held = config.data.validation_share * train
    on_test = min(splits["test"], config.data.eval_limit or math.inf)
    evaluation = held if config.evaluate.split == "validation" else on_test
    tokens, image = (sum(numbers) / len(prompts) for numbers in zip(*prompts, strict=True))
    return QuestionCounts(train - held, evaluation, tokens, image)


def measure_flops_per_second(device: str, dtype: str) -> float:
    """FLOP/s of a large matrix product on this device, measured now."""
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device=device).to(getattr(torch, dtype))
    count, began = 0, 0.0
    while count < 2 or time.perf_counter() - began < MATMUL_SECONDS:
        if count == 1:
            began = time.perf_counter()  # the first is not counted: libraries are loaded in it
        torch.matmul(a, b)
        count += 1
        if device != "cpu":
            torch.cuda.synchronize()
    return 2 * MATMUL_SIZE**3 * (count - 1) / (time.perf_counter() - began)


def estimate_hours(work: dict[str, float], flops_a_second: float) -> dict[str, float]:
    """By stage, on one device."""
    return {stage: count / (UTILIZATION * flops_a_second) / 3600 for stage, count in work.items()}


def measure_prompts(folder: Path, rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Tokens of each question's prompt, and how many of them are the image's."""
    from transformers import AutoConfig, AutoProcessor

    from masters.models.prompts import model_inputs

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    image = AutoConfig.from_pretrained(folder, trust_remote_code=False).image_token_id
    found = (model_inputs(processor, row["question"], row["image"])["input_ids"][0] for row in rows)
    return [(len(ids), int((ids == image).sum())) for ids in found]


def describe_memory(settings: Config, resources: "Resources") -> str:
    """What training needs at least, with the largest teacher, whatever its token budget. Raises InputError."""
    from masters.models import devices
    from masters.models.training import memory_estimate

    train, ranks = settings.train, settings.runtime.train_processes
    device = devices.of_rank(0, ranks)
    teachers = [None] if train.objective == "sft" else [teacher.folder for teacher in resources.teachers]
    needs = [
        memory_estimate.estimate_memory(resources.student.folder, one, train, (0, 0), ranks, False, device, settings.runtime).on(
            device
        )
        for one in teachers
    ]
    largest, (available, sharing) = max(needs, key=lambda one: one.total), memory_estimate.free_memory(device, ranks)
    memory_estimate.check_memory(largest, available, sharing, device, 0)
    needed = sharing * largest.total / memory_estimate.GIB
    free = available / memory_estimate.GIB
    return f"training takes {needed:.2f} GiB and its activations, {free:.2f} GiB are free on {device}"


def describe_estimates(settings: Config, resources: "Resources", price: float | None) -> Iterator[str]:
    """Lines on the work ahead, the least time that it takes here, and what that costs."""
    import torch

    from masters.checks.parity import sample_questions
    from masters.models.distributed.mixed_precision import frozen_dtype

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    rows = sample_questions(settings, resources, SAMPLED_QUESTIONS)
    of = count_questions(settings, resources.source, measure_prompts(resources.student.folder, rows))
    student, teachers = resources.student.folder, [teacher.folder for teacher in resources.teachers]
    work = estimate_flops(settings, count_parameters(student), [count_parameters(one) for one in teachers], of)
    computed_in = frozen_dtype(settings.train)
    fast = measure_flops_per_second(device, computed_in)
    spent = estimate_hours(work, fast)
    total = sum(spent.values())
    parts = ", ".join(f"{stage} {share / total:.0%}" for stage, share in spent.items() if share)
    yield (
        f"work       {of.train:,.0f} training and {of.evaluation:,.0f} evaluation questions, prompts of "
        f"{of.prompt:.0f} tokens (of {len(rows)}): {sum(work.values()):.2g} FLOPs if no answer comes twice ({parts})"
    )
    yield (
        f"time       about {total:.2g} hours of {device}, at {UTILIZATION:.0%} of the {fast / 1e12:.3g} TFLOP/s "
        f"that it shows in {computed_in} now; decoding and small models reach less"
    )
    cost = f"{total * price:.2f} at {price:g} an hour" if price is not None else "--price says what that costs"
    yield f"cost       {total:.2g} device hours: {cost}"
