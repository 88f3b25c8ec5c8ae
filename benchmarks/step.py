"""`python -m benchmarks step`: a training step of one question with eight responses, forward and backward, in float32.

Ours packs the responses behind one prompt and image and reads the vocabulary chunk by chunk. The baselines run eight
sequences through plain transformers, each with its prompt and image, and compute logits at response positions: one with
the same objective (three models: student, teacher, pi_ref), one with TRL's divergence function of student and teacher
alone. Models are random Qwen3-VL, as weights do not change the time.

Shape suffixes: G responses of the group, P prompt tokens, L tokens of prompt and response, R responses of the batch,
U response tokens of the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks.head import trl_loss as trl_divergence
from benchmarks.measure import Row, compare, make_timer
from masters.config import Rewards, Train
from masters.config.presets import section_values
from masters.models.families import family_of
from masters.models.families.base import VLM
from masters.models.losses import chunked_head, formulas
from masters.models.losses.chunked_head import Projection
from masters.models.packing.packed_batch import PackedBatch, pack, response_states
from masters.models.packing.prefix_tree import Question
from masters.models.training import objective

RESPONSES, REPEATS = 8, 3
VOCABULARY, IMAGE_TOKEN = 4096, 4
FAMILY = family_of("qwen3_vl")
# every term, with its reference
TRAIN, REWARDS = (
    Train(**section_values("paper", "train")),
    Rewards(**section_values("paper", "rewards")),
)


@dataclass(frozen=True)
class Shape:
    """A grid of image patches (four make a token), text tokens of the prompt, tokens of each response."""

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


def measure(shapes: tuple[Shape, ...] = SHAPES) -> list[Row]:
    """Return rows of every shape P:R of prompt and response tokens against both baselines."""
    models, rows = make_models(), []
    for shape in shapes:
        question = make_question(shape)
        timer = make_timer(partial(run_step, models, question, packed_loss))
        for name, loss in {"separate": separate_loss, "separate, TRL": trl_loss}.items():
            baseline = make_timer(partial(run_step, models, question, loss))
            rows.append(compare(f"{shape}, {name}", "s", timer, baseline, REPEATS))
    return rows


def make_models() -> Models:
    return Models(make_model(384, 8), make_model(512, 10), make_model(384, 8, seed=1))


def make_model(width: int, layers: int, seed: int = 0) -> VLM:
    """Return a random Qwen3-VL of 28.4M weights at width 384 and 8 layers, of 47.3M at 512 and 10."""
    torch.manual_seed(width + seed)
    text = dict(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        max_position_embeddings=4096,
        rope_scaling=dict(rope_type="default", mrope_section=[12, 10, 10], mrope_interleaved=True),
    )
    vision = dict(
        depth=6,
        hidden_size=256,
        intermediate_size=1024,
        num_heads=4,
        patch_size=14,
        out_hidden_size=width,
        deepstack_visual_indexes=[1, 3, 5],
        num_position_embeddings=1024,
    )
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, vision_start_token_id=3)
    return Qwen3VLForConditionalGeneration(config).eval()


def make_question(shape: Shape, seed: int = 0) -> Question:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(8, VOCABULARY, (shape.words + RESPONSES * shape.response,), generator=generator)
    image = torch.full((shape.prompt - shape.words,), IMAGE_TOKEN)
    prompt = {
        "input_ids": torch.cat([image, words[: shape.words]])[None],
        "pixel_values": torch.randn(shape.grid[0] * shape.grid[1], 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, *shape.grid]]),
    }
    return Question("q", prompt, words[shape.words :].view(RESPONSES, -1).tolist())


Loss = Callable[[Models, Question], torch.Tensor]


def run_step(models: Models, question: Question, loss: Loss) -> None:
    models.student.zero_grad(set_to_none=True)
    loss(models, question).backward()


def packed_loss(models: Models, *questions: Question, row_length: int = 0) -> torch.Tensor:
    batch = pack(list(questions), models.student, FAMILY, row_length)
    with torch.no_grad():
        teacher, reference = (response_states(model, batch) for model in (models.teacher, models.reference))
    student = response_states(models.student, batch)
    return masters_loss(chunked_head.token_terms(student, teacher, batch.token_U, "jsd", reference), batch)


def separate_loss(models: Models, question: Question) -> torch.Tensor:
    with torch.no_grad():
        teacher, reference = (separate_states(model, question).logits() for model in (models.teacher, models.reference))
    student, batch = separate_states(models.student, question).logits(), pack([question], models.student, FAMILY)
    return masters_loss(formulas.token_terms(student, teacher, batch.token_U, "jsd", reference), batch)


def trl_loss(models: Models, question: Question) -> torch.Tensor:
    with torch.no_grad():
        teacher = separate_states(models.teacher, question)
    return trl_divergence(
        separate_states(models.student, question), teacher, torch.tensor(question.responses).flatten()
    )


def separate_states(model: VLM, question: Question) -> Projection:
    """Run plain transformers on a sequence per response, each with prompt and image, as a user would write it."""
    prompt_GP = question.ids_P.expand(RESPONSES, -1)
    ids_GL = torch.cat([prompt_GP, torch.tensor(question.responses)], 1).to(model.device)
    images = {key: torch.cat([question.prompt[key]] * RESPONSES).to(model.device) for key in FAMILY.image_keys}
    hidden_GLH = model.model(
        input_ids=ids_GL,
        attention_mask=torch.ones_like(ids_GL),
        **images,
        **FAMILY.token_inputs(model, ids_GL),
        use_cache=False,
    ).last_hidden_state
    return Projection(hidden_GLH[:, len(question.ids_P) - 1 : -1].flatten(0, 1), model.lm_head.weight)


def masters_loss(terms: formulas.Terms, batch: PackedBatch) -> torch.Tensor:
    """Return the method's loss, with half of the responses correct."""
    score_R = torch.arange(batch.responses) % 2
    return objective.masters_loss(batch.expand(terms), score_R.float(), batch, TRAIN, REWARDS).loss
