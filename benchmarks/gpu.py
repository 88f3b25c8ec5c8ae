"""Rows that `python -m benchmarks head` and `... step` add on a CUDA machine: the same at the size of real models.

Random weights: a Qwen3-VL student of 1.1B, a pi_ref of its size and a teacher of 4.0B (vision towers aside), computed
as `train.compute_dtype = "bfloat16"` does: the student's weights in float32, the others' and all products in bfloat16,
in our implementation and the baseline alike. Ours has text attention through FlexAttention and all questions in one
row, as the trainer packs them. Written without a GPU and never run on one; its arithmetic is tested on a CPU.
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks import head, step
from benchmarks.measure import Row, compare, make_gpu_memory_meter, make_timer
from benchmarks.step import IMAGE_TOKEN, RESPONSES, Models, Shape
from masters.config import Train
from masters.models.distributed import mixed_precision
from masters.models.families.base import VLM
from masters.models.model_loading import attention_implementation
from masters.models.packing.prefix_tree import Question

REPEATS = 5
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, by a part of the device's name
FROZEN_PASSES, TRAINED_PASSES = 1, 3  # in forward passes: a backward pass costs two


@dataclass(frozen=True)
class ModelShape:
    """The shape of a Qwen3-VL: language model, then vision tower."""

    width: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int = 151_936
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16


@dataclass(frozen=True)
class Sizes:
    student: ModelShape = ModelShape(1536, 28, 4608, 16, 8, 128)
    teacher: ModelShape = ModelShape(2560, 36, 9728, 32, 8, 128)
    shape: Shape = Shape((64, 62), 32, 128)
    questions: int = 4  # in one pass of ours
    device: str = "cuda"
    train: Train = Train(compute_dtype="bfloat16")


@dataclass(frozen=True)
class Work:
    """Counts of a forward pass: text tokens, pairs of them that attend to each other, states that become logits, image
    patches, and pairs of patches."""

    tokens: int
    pairs: int
    states: int
    patches: int
    patch_pairs: int

    def times(self, count: int) -> "Work":
        return Work(*(count * part for part in (self.tokens, self.pairs, self.states, self.patches, self.patch_pairs)))


def measure_head() -> list[Row]:
    """Return rows of the vocabulary pass, in bfloat16 at the sizes of `benchmarks.head`."""
    rows = head.measure(head.Sizes(device="cuda", dtype=torch.bfloat16))
    return [Row(f"GPU, {row.case}", row.ours, row.baseline, row.unit, row.spread) for row in rows]


def measure_step(sizes: Sizes = Sizes()) -> list[Row]:
    """Return rows of a training step: ours packs the questions, the baseline runs each in separate sequences.

    Tokens are those of responses. The share of the peak counts all that an implementation computes, so repeated prompts
    count for the baseline.
    """
    trained, frozen = (getattr(torch, name) for name in (sizes.train.dtype, mixed_precision.frozen_dtype(sizes.train)))
    parts = (sizes.student, trained), (sizes.teacher, frozen), (sizes.student, frozen)
    models = Models(*(make_model(shape, sizes.device, dtype) for shape, dtype in parts))
    mixed_precision.apply_autocast(models.student, sizes.train)
    questions = [step.make_question(sizes.shape, seed) for seed in range(sizes.questions)]
    case = f"GPU, {sizes.questions} x {sizes.shape}"

    ours = partial(run_packed, models, questions, attention_implementation(sizes.device))
    baseline = partial(run_separate, models, questions, attention_implementation("cpu"))
    time = compare(f"{case}, time", "s", make_timer(ours), make_timer(baseline), REPEATS)
    tokens = sizes.questions * RESPONSES * sizes.shape.response
    rows = [time, make_rate_row(f"{case}, tokens", "/s", time, (tokens, tokens))]
    if peak := peak_flops(sizes.device):
        our_share, baseline_share = (
            100 * step_flops(models, work.times(sizes.questions)) / peak
            for work in (packed_work(sizes.shape), separate_work(sizes.shape))
        )
        rows.append(make_rate_row(f"{case}, share of the bf16 peak", "%", time, (our_share, baseline_share)))
    if sizes.device.startswith("cuda"):
        meters = make_gpu_memory_meter(ours), make_gpu_memory_meter(baseline)
        rows.append(compare(f"{case}, memory", "MiB", *meters, 1))
    return rows


def run_packed(models: Models, questions: list[Question], attention: dict) -> None:
    prepare_models(models, attention)
    step.packed_loss(models, *questions, row_length=sum(question.tokens for question in questions)).backward()


def run_separate(models: Models, questions: list[Question], attention: dict) -> None:
    prepare_models(models, attention)
    for question in questions:
        step.separate_loss(models, question).backward()


def prepare_models(models: Models, attention: dict) -> None:
    models.student.zero_grad(set_to_none=True)
    for model in (models.student, models.teacher, models.reference):
        model.set_attn_implementation(attention)


def make_rate_row(case: str, unit: str, time: Row, amounts: tuple[float, float]) -> Row:
    """Return amounts per second by the medians of a time row.

    More is better here: where ours wins, the ratio, baseline / ours, is below 1.
    """
    ours, baseline = amounts[0] / time.ours, amounts[1] / time.baseline
    (our_low, our_high), (baseline_low, baseline_high) = time.spread
    spread = (
        (amounts[0] / our_high, amounts[0] / our_low),
        (amounts[1] / baseline_high, amounts[1] / baseline_low),
    )
    return Row(case, ours, baseline, unit, spread)


def make_model(shape: ModelShape, device: str, dtype: torch.dtype) -> VLM:
    """Return a model with random weights, made on its device."""
    sixth = shape.head_width // 6
    text = dict(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        max_position_embeddings=4096,
        rope_scaling=dict(
            rope_type="default",
            mrope_section=[shape.head_width // 2 - 2 * sixth, sixth, sixth],
            mrope_interleaved=True,
        ),
    )
    third = shape.vision_layers // 3
    vision = dict(
        depth=shape.vision_layers,
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_heads=shape.vision_heads,
        patch_size=14,
        out_hidden_size=shape.width,
        deepstack_visual_indexes=[third - 1, 2 * third - 1, 3 * third - 1],
        num_position_embeddings=4096,
    )
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, vision_start_token_id=3)
    config.tie_word_embeddings = True
    with torch.device(device):
        return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype).eval()


def packed_work(shape: Shape) -> Work:
    """Return the work of one question with its responses behind one prompt."""
    p, r, patches = shape.prompt, shape.response, shape.grid[0] * shape.grid[1]
    pairs = p * (p + 1) // 2 + RESPONSES * (r * p + r * (r + 1) // 2)
    return Work(p + RESPONSES * r, pairs, RESPONSES * r, patches, patches**2)


def separate_work(shape: Shape) -> Work:
    """Return the work of one question with a sequence per response."""
    length, patches = shape.prompt + shape.response, shape.grid[0] * shape.grid[1]
    return Work(length, length * (length + 1) // 2, shape.response, patches, patches**2).times(RESPONSES)


def step_flops(models: Models, work: Work) -> float:
    """Return the FLOPs of one training step, without what the chunked head computes a second time."""
    frozen = sum(forward_flops(model, work) for model in (models.teacher, models.reference))
    return TRAINED_PASSES * forward_flops(models.student, work) + FROZEN_PASSES * frozen


def forward_flops(model: VLM, work: Work) -> float:
    """Return the FLOPs of a forward pass's matrix products: two for each weight and row, and those of attention."""
    patches_per_token = model.config.vision_config.spatial_merge_size**2
    rows = {"lm_head": work.states, "merger": work.patches / patches_per_token, "visual": work.patches, "": work.tokens}
    products = sum(
        2 * module.weight.numel() * next(count for part, count in rows.items() if part in name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d)
    )
    text, vision = model.config.text_config, model.config.vision_config
    attention = text.num_hidden_layers * text.num_attention_heads * text.head_dim * work.pairs
    return products + 4 * (attention + vision.depth * vision.hidden_size * work.patch_pairs)


def peak_flops(device: str) -> float | None:
    """Return the device's FLOP/s in bfloat16; None where they are not known."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


BENCHMARKS = {"head": measure_head, "step": measure_step}
