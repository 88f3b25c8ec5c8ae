"""InternVL3 and InternVL3.5 in transformers' format: one axis of consecutive positions."""

from typing import Any

import torch

from masters.models.families.base import VLM


class InternVL:
    image_keys = ("pixel_values",)

    def prompt_positions(self, model: VLM, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.arange(prompt["input_ids"].shape[1])[None]

    def count_image_tokens(self, config: Any, prompt: dict[str, torch.Tensor]) -> int:
        tiles, _, *sides = prompt["pixel_values"].shape
        rows, columns = (
            int(side // patch * config.downsample_ratio)
            for side, patch in zip(sides, config.vision_config.patch_size, strict=True)
        )
        return tiles * rows * columns

    def token_inputs(self, model: VLM, ids_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def model_positions(self, positions_ABL: torch.Tensor) -> torch.Tensor:
        return positions_ABL[0]
