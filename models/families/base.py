"""The interface of a model family, as packing uses it.

Shapes: P prompt tokens, B rows, L packed length, A position axes.
"""

from typing import Any, Protocol

import torch

VLM = Any  # a transformers model; a type checker would take the parts and the config of a torch.nn.Module for tensors


class Family(Protocol):
    """The positions of prompts with one image, and the image tensors that the model takes.

    `image_keys`: names of the processor's image tensors, which are concatenated along dimension 0.
    """

    @property
    def image_keys(self) -> tuple[str, ...]: ...

    def prompt_positions(self, model: VLM, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the positions [A, P] of a prompt's tokens, from the processor's output (ids are [1, P])."""
        ...

    def count_image_tokens(self, config: Any, prompt: dict[str, torch.Tensor]) -> int:
        """Return the number of tokens that the model with this `config` makes of the prompt's image."""
        ...

    def token_inputs(self, model: VLM, ids_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return further per-token inputs of the model, [B, L] each."""
        ...

    def model_positions(self, positions_ABL: torch.Tensor) -> torch.Tensor:
        """Return positions [A, B, L] in the shape that the model takes."""
        ...
