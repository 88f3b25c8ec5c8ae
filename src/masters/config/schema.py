"""The configuration: its keys, what each may hold and what they must be together. Imports no torch.

Everything but `[runtime]`, `[nightly]`, `[store]` and `name` is semantic: it takes part in the identity of what is
built.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from masters.common import safe_regex
from masters.config import store_root
from masters.config.fields import MAX_INT, NAME_PATTERN, TEACHER, Count, Dtype, PoolName, Section, Seed, Share, Text
from masters.config.sampling import Sampling
from masters.config.training import Answers, Rewards, Train

MAX_MASK_STAGES = 1000  # of a teacher's mask
MIN_TEMPERATURE = 0.01  # what vLLM would silently make of a temperature between 0 and it
BUILT_IN_SOURCES = ("digits", "easyvqa")  # data.source: data sets that come with installed packages
LOCAL_RAY = "local"  # runtime.ray_address: a Ray of our own
RAY_ADDRESS = r"(local|(\[[0-9A-Fa-f:]{2,39}\]|[A-Za-z0-9][A-Za-z0-9._-]{0,253}):[1-9][0-9]{0,4})"


class Store(Section):
    """Where everything that is built is kept."""

    root: Annotated[Text, AfterValidator(store_root.validate_store_root)] = Field(
        description="Folder or s3://bucket/prefix that holds every artifact"
    )


class Data(Section):
    """The questions: images, questions and answers."""

    source: Text = Field(description="digits, easyvqa, a JSONL or Parquet file, a Parquet or datasets folder, a hub id")
    revision: str | None = Field(default=None, description="Revision of a hub data set")
    train_limit: Count | None = Field(
        default=None, description="At most this many training questions, chosen by content hash"
    )
    eval_limit: Count | None = Field(default=None, description="At most this many evaluation questions")
    validation_share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        default=0.0,
        description='Share of the training images whose questions are held out of training, as split "validation"',
    )
    max_rejected_share: Share = Field(default=0.05, description="The run stops if more of the rows than this are bad")


class Model(Section):
    """A model that transformers and vLLM load."""

    model: Text = Field(description="A folder or a Hugging Face id")
    revision: str | None = Field(default=None, description="Revision of a Hugging Face id")


class Teacher(Model):
    """A teacher and how far it is masked when its round begins."""

    r_max: Share = Field(
        default=0.2,
        description="Mask ratio that training begins with; a multiple of mask_step, 0 leaves the teacher whole",
    )
    mask_step: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.05, description="How much of the mask is taken back from one stage to the next"
    )

    @model_validator(mode="after")
    def _multiple(self) -> "Teacher":
        stages = self.r_max / self.mask_step
        if stages > MAX_MASK_STAGES:
            raise ValueError(
                f"mask_step ({self.mask_step}) takes r_max ({self.r_max}) back in more than {MAX_MASK_STAGES} stages"
            )
        if abs(stages - round(stages)) > 1e-6:
            raise ValueError(f"r_max ({self.r_max}) must be a multiple of mask_step ({self.mask_step})")
        return self


class Mask(Section):
    """Which of a teacher's weights are masked: the smallest by magnitude."""

    granularity: Literal["matrix", "block", "global"] = Field(
        default="matrix", description="Where weights compete to be kept: in their matrix, their block, the whole model"
    )
    exclude: list[Annotated[str, AfterValidator(safe_regex.check_pattern)]] = Field(
        default=[], max_length=100, description="Further tensor name patterns (RE2's syntax) that are never masked"
    )


class Generate(Section):
    """How teachers and student answer the training questions ahead of time."""

    responses: int = Field(
        default=8, ge=1, le=64, description="Responses per question, teacher's and student's together"
    )
    student_share: Share = Field(default=0.5, description="Share of the responses that are the student's own")
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = Field(
        default=1.0, description="Sampling temperature; 0 takes the likeliest token"
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.9, description="Sample from the likeliest tokens that have this probability together"
    )
    top_k: int = Field(
        default=50, ge=0, le=MAX_INT, description="Sample from this many likeliest tokens; 0 keeps every token"
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)] = Field(
        default=1.05, description="Above 1, tokens that were said already become less likely"
    )
    max_tokens: int = Field(default=64, ge=1, le=32768, description="At most this many tokens a response")
    coverage: Literal["partition", "full"] = Field(
        default="partition",
        description="partition: each question is answered at one mask ratio; full: at each of them",
    )
    refresh: Literal["round", "stage"] = Field(
        default="round",
        description="When the student answers. round: all questions before a teacher's round; stage: those of each "
        "mask stage as that stage begins, with the weights that training has reached",
    )
    dtype: Dtype = Field(default="bfloat16", description="Arithmetic of the engines")
    seed: Seed = Field(default=0, description="Of the sampled responses")

    @property
    def student_responses(self) -> int:
        return round(self.responses * self.student_share)

    @property
    def teacher_responses(self) -> int:
        return self.responses - self.student_responses

    @property
    def sampling(self) -> Sampling:
        """The settings that shape a single response."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            max_tokens=self.max_tokens,
            dtype=self.dtype,
            seed=self.seed,
        )

    @model_validator(mode="after")
    def _whole(self) -> "Generate":
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"engines take a temperature of 0 or from {MIN_TEMPERATURE}, found {self.temperature}")
        if abs(self.responses * self.student_share - self.student_responses) > 1e-6:
            raise ValueError(
                f"student_share ({self.student_share}) of {self.responses} responses is not a whole number"
            )
        return self


class Evaluate(Section):
    """What the models are evaluated on."""

    split: Literal["test", "validation"] = Field(
        default="test",
        description="test: the evaluation split; validation: the training images that data.validation_share holds out, "
        "to choose settings by",
    )
    accuracy: Literal["rules", "llm"] = Field(
        default="rules",
        description="Whether an answer is right: by rules (answers.verifier), or judged by the language model that "
        "rewards.judge names",
    )


class Pools(Section):
    """Work pools of Prefect that stages are handed on to; empty: they run in the run's own process."""

    cpu: PoolName = Field(default="", description="For data, mask, and score by rules or by a judge's URL")
    generate: PoolName = Field(default="", description="For generate, evaluate, and score by a model")
    train: PoolName = Field(default="", description="For train")

    @property
    def named(self) -> list[str]:
        """Each once."""
        return sorted({pool for pool in (self.cpu, self.generate, self.train) if pool})


class Runtime(Section):
    """How a run uses the machine. Never part of an artifact's identity."""

    generate_workers: int = Field(
        default=1, ge=1, le=1024, description="Engines at a time; without Ray at most one a model that answers"
    )
    ray_address: str | None = Field(
        default=None,
        pattern=f"^{RAY_ADDRESS}$",
        json_schema_extra={"pattern": rf"^{RAY_ADDRESS}$(?!\n)"},  # as with `Config.name`
        description="Where engines are actors on Ray, also several of one model: local, a Ray of its own on this "
        "machine for the time of a stage; HOST:PORT, the head of a cluster that this machine is a node of",
    )
    engine_gpus: int | None = Field(
        default=None,
        ge=0,
        le=1024,
        description="GPUs that Ray gives an engine. Default: tensor_parallel_size where there are GPUs",
    )
    engine_restarts: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="How often a stage replaces engines on Ray that died, for each of the workers",
    )
    train_processes: int = Field(default=1, ge=1, le=64, description="Training processes, one a device")
    sharding: Literal["replicate", "fsdp2"] = Field(
        default="replicate",
        description="What a training process holds: replicate: all weights; fsdp2: its share of student and teacher",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Compute the student's blocks again in the backward pass instead of keeping their values",
    )
    token_budget: Count = Field(
        default=16_384, description="Tokens of a training forward pass; a step takes as many passes as it needs"
    )
    checkpoint_steps: Count = Field(default=100, description="Optimizer steps between checkpoints")
    engine_memory_gib: Annotated[float, Field(gt=0, le=2**20, allow_inf_nan=False)] = Field(
        default=1.0,
        description="GiB of an engine's cache of keys and values on a CPU; on a GPU vLLM takes what is free",
    )
    max_model_len: int = Field(
        default=2048, ge=16, le=MAX_INT, description="Prompt and response tokens an engine admits"
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, le=1024, description="Devices that an engine spreads a model over"
    )
    heartbeat_timeout_minutes: Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)] = Field(
        default=120.0, description="An engine or trainer that says nothing for so long is ended"
    )
    judge_requests: int = Field(default=16, ge=1, le=1024, description="Requests at a time to a judge's URL")
    judge_timeout: Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)] = Field(
        default=60.0, description="Seconds a request to a judge's URL may take"
    )
    mlflow_uri: str | None = Field(
        default=None, description="Default: MLFLOW_TRACKING_URI, else a SQLite file beside the artifacts"
    )
    pools: Pools = Field(default=Pools(), description="Where stages run")

    @property
    def cluster(self) -> str | None:
        """HOST:PORT of a Ray cluster that somebody else runs."""
        return None if self.ray_address == LOCAL_RAY else self.ray_address


class Nightly(Section):
    """How a night's student is trained and when it becomes champion. Never part of an artifact's identity."""

    start: Literal["student", "champion"] = Field(
        default="student",
        description="student: from the base student on all rows; champion: from the champion on rows new to it",
    )
    p_value: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.05, description="A candidate must be better by a paired one-sided test below this"
    )
    max_category_drop: Share = Field(
        default=0.02, description="How far a category's accuracy may fall below the champion's"
    )


class Config(Section):
    """A distillation, from the data to the student."""

    name: str = Field(
        pattern=f"^{NAME_PATTERN}$",
        # Python's $, by which Prefect's server goes, also stands before a line's end
        json_schema_extra={"pattern": rf"^{NAME_PATTERN}$(?!\n)"},
        description="Of the experiment and the registered model: letters, digits, - and _",
    )
    store: Store
    data: Data
    student: Model = Field(description="The model that is taught")
    teachers: list[Teacher] = Field(min_length=1, description="One round each, in this order")
    mask: Mask = Mask()
    generate: Generate = Generate()
    answers: Answers = Answers()
    rewards: Rewards = Rewards()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    nightly: Nightly = Nightly()
    runtime: Runtime = Runtime()

    @property
    def needs_verdicts(self) -> bool:
        """Whether responses are scored: for their rewards, or to choose the right ones to fine-tune on."""
        train = self.train
        return train.targets == "responses" and train.objective != "kd" and self.rewards.accuracy != "off"

    @property
    def needs_judge(self) -> bool:
        """Whether a language model judges anything: responses, or the answers of an evaluation."""
        return (self.needs_verdicts and self.rewards.accuracy == "llm") or self.evaluate.accuracy == "llm"

    @property
    def probe_split(self) -> Literal["test", "validation"]:
        """The split that training is watched on: the test split only where no validation split is held out."""
        return "validation" if self.data.validation_share else "test"

    @model_validator(mode="after")
    def _evaluable(self) -> "Config":
        if self.evaluate.split == "validation" and not self.data.validation_share:
            raise ValueError('evaluate.split = "validation" needs data.validation_share above 0, e.g. 0.1, found 0')
        if self.evaluate.accuracy == "llm" and self.rewards.judge == TEACHER:
            raise ValueError(
                'evaluate.accuracy = "llm" has all models judged by rewards.judge, and a teacher would judge its own '
                f'answers: expected a folder, a Hugging Face id or a URL in rewards.judge, found "{TEACHER}"'
            )
        return self

    @model_validator(mode="after")
    def _needed(self) -> "Config":
        if self.rewards.accuracy == "off" and self.train.targets == "responses" and self.train.objective == "sft":
            raise ValueError(
                'objective "sft" on responses trains on the right ones: expected rewards.accuracy "llm" or "rules", '
                'found "off"; or set train.targets = "labels"'
            )
        if self.rewards.accuracy == "off" and self.train.control == "shuffled_verdicts":
            raise ValueError(
                'train.control = "shuffled_verdicts" shuffles the verdicts of rewards.accuracy, which is "off"'
            )
        if self.train.objective == "masters" and self.rewards.combine == "gated" and self.rewards.accuracy == "off":
            raise ValueError(
                'rewards.combine = "gated" (also of preset "recommended") multiplies by the accuracy reward, which is '
                '"off": set rewards.combine = "sum"'
            )
        unjudged = self.rewards.accuracy == "off" or self.generate.student_share == 1
        if self.train.objective == "masters" and self.train.balance == "teacher_accuracy" and unjudged:
            raise ValueError(
                'train.balance = "teacher_accuracy" (also of preset "recommended") needs verdicts on responses of the '
                f'teacher: found rewards.accuracy = "{self.rewards.accuracy}", generate.student_share = '
                f'{self.generate.student_share}; set train.balance = "sum"'
            )
        if self.train.objective == "masters" and self.rewards.accuracy == self.rewards.distillation == "off":
            raise ValueError('both rewards are "off": objective "masters" has nothing to reward; use "kd"')
        if self.train.targets == "responses" and self.train.objective == "masters" and self.generate.responses < 2:
            raise ValueError(
                'objective "masters" compares the responses of a question: generate.responses must be >= 2'
            )
        if self.generate.refresh == "stage" and self.train.targets == "labels":
            raise ValueError(
                'generate.refresh = "stage" has the student answer as each mask stage begins, and train.targets = '
                '"labels" learns from no response: set generate.refresh = "round"'
            )
        if self.generate.refresh == "stage" and not self.generate.student_responses:
            raise ValueError(
                'generate.refresh = "stage" has the student answer as each mask stage begins, and '
                "generate.student_share = 0 leaves it no response: raise generate.student_share, or set "
                'generate.refresh = "round"'
            )
        if self.generate.max_tokens >= self.runtime.max_model_len:
            raise ValueError(
                f"generate.max_tokens ({self.generate.max_tokens}) leaves no room for a prompt in "
                f"runtime.max_model_len ({self.runtime.max_model_len})"
            )
        return self
