"""Parameters of a request to a judge's server: OpenAI-compatible servers do not all take the same ones."""

from itertools import product
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from masters.rewards.judge_prompts import Conversation, merge_system_turn

TokenParameter = Literal["max_tokens", "max_completion_tokens"]


class RequestStyle(BaseModel):
    """The parameters of a request that a server takes.

    `temperature`: whether it takes one; it is then 0. `system`: whether it takes a system turn; otherwise that text
    begins the user's turn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_parameter: TokenParameter = "max_tokens"
    temperature: bool = True
    system: bool = True

    def parameters(self, conversation: Conversation, max_tokens: int) -> dict[str, Any]:
        """Return the parameters of a request, except the model."""
        messages = conversation if self.system else merge_system_turn(conversation)
        sampling = {"temperature": 0} if self.temperature else {}
        return {"messages": messages, self.token_parameter: max_tokens} | sampling

    def __str__(self) -> str:
        temperature = "temperature 0" if self.temperature else "no temperature"
        return f"{self.token_parameter}, {temperature}, {'a' if self.system else 'no'} system turn"


# the usual style first, then those that differ more and more from it
STYLES = [
    RequestStyle(token_parameter=token_parameter, temperature=temperature, system=system)
    for system, temperature, token_parameter in product(
        (True, False), (True, False), ("max_tokens", "max_completion_tokens")
    )
]
