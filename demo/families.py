"""Tiny random models of every supported family, teacher and student, as folders that transformers and vLLM load.

They answer nothing sensible; they show that a family goes through the whole pipeline. A family is a row of `ROWS`:
its special tokens, its configuration and its processor.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

PATCH = 14  # pixels; 2 x 2 patches make an image token
TURNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN = (*TURNS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
INTERN = (*TURNS, "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
INTERN_NAMES = dict(zip(("start_image", "end_image", "context_image", "video"), INTERN[3:], strict=True))
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """`heads` of 32 numbers each in the text model and the eye; one key-value head."""

    heads: int
    layers: int
    eye_heads: int
    eye_layers: int


SIZES = {"student": Size(2, 2, 1, 2), "teacher": Size(3, 3, 2, 3)}


@dataclass(frozen=True)
class Row:
    """A family: its special tokens (they get the first ids), how its prompts write an image, how it is made."""

    specials: tuple[str, ...]
    image: str
    config: Callable[[Size, dict[str, Any]], PretrainedConfig]
    processor: Callable[[PreTrainedTokenizerFast], ProcessorMixin]
    named_tokens: dict[str, str] = field(default_factory=dict)


def build(
    name: str, tied: bool = True, size: str = "student", vocabulary: int = 128
) -> tuple[PretrainedConfig, PreTrainedModel]:
    """Return configuration and random model of a family; seed torch before. `tied`: lm_head shares the embedding."""
    measure = SIZES[size]
    text = dict(
        vocab_size=vocabulary, hidden_size=32 * measure.heads, intermediate_size=48 * measure.heads,
        num_hidden_layers=measure.layers, num_attention_heads=measure.heads, num_key_value_heads=1,
        max_position_embeddings=512, initializer_range=0.08, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=TURNS.index("<|im_end|>"), pad_token_id=TURNS.index("<|endoftext|>"),
    )  # fmt: skip
    config = ROWS[name].config(measure, text)
    made = AutoModelForImageTextToText.from_config(config)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = text["eos_token_id"], 0
    return config, made.eval()


def save(
    name: str, folder: Path, texts: list[str], size: str = "student", tied: bool = True, padding: int = 0, seed: int = 0
) -> Path:
    """Write a whole model folder, weights in bfloat16; the same `texts` give the same tokenizer.

    `padding`: rows of the embedding matrix beyond the tokenizer's entries.
    """
    tokenizer = _tokenizer(ROWS[name], texts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _, made = build(name, tied, size, len(tokenizer) + padding)
    made.to(torch.bfloat16).save_pretrained(folder)
    ROWS[name].processor(tokenizer).save_pretrained(folder)
    return folder


def _tokenizer(row: Row, texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of at most 400 entries learned from `texts`; it can write any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(row.specials), initial_alphabet=alphabet)
    bpe.train_from_iterator(sorted(set(texts)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512,
        extra_special_tokens={f"{key}_token": token for key, token in row.named_tokens.items()},
        chat_template=CHAT_TEMPLATE.replace("IMAGE", row.image),
    )  # fmt: skip


def _qwen_eye(size: Size, text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return dict(
        depth=size.eye_layers, hidden_size=32 * size.eye_heads, intermediate_size=48 * size.eye_heads,
        num_heads=size.eye_heads, out_hidden_size=text["hidden_size"], patch_size=PATCH, spatial_merge_size=2,
        temporal_patch_size=2, initializer_range=0.08, **more,
    )  # fmt: skip


def _qwen_ids(text: dict[str, Any]) -> dict[str, Any]:
    ids = {token.strip("<|>"): number for number, token in enumerate(QWEN)}
    return dict(
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=text["tie_word_embeddings"],
    )  # fmt: skip


def _qwen2_5_vl(size: Size, text: dict[str, Any]) -> PretrainedConfig:
    text = dict(text, rope_scaling=dict(rope_type="default", mrope_section=[4, 6, 6]))
    eye = _qwen_eye(size, text, window_size=4 * PATCH, fullatt_block_indexes=[1])
    return Qwen2_5_VLConfig(text_config=text, vision_config=eye, **_qwen_ids(text))


def _qwen3_vl(size: Size, text: dict[str, Any]) -> PretrainedConfig:
    rope = dict(rope_type="default", mrope_section=[8, 4, 4], mrope_interleaved=True)
    text = dict(text, head_dim=32, rope_scaling=rope)
    eye = _qwen_eye(size, text, num_position_embeddings=64, deepstack_visual_indexes=list(range(size.eye_layers - 1)))
    return Qwen3VLConfig(text_config=text, vision_config=eye, **_qwen_ids(text))


def _internvl(text_type: str, **more: Any) -> Callable[[Size, dict[str, Any]], PretrainedConfig]:
    def config(size: Size, text: dict[str, Any]) -> PretrainedConfig:
        eye = dict(
            hidden_size=32 * size.eye_heads, num_hidden_layers=size.eye_layers, num_attention_heads=size.eye_heads,
            intermediate_size=48 * size.eye_heads, image_size=[4 * PATCH] * 2, patch_size=[PATCH] * 2,
            attention_bias=True, norm_type="layer_norm", initializer_range=0.08,
        )  # fmt: skip
        return InternVLConfig(
            text_config=dict(text, model_type=text_type, **more), vision_config=eye, downsample_ratio=0.5,
            image_token_id=INTERN.index("<IMG_CONTEXT>"), image_seq_length=4, vision_feature_layer=-1,
            tie_word_embeddings=text["tie_word_embeddings"],
        )  # fmt: skip

    return config


def _qwen_processor(kind: type, video: type) -> Callable[[PreTrainedTokenizerFast], ProcessorMixin]:
    """Return a function that makes a processor with 4 to 16 tokens per image."""

    def processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        patches = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
        area = {"shortest_edge": (4 * PATCH) ** 2, "longest_edge": (8 * PATCH) ** 2}
        return kind(
            image_processor=Qwen2VLImageProcessor(size=area, **patches), tokenizer=tokenizer,
            video_processor=video(size=area, **patches), chat_template=tokenizer.chat_template,
        )  # fmt: skip

    return processor


def _intern_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """Make a processor with up to three tiles of 4 tokens, and with several tiles a further one of the whole image."""
    tile = dict(height=4 * PATCH, width=4 * PATCH)
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=tile, min_patches=1, max_patches=3), tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=tile), image_seq_length=4, chat_template=tokenizer.chat_template,
    )  # fmt: skip


QWEN_IMAGE, INTERN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n"
ROWS = {
    "qwen2_5_vl": Row(QWEN, QWEN_IMAGE, _qwen2_5_vl, _qwen_processor(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)),
    "qwen3_vl": Row(QWEN, QWEN_IMAGE, _qwen3_vl, _qwen_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor)),
    "internvl3": Row(INTERN, INTERN_IMAGE, _internvl("qwen2"), _intern_processor, INTERN_NAMES),
    "internvl3_5": Row(INTERN, INTERN_IMAGE, _internvl("qwen3", head_dim=32), _intern_processor, INTERN_NAMES),
}
NAMES = tuple(ROWS)
