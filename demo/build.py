"""The demo's two Qwen3-VL models before training, with a small tokenizer and the family's processor."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

PATCH = 8
SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "teacher": dict(width=128, inner=384, layers=4, heads=4, kv=2, eye=128, eye_inner=256, eye_layers=4, stack=[1, 2]),
    "middle": dict(width=96, inner=256, layers=3, heads=3, kv=1, eye=96, eye_inner=192, eye_layers=3, stack=[1]),
    "student": dict(width=64, inner=192, layers=3, heads=2, kv=1, eye=64, eye_inner=128, eye_layers=3, stack=[1]),
    # never shown an image
    "judge": dict(width=128, inner=320, layers=4, heads=4, kv=2, eye=32, eye_inner=32, eye_layers=1, stack=[0]),
}


def tokenizer(texts: list[str], entries: int = 512) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of at most `entries` learned from `texts`; it can write any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        sorted(set(texts)), trainers.BpeTrainer(vocab_size=entries, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
    fast.add_special_tokens(
        {"additional_special_tokens": [s for s in SPECIALS if s not in ("<|im_end|>", "<|endoftext|>")]}
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def processor(text: PreTrainedTokenizerFast) -> Qwen3VLProcessor:
    """Return the family's processor: every image is scaled to an area of 64 x 64 pixels, 16 image tokens."""
    patches = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    area = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=area, **patches),
        tokenizer=text,
        video_processor=Qwen3VLVideoProcessor(size=area, **patches),
        chat_template=CHAT_TEMPLATE,
    )


def model(size: str, text: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """Return a random model of SIZES[size]; seed torch before."""
    s = SIZES[size]
    ids = {name: text.convert_tokens_to_ids(name) for name in SPECIALS}
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(text), hidden_size=s["width"], intermediate_size=s["inner"], num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"], num_key_value_heads=s["kv"], head_dim=32, max_position_embeddings=2048,
            rope_scaling=dict(rope_type="default", mrope_section=[8, 4, 4], mrope_interleaved=True),
            initializer_range=0.05,
        ),
        vision_config=dict(
            depth=s["eye_layers"], hidden_size=s["eye"], intermediate_size=s["eye_inner"], num_heads=s["eye"] // 32,
            out_hidden_size=s["width"], patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2,
            num_position_embeddings=64, deepstack_visual_indexes=s["stack"], initializer_range=0.05,
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    built = Qwen3VLForConditionalGeneration(config)
    built.generation_config.eos_token_id = ids["<|im_end|>"]
    built.generation_config.pad_token_id = ids["<|endoftext|>"]
    return built


def save(built: Qwen3VLForConditionalGeneration, text: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder that transformers and vLLM load as it is, weights in bfloat16."""
    import copy

    import torch

    copy.deepcopy(built).to(torch.bfloat16).save_pretrained(folder)
    processor(text).save_pretrained(folder)
    text.save_pretrained(folder)
