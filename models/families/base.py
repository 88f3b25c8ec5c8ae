"""What the packer asks of a family."""

from typing import Any, Protocol

import torch

VLM = Any  # a model of transformers: a torch.nn.Module, whose parts and config a type checker takes for tensors


class Family(Protocol):
    """How prompts with one image are positioned and how image inputs are put together.

    `image_keys` are the processor's outputs that the model takes, concatenated along dimension 0.
    """

    @property
    def image_keys(self) -> tuple[str, ...]: ...

    def prompt_positions(self, model: VLM, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
        """Positions [axes, P] of a prompt's tokens, from the processor's output for it ([1, P] ids)."""
        ...

    def count_image_tokens(self, config: Any, prompt: dict[str, torch.Tensor]) -> int:
        """How many tokens the model that `config` describes makes of the prompt's image."""
        ...

    def token_inputs(self, model: VLM, ids_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        """Further per-token inputs of the model for packed rows."""
        ...

    def model_positions(self, positions_ABL: torch.Tensor) -> torch.Tensor:
        """Positions [axes, B, L] in the shape that the model takes."""
        ...
