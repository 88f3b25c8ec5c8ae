"""Tiny random models of every supported family, for tests. No tokenizer: token numbers are made up."""

from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

NAMES = ("qwen3_vl", "qwen2_5_vl", "internvl")
TEXT = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.08,
    bos_token_id=None, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
QWEN_EYE = dict(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=14,
    spatial_merge_size=2, temporal_patch_size=2, initializer_range=0.08,
)  # fmt: skip
QWEN_IDS = dict(vision_start_token_id=3, image_token_id=5, video_token_id=6)


def build(name: str, tied: bool = True) -> tuple[PretrainedConfig, PreTrainedModel]:
    """Configuration and random model of a family; seed torch before. `tied`: lm_head shares the embedding."""
    made = {"qwen3_vl": _qwen3_vl, "qwen2_5_vl": _qwen2_5_vl, "internvl": _internvl}[name](tied)
    return made.config, made.eval()


def _qwen3_vl(tied: bool) -> PreTrainedModel:
    rope = dict(rope_type="default", mrope_section=[8, 4, 4], mrope_interleaved=True)
    text = dict(TEXT, head_dim=32, rope_scaling=rope)
    eye = dict(QWEN_EYE, num_position_embeddings=64, deepstack_visual_indexes=[0])
    config = Qwen3VLConfig(text_config=text, vision_config=eye, tie_word_embeddings=tied, **QWEN_IDS)
    return Qwen3VLForConditionalGeneration(config)


def _qwen2_5_vl(tied: bool) -> PreTrainedModel:
    text = dict(TEXT, rope_scaling=dict(rope_type="default", mrope_section=[4, 6, 6]))
    eye = dict(QWEN_EYE, window_size=56, fullatt_block_indexes=[1])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=eye, tie_word_embeddings=tied, **QWEN_IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def _internvl(tied: bool) -> PreTrainedModel:
    text = dict(TEXT, model_type="qwen2", tie_word_embeddings=tied)
    eye = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=[56, 56],
        patch_size=[14, 14], attention_bias=True, norm_type="layer_norm", initializer_range=0.08,
    )  # fmt: skip
    config = InternVLConfig(
        text_config=text, vision_config=eye, image_token_id=5, image_seq_length=4, downsample_ratio=0.5,
        tie_word_embeddings=tied, vision_feature_layer=-1,
    )  # fmt: skip
    return InternVLForConditionalGeneration(config)
