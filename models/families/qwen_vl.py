"""Qwen2.5-VL and Qwen3-VL: M-RoPE, three position axes; a response continues after the prompt's largest position."""

from typing import Any

import torch

from masters.models.families.base import VLM


class QwenVL:
    image_keys = ("pixel_values", "image_grid_thw")

    def prompt_positions(self, model: VLM, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
        positions, _ = model.model.get_rope_index(
            prompt["input_ids"],
            mm_token_type_ids=self.token_inputs(model, prompt["input_ids"])["mm_token_type_ids"],
            image_grid_thw=prompt["image_grid_thw"],
        )
        return positions[:, 0]

    def count_image_tokens(self, config: Any, prompt: dict[str, torch.Tensor]) -> int:
        vision = config.vision_config
        patch_numel = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return prompt["pixel_values"].numel() // patch_numel // vision.spatial_merge_size**2

    def token_inputs(self, model: VLM, ids_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": (ids_BL == model.config.image_token_id).int()}

    def model_positions(self, positions_ABL: torch.Tensor) -> torch.Tensor:
        return positions_ABL
