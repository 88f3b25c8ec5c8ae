"""Jobs of the judging processes. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from masters.execution.engines import EngineJob, EnginePiece, EngineSetup
from masters.rewards.judge_prompts import TokenLimits
from masters.rewards.judge_request import RequestStyle
from masters.rewards.verdict import Triple


class ServerEndpoint(BaseModel):
    """A judge behind the URL of an OpenAI-compatible server; `model` None takes the first that the server lists.

    `style`: the parameters that the server takes; None if it was not asked yet.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["server"] = "server"
    url: str
    model: str | None
    style: RequestStyle | None = None


class EngineEndpoint(BaseModel):
    """A judge in an engine of this project, on the unmasked weights of a model folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["engine"] = "engine"
    folder: Path
    dtype: str
    trust_remote_code: bool


JudgeEndpoint = Annotated[ServerEndpoint | EngineEndpoint, Field(discriminator="kind")]


class JudgeSetup(EngineSetup):
    """`is_proven`: the judge has given verdicts before, so that it is asked about all texts at once."""

    model_config = ConfigDict(extra="forbid")

    endpoint: JudgeEndpoint
    limits: TokenLimits
    is_proven: bool


class JudgeBatch(EnginePiece):
    """Triples to judge together; `out` gets the final verdicts."""

    model_config = ConfigDict(extra="forbid")

    triples: tuple[Triple, ...]


class JudgeJob(EngineJob):
    setup: JudgeSetup
    pieces: tuple[JudgeBatch, ...]
