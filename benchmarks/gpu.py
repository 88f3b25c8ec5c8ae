"""What `python -m benchmarks head` and `... step` add on a CUDA machine: the same at the size of real models.

Random weights, a Qwen3-VL student of 1.1B, a pi_ref of its size and a teacher of 4.0B (vision towers aside), computed
as `train.compute_dtype = "bfloat16"` does: the student's weights in float32, the others' and all products in bfloat16,
for ours and the baseline alike. Ours has text attention through FlexAttention and all questions in one row, as the
trainer packs them. Written without a GPU and never run on one; its arithmetic is tested on a CPU.
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks import head, step
from benchmarks.measure import Row, compare, gpu_mib, seconds
from benchmarks.step import IMAGE, RESPONSES, Models, Shape
from masters.config import Train
from masters.models.distributed import mixed_precision
from masters.models.families.base import VLM
from masters.models.model_loading import attention
from masters.models.packing.prefix_tree import Question

REPEATS = 5
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, by a part of the device's name
FORWARD, TRAINED = 1, 3  # passes of a model, in forward passes: a backward pass is two


@dataclass(frozen=True)
class Model:
    """A Qwen3-VL: language model, then vision tower."""

    width: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int = 151_936
    eye_width: int = 1024
    eye_layers: int = 24
    eye_heads: int = 16


@dataclass(frozen=True)
class Sizes:
    student: Model = Model(1536, 28, 4608, 16, 8, 128)
    teacher: Model = Model(2560, 36, 9728, 32, 8, 128)
    shape: Shape = Shape((64, 62), 32, 128)
    questions: int = 4  # in one pass of ours
    device: str = "cuda"
    train: Train = Train(compute_dtype="bfloat16")


@dataclass(frozen=True)
class Work:
    """What a model computes in a forward pass: text tokens and the pairs of them that see each other, states that
    become logits, image patches and their pairs."""

    tokens: int
    pairs: int
    states: int
    patches: int
    patch_pairs: int

    def times(self, count: int) -> "Work":
        return Work(*(count * part for part in (self.tokens, self.pairs, self.states, self.patches, self.patch_pairs)))


def head_rows() -> list[Row]:
    """Of the vocabulary pass, in bfloat16 at the head's sizes."""
    rows = head.measured(head.Sizes(device="cuda", dtype=torch.bfloat16))
    return [Row(f"GPU, {row.case}", row.ours, row.baseline, row.unit, row.spread) for row in rows]


def step_rows(sizes: Sizes = Sizes()) -> list[Row]:
    """Of a training step: ours packs the questions, the baseline takes them one by one in separate sequences.

    Tokens are those of responses. The share of the peak is of what each way computes at all, so that repeated prompts
    count for the baseline.
    """
    trained, frozen = (getattr(torch, kind) for kind in (sizes.train.dtype, mixed_precision.frozen_dtype(sizes.train)))
    kinds = (sizes.student, trained), (sizes.teacher, frozen), (sizes.student, frozen)
    models = Models(*(model(part, sizes.device, kind) for part, kind in kinds))
    mixed_precision.computing(models.student, sizes.train)
    asked = [step.question(sizes.shape, seed) for seed in range(sizes.questions)]
    case = f"GPU, {sizes.questions} x {sizes.shape}"

    ours = partial(packed, models, asked, attention(sizes.device))
    plain = partial(separate, models, asked, attention("cpu"))
    time = compare(f"{case}, time", "s", seconds(ours), seconds(plain), REPEATS)
    tokens = sizes.questions * RESPONSES * sizes.shape.response
    rows = [time, rate(f"{case}, tokens", "/s", time, (tokens, tokens))]
    if peak := peak_flops(sizes.device):
        shares = [
            100 * step_flops(models, work.times(sizes.questions)) / peak
            for work in (packed_work(sizes.shape), separate_work(sizes.shape))
        ]
        rows.append(rate(f"{case}, share of the bf16 peak", "%", time, (shares[0], shares[1])))
    if sizes.device.startswith("cuda"):
        rows.append(compare(f"{case}, memory", "MiB", gpu_mib(ours), gpu_mib(plain), 1))
    return rows


def packed(models: Models, asked: list[Question], attention: dict) -> None:
    prepare(models, attention)
    step.packed_loss(models, *asked, row=sum(question.tokens for question in asked)).backward()


def separate(models: Models, asked: list[Question], attention: dict) -> None:
    prepare(models, attention)
    for question in asked:
        step.separate_loss(models, question).backward()


def prepare(models: Models, attention: dict) -> None:
    models.student.zero_grad(set_to_none=True)
    for model in (models.student, models.teacher, models.reference):
        model.set_attn_implementation(attention)


def rate(case: str, unit: str, time: Row, amounts: tuple[float, float]) -> Row:
    """Amounts by the medians of a time row. More is better here: the ratio, baseline / ours, is below 1 for a win."""
    ours, baseline = amounts[0] / time.ours, amounts[1] / time.baseline
    (fast, slow), (fast_plain, slow_plain) = time.spread
    spread = ((amounts[0] / slow, amounts[0] / fast), (amounts[1] / slow_plain, amounts[1] / fast_plain))
    return Row(case, ours, baseline, unit, spread)


def model(of: Model, device: str, dtype: torch.dtype) -> VLM:
    """Random weights, made where they stay."""
    sections = [of.head_width // 2 - 2 * (of.head_width // 6), of.head_width // 6, of.head_width // 6]
    text = dict(
        vocab_size=of.vocabulary, hidden_size=of.width, intermediate_size=of.inner, num_hidden_layers=of.layers,
        num_attention_heads=of.heads, num_key_value_heads=of.kv_heads, head_dim=of.head_width,
        max_position_embeddings=4096,
        rope_scaling=dict(rope_type="default", mrope_section=sections, mrope_interleaved=True),
    )  # fmt: skip
    third = of.eye_layers // 3
    eye = dict(
        depth=of.eye_layers, hidden_size=of.eye_width, intermediate_size=4 * of.eye_width, num_heads=of.eye_heads,
        patch_size=14, out_hidden_size=of.width, deepstack_visual_indexes=[third - 1, 2 * third - 1, 3 * third - 1],
        num_position_embeddings=4096,
    )  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=eye, image_token_id=IMAGE, vision_start_token_id=3)
    config.tie_word_embeddings = True
    with torch.device(device):
        return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype).eval()


def packed_work(shape: Shape) -> Work:
    """One question with its responses behind one prompt."""
    p, r, patches = shape.prompt, shape.response, shape.grid[0] * shape.grid[1]
    pairs = p * (p + 1) // 2 + RESPONSES * (r * p + r * (r + 1) // 2)
    return Work(p + RESPONSES * r, pairs, RESPONSES * r, patches, patches**2)


def separate_work(shape: Shape) -> Work:
    """One question, a sequence a response."""
    length, patches = shape.prompt + shape.response, shape.grid[0] * shape.grid[1]
    return Work(length, length * (length + 1) // 2, shape.response, patches, patches**2).times(RESPONSES)


def step_flops(models: Models, work: Work) -> float:
    """Of one training step. What the chunked head computes a second time is not counted."""
    frozen = sum(forward_flops(model, work) for model in (models.teacher, models.reference))
    return TRAINED * forward_flops(models.student, work) + FORWARD * frozen


def forward_flops(model: VLM, work: Work) -> float:
    """Of the matrix products of a forward pass: two a weight and row that it is applied to, and attention's."""
    merged = model.config.vision_config.spatial_merge_size**2
    rows = {"lm_head": work.states, "merger": work.patches / merged, "visual": work.patches, "": work.tokens}
    products = sum(
        2 * module.weight.numel() * next(count for part, count in rows.items() if part in name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d)
    )
    text, eye = model.config.text_config, model.config.vision_config
    seen = text.num_hidden_layers * text.num_attention_heads * text.head_dim * work.pairs
    return products + 4 * (seen + eye.depth * eye.hidden_size * work.patch_pairs)


def peak_flops(device: str) -> float | None:
    """Of the device in bfloat16; None where it is not known."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


ROWS = {"head": head_rows, "step": step_rows}
