"""`python -m benchmarks step`: a training step of one question with eight responses, forward and backward, in float32.

Ours packs the responses behind one prompt and image and reads the vocabulary chunk by chunk. Baselines take eight
sequences through plain transformers, each with its prompt and image, and logits at response positions: with the same
objective (three models: student, teacher, pi_ref), and with TRL's divergence function of student and teacher alone.
Models are random Qwen3-VL: what they say does not matter to how long it takes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks.head import trl
from benchmarks.measure import Row, compare, seconds
from masters.config import Rewards, Train
from masters.models.families import family_of
from masters.models.families.base import VLM
from masters.models.losses import chunked_head, formulas
from masters.models.losses.chunked_head import Projection
from masters.models.packing.packed_batch import PackedBatch, pack, response_states
from masters.models.packing.prefix_tree import Question
from masters.models.training import objective

RESPONSES, REPEATS = 8, 3
VOCABULARY, IMAGE = 4096, 4  # IMAGE: the image's token
FAMILY = family_of("qwen3_vl")
REWARDS = Rewards()


@dataclass(frozen=True)
class Shape:
    """A grid of image patches (four make a token), words of the question, tokens of each response."""

    grid: tuple[int, int]
    words: int
    response: int

    @property
    def prompt(self) -> int:
        return self.grid[0] * self.grid[1] // 4 + self.words

    def __str__(self) -> str:
        return f"{self.prompt}:{self.response}"


SHAPES = (Shape((36, 28), 31, 32), Shape((18, 14), 28, 32), Shape((36, 28), 31, 64), Shape((64, 62), 32, 128))


@dataclass(frozen=True)
class Models:
    student: VLM
    teacher: VLM
    reference: VLM  # pi_ref


def measured(shapes: tuple[Shape, ...] = SHAPES) -> list[Row]:
    """Rows of every shape P:R of prompt and response tokens against both baselines."""
    models, rows = random_models(), []
    for shape in shapes:
        asked = question(shape)
        ours = seconds(partial(step, models, asked, packed_loss))
        for name, way in {"separate": separate_loss, "separate, TRL": trl_loss}.items():
            baseline = seconds(partial(step, models, asked, way))
            rows.append(compare(f"{shape}, {name}", "s", ours, baseline, REPEATS))
    return rows


def random_models() -> Models:
    return Models(model(384, 8), model(512, 10), model(384, 8, seed=1))


def model(width: int, layers: int, seed: int = 0) -> VLM:
    """A random Qwen3-VL of 28.4M weights at width 384 and 8 layers, of 47.3M at 512 and 10."""
    torch.manual_seed(width + seed)
    text = dict(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, head_dim=64, max_position_embeddings=4096,
        rope_scaling=dict(rope_type="default", mrope_section=[12, 10, 10], mrope_interleaved=True),
    )  # fmt: skip
    eye = dict(
        depth=6, hidden_size=256, intermediate_size=1024, num_heads=4, patch_size=14, out_hidden_size=width,
        deepstack_visual_indexes=[1, 3, 5], num_position_embeddings=1024,
    )  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=eye, image_token_id=IMAGE, vision_start_token_id=3)
    return Qwen3VLForConditionalGeneration(config).eval()


def question(shape: Shape, seed: int = 0) -> Question:
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(8, VOCABULARY, (shape.words + RESPONSES * shape.response,), generator=draw)
    image = torch.full((shape.prompt - shape.words,), IMAGE)
    prompt = {
        "input_ids": torch.cat([image, words[: shape.words]])[None],
        "pixel_values": torch.randn(shape.grid[0] * shape.grid[1], 3 * 2 * 14 * 14, generator=draw),
        "image_grid_thw": torch.tensor([[1, *shape.grid]]),
    }
    return Question("q", prompt, words[shape.words :].view(RESPONSES, -1).tolist())


Loss = Callable[[Models, Question], torch.Tensor]


def step(models: Models, asked: Question, loss: Loss) -> None:
    models.student.zero_grad(set_to_none=True)
    loss(models, asked).backward()


def packed_loss(models: Models, *asked: Question, row: int = 0) -> torch.Tensor:
    batch = pack(list(asked), models.student, FAMILY, row)
    with torch.no_grad():
        taught, known = (response_states(frozen, batch) for frozen in (models.teacher, models.reference))
    states = response_states(models.student, batch)
    return _objective(chunked_head.terms(states, taught, batch.token_U, "jsd", known), batch)


def separate_loss(models: Models, asked: Question) -> torch.Tensor:
    with torch.no_grad():
        taught, known = (separate_states(frozen, asked).logits() for frozen in (models.teacher, models.reference))
    logits, batch = separate_states(models.student, asked).logits(), pack([asked], models.student, FAMILY)
    return _objective(formulas.terms(logits, taught, batch.token_U, "jsd", known), batch)


def trl_loss(models: Models, asked: Question) -> torch.Tensor:
    with torch.no_grad():
        taught = separate_states(models.teacher, asked)
    return trl(separate_states(models.student, asked), taught, torch.tensor(asked.responses).flatten())


def separate_states(model: VLM, asked: Question) -> Projection:
    """As one writes it with plain transformers: a sequence a response, each with prompt and image."""
    prompt_GP = asked.ids_P.expand(RESPONSES, -1)
    ids_GL = torch.cat([prompt_GP, torch.tensor(asked.responses)], 1)
    ids_GL = ids_GL.to(model.device)
    images = {key: torch.cat([asked.prompt[key]] * RESPONSES).to(model.device) for key in FAMILY.image_keys}
    kinds = FAMILY.token_inputs(model, ids_GL)
    hidden = model.model(input_ids=ids_GL, attention_mask=torch.ones_like(ids_GL), **images, **kinds, use_cache=False)
    return Projection(hidden.last_hidden_state[:, len(asked.ids_P) - 1 : -1].flatten(0, 1), model.lm_head.weight)


def _objective(terms: formulas.Terms, batch: PackedBatch) -> torch.Tensor:
    """The method's loss: half of the responses right."""
    terms = batch.spread(terms)
    score_R = torch.arange(batch.responses) % 2
    return objective.masters_loss(terms, score_R.float(), batch, Train(), REWARDS).loss
