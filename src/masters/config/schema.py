"""The configuration: its keys, the values each may have, and the rules between them. Imports no torch.

All keys except `[runtime]`, `[nightly]`, `[store]` and `name` are semantic: they are part of the identity of what is
built.
"""

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from masters.common import safe_regex
from masters.config import store_root
from masters.config.fields import (
    MAX_INT,
    NAME_PATTERN,
    TEACHER,
    Count,
    Dtype,
    ModelName,
    PoolName,
    Section,
    Seed,
    Share,
    Text,
    Truncated,
)
from masters.config.judge_url import is_url
from masters.config.sampling import MAX_TEMPERATURE, MIN_TEMPERATURE, Sampling
from masters.config.training import Answers, Rewards, Train

MAX_MASK_STAGES = 1000
BUILT_IN_SOURCES = ("digits", "captions", "easyvqa")  # data.source: data sets that come with installed packages
LOCAL_RAY = "local"  # runtime.ray_address: a Ray cluster started on this machine for the run
RAY_ADDRESS = r"(local|(\[[0-9A-Fa-f:]{2,39}\]|[A-Za-z0-9][A-Za-z0-9._-]{0,253}):[1-9][0-9]{0,4})"
# In Python, and so in Prefect's server, $ also matches before a newline at the end: schemas exclude that.
NO_NEWLINE = r"(?!\n)"


class Store(Section):
    """The store, which keeps everything that is built."""

    root: Annotated[Text, AfterValidator(store_root.validate_store_root)] = Field(
        description="Folder or s3://bucket/prefix for all artifacts"
    )


class Data(Section):
    """The data set: images, questions and answers."""

    source: Text = Field(
        description="digits, captions, easyvqa, a JSONL or Parquet file, a folder with Parquet files, a saved datasets "
        "folder, or a Hugging Face id"
    )
    revision: str | None = Field(default=None, description="Revision of a Hugging Face data set")
    train_limit: Count | None = Field(
        default=None, description="Maximum number of training questions, chosen by content hash"
    )
    eval_limit: Count | None = Field(default=None, description="Maximum number of evaluation questions")
    validation_share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        default=0.0,
        description='Share of the training images whose questions are held out of training as split "validation"',
    )
    max_rejected_share: Share = Field(
        default=0.05, description="The run stops if more than this share of the rows is rejected"
    )
    max_leaked_share: Share = Field(
        default=1.0,
        description="The run stops if more than this share of the evaluation questions shows an image that training "
        "also shows. Below it there is a warning. 0: no image may be in both",
    )
    fetch_images: bool = Field(
        default=False, description="Download images that rows name by an http(s) URL, once to this machine's cache"
    )


class Model(Section):
    """A model that transformers and vLLM can load."""

    model: ModelName = Field(description="A folder or a Hugging Face id")
    revision: str | None = Field(default=None, description="Revision of a Hugging Face model")


class Teacher(Model):
    """A teacher and its mask schedule."""

    r_max: Share = Field(
        default=0.2,
        description="Mask ratio at the beginning of training, a multiple of mask_step. 0: the teacher is not masked",
    )
    mask_step: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.05, description="How much the mask ratio falls from one mask stage to the next"
    )

    @model_validator(mode="after")
    def _check_schedule(self) -> "Teacher":
        stages = self.r_max / self.mask_step
        if stages > MAX_MASK_STAGES:
            raise ValueError(
                f"mask_step ({self.mask_step}) divides r_max ({self.r_max}) into more than {MAX_MASK_STAGES} stages"
            )
        if abs(stages - round(stages)) > 1e-6:
            raise ValueError(f"r_max ({self.r_max}) must be a multiple of mask_step ({self.mask_step})")
        return self


class Mask(Section):
    """Choice of the teacher's weights to mask: those with the smallest magnitude."""

    granularity: Literal["matrix", "block", "global"] = Field(
        default="matrix",
        description="Where the mask ratio applies. matrix: to each weight matrix; block: to each transformer block; "
        "global: to the whole model",
    )
    exclude: list[Annotated[str, AfterValidator(safe_regex.check_pattern)]] = Field(
        default=[],
        max_length=100,
        description="Patterns (RE2 syntax) of names of further tensors that are never masked",
    )


class Generate(Section):
    """Sampling of the responses of teachers and student before training."""

    responses: int = Field(
        default=8, ge=1, le=64, description="Responses per question, those of teacher and student together"
    )
    student_share: Share = Field(default=0.5, description="Share of the responses that the student gives")
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)] = Field(
        default=1.0, description="Sampling temperature. 0: greedy decoding, one response of each model to a question"
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.9, description="Sample from the most likely tokens with this cumulative probability"
    )
    top_k: int = Field(
        default=50, ge=0, le=MAX_INT, description="Sample from this many of the most likely tokens. 0: from all tokens"
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)] = Field(
        default=1.05, description="Above 1, tokens that have appeared before become less likely"
    )
    max_tokens: int = Field(default=64, ge=1, le=32768, description="Maximum number of tokens in a response")
    coverage: Literal["partition", "full"] = Field(
        default="partition",
        description="partition: each question is answered at one mask ratio; full: at each mask ratio",
    )
    refresh: Literal["round", "stage"] = Field(
        default="round",
        description="When the student answers. round: all questions before a teacher's round; stage: the questions of "
        "each mask stage when that stage begins, with the weights trained so far",
    )
    truncated: Truncated = Field(
        default="mask",
        description="What training does with responses that max_tokens cut off. mask: they are scored and count in the "
        "rewards of their group, but add nothing to the loss; drop: they also leave the group; keep: nothing special",
    )
    dtype: Dtype = Field(default="bfloat16", description="Data type that the engines compute in")
    seed: Seed = Field(default=0, description="Random seed of the sampled responses")

    @property
    def student_responses(self) -> int:
        return round(self.responses * self.student_share)

    @property
    def teacher_responses(self) -> int:
        return self.responses - self.student_responses

    @property
    def sampling(self) -> Sampling:
        """The settings that shape a single response."""
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})

    @model_validator(mode="after")
    def _check_sampling(self) -> "Generate":
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature must be 0 or at least {MIN_TEMPERATURE}, found {self.temperature}")
        if abs(self.responses * self.student_share - self.student_responses) > 1e-6:
            raise ValueError(
                f"student_share ({self.student_share}) of {self.responses} responses is not a whole number"
            )
        return self


class Evaluate(Section):
    """Evaluation of teachers and student."""

    split: Literal["test", "validation"] = Field(
        default="test",
        description="test: the evaluation split; validation: the questions that data.validation_share holds out of "
        "training, to choose settings with",
    )
    accuracy: Literal["rules", "llm"] = Field(
        default="rules",
        description="How an answer is judged. rules: by answers.verifier; llm: by the language model in rewards.judge",
    )


class Pools(Section):
    """Prefect work pools that run stages. Empty: the stage runs in the process of the run itself."""

    cpu: PoolName = Field(
        default="", description="Work pool for data, mask, and score (by rules or by the URL of a judge)"
    )
    generate: PoolName = Field(default="", description="Work pool for generate, evaluate, and score (by a model)")
    train: PoolName = Field(default="", description="Work pool for train")

    @property
    def names(self) -> list[str]:
        """The names of all pools, without duplicates."""
        return sorted({pool for pool in (self.cpu, self.generate, self.train) if pool})


class Runtime(Section):
    """Use of the machine by a run. Never part of an artifact's identity."""

    generate_workers: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Number of engines that run at the same time. Without Ray, each model has at most one",
    )
    ray_address: str | None = Field(
        default=None,
        pattern=f"^{RAY_ADDRESS}$",
        json_schema_extra={"pattern": rf"^{RAY_ADDRESS}${NO_NEWLINE}"},
        description="Run engines as Ray actors, also several per model. local: on a Ray cluster started on this "
        "machine for the duration of a stage; HOST:PORT: the head of a cluster that this machine belongs to",
    )
    engine_gpus: int | None = Field(
        default=None,
        ge=0,
        le=1024,
        description="GPUs that Ray assigns to each engine. Default: tensor_parallel_size if there are GPUs",
    )
    engine_restarts: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="How often a stage may restart engines that died on Ray, per engine in generate_workers",
    )
    train_processes: int = Field(default=1, ge=1, le=64, description="Number of training processes, one per device")
    sharding: Literal["replicate", "fsdp2"] = Field(
        default="replicate",
        description="What each training process holds. replicate: all weights; fsdp2: a shard of student and teacher",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Recompute the activations of the student's blocks in the backward pass instead of storing them",
    )
    token_budget: Count = Field(
        default=16_384,
        description="Maximum number of tokens in a forward pass of training. A step takes as many passes as it needs",
    )
    checkpoint_steps: Count = Field(default=100, description="Optimizer steps between checkpoints")
    engine_memory_gib: Annotated[float, Field(gt=0, le=2**20, allow_inf_nan=False)] = Field(
        default=1.0,
        description="Size of an engine's KV cache on a CPU in GiB. On a GPU, vLLM takes the free memory",
    )
    max_model_len: int = Field(
        default=2048,
        ge=16,
        le=MAX_INT,
        description="Maximum number of tokens that an engine accepts, prompt and response together",
    )
    tensor_parallel_size: int = Field(default=1, ge=1, le=1024, description="Number of devices per engine")
    heartbeat_timeout_minutes: Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)] = Field(
        default=120.0, description="Minutes without progress after which an engine or trainer is ended"
    )
    judge_requests: int = Field(default=16, ge=1, le=1024, description="Concurrent requests to a judge's URL")
    judge_timeout: Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)] = Field(
        default=60.0, description="Timeout of a request to a judge's URL in seconds"
    )
    mlflow_uri: str | None = Field(
        default=None,
        description="MLflow tracking URI. Default: MLFLOW_TRACKING_URI, otherwise that of the store's first run, "
        "otherwise a SQLite file beside the artifacts",
    )
    pools: Pools = Field(default=Pools(), description="Prefect work pools that run stages")

    @property
    def cluster(self) -> str | None:
        """HOST:PORT of an existing Ray cluster, if the configuration names one."""
        return None if self.ray_address == LOCAL_RAY else self.ray_address

    @property
    def kv_cache_gib(self) -> int:
        """Size of an engine's KV cache on a CPU in GiB: vLLM takes whole numbers."""
        return max(1, round(self.engine_memory_gib))

    def context_length(self, positions: int) -> int:
        """Return the most tokens, prompt and response together, that an engine takes of a model with `positions`."""
        return min(self.max_model_len, positions)


class Nightly(Section):
    """Training and promotion of a night's student. Never part of an artifact's identity."""

    start: Literal["student", "champion"] = Field(
        default="student",
        description="Which model is trained. student: the base student, on all rows; champion: the champion, on the "
        "rows that are new to it",
    )
    p_value: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.05, description="The candidate is promoted if a paired one-sided test gives a p-value below this"
    )
    max_category_drop: Share = Field(
        default=0.02, description="How far the accuracy in a category may fall below the champion's"
    )


class Config(Section):
    """A distillation, from the data to the student."""

    name: str = Field(
        pattern=f"^{NAME_PATTERN}$",
        json_schema_extra={"pattern": rf"^{NAME_PATTERN}${NO_NEWLINE}"},
        description="Name of the experiment and of the registered model: letters, digits, - and _",
    )
    store: Store
    data: Data
    student: Model = Field(description="The model that is trained")
    teachers: list[Teacher] = Field(min_length=1, description="The teachers, one round each, in this order")
    mask: Mask = Mask()
    generate: Generate = Generate()
    answers: Answers = Answers()
    rewards: Rewards = Rewards()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    nightly: Nightly = Nightly()
    runtime: Runtime = Runtime()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_sums(cls, values: object) -> object:
        """Sum rewards and losses by default where there are no verdicts to gate or weight them with."""
        if not isinstance(values, dict):
            return values
        rewards, train, generate = (values.get(name, {}) for name in ("rewards", "train", "generate"))
        if not all(isinstance(section, dict) for section in (rewards, train, generate)):
            return values
        has_verdicts = rewards.get("accuracy") != "off"
        if not has_verdicts:
            rewards = {"combine": "sum", **rewards}
        if not has_verdicts or generate.get("student_share") == 1:
            train = {"balance": "sum", **train}
        return {**values, "rewards": rewards, "train": train}

    @property
    def needs_verdicts(self) -> bool:
        """Whether responses are scored, for their rewards or to select the right ones for fine-tuning."""
        train = self.train
        return train.targets == "responses" and train.objective != "kd" and self.rewards.accuracy != "off"

    @property
    def needs_judge(self) -> bool:
        """Whether a language model judges responses or the answers of an evaluation."""
        return (self.needs_verdicts and self.rewards.accuracy == "llm") or self.evaluate.accuracy == "llm"

    @property
    def probe_split(self) -> Literal["test", "validation"]:
        """The split that measures progress during training: the test split only if there is no validation split."""
        return "validation" if self.data.validation_share else "test"

    @model_validator(mode="after")
    def _check_evaluation(self) -> "Config":
        if self.evaluate.split == "validation" and not self.data.validation_share:
            raise ValueError('evaluate.split = "validation" needs data.validation_share above 0, e.g. 0.1, found 0')
        if self.evaluate.accuracy == "llm" and self.rewards.judge == TEACHER:
            raise ValueError(
                'evaluate.accuracy = "llm" has rewards.judge judge all models, and a teacher would judge its own '
                f'answers: expected a folder, a Hugging Face id or a URL in rewards.judge, found "{TEACHER}"'
            )
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> "Config":
        rewards, train = self.rewards, self.train
        if rewards.accuracy == "off" and train.targets == "responses" and train.objective == "sft":
            raise ValueError(
                'objective "sft" trains on the right responses: expected rewards.accuracy "llm" or "rules", '
                'found "off"; or set train.targets = "labels"'
            )
        if rewards.accuracy == "off" and train.control == "shuffled_verdicts":
            raise ValueError(
                'train.control = "shuffled_verdicts" shuffles the verdicts of rewards.accuracy, which is "off"'
            )
        if train.objective != "masters":
            return self
        if rewards.accuracy == "off" and not (rewards.combine == train.balance == "sum"):
            raise ValueError(
                'rewards.accuracy = "off" gives no verdicts, which rewards.combine = "gated" and train.balance = '
                '"teacher_accuracy" need: set both to "sum"'
            )
        if train.balance == "teacher_accuracy" and self.generate.student_share == 1:
            raise ValueError(
                'train.balance = "teacher_accuracy" weights by the share of right responses of the '
                'teacher, which generate.student_share = 1 leaves without responses: set train.balance = "sum"'
            )
        if rewards.accuracy == rewards.distillation == "off":
            raise ValueError('both rewards are "off": objective "masters" has nothing to reward; use "kd"')
        return self

    @model_validator(mode="after")
    def _check_greedy_sampling(self) -> "Config":
        teacher, student = self.generate.teacher_responses, self.generate.student_responses
        if self.train.targets == "responses" and self.generate.temperature == 0 and max(teacher, student) > 1:
            raise ValueError(
                "generate.temperature = 0 decodes greedily, so that all responses of a model to a question would be "
                f"equal: expected at most 1 response of the teacher and 1 of the student, found {teacher} and "
                f"{student}; raise generate.temperature, or lower generate.responses"
            )
        return self

    @model_validator(mode="after")
    def _check_generation(self) -> "Config":
        train, generate = self.train, self.generate
        if train.targets == "responses" and train.objective == "masters" and generate.responses < 2:
            raise ValueError(
                'objective "masters" compares the responses to a question: generate.responses must be at least 2'
            )
        if generate.refresh == "stage" and train.targets == "labels":
            raise ValueError(
                'generate.refresh = "stage" lets the student answer at the beginning of each mask stage, but '
                'train.targets = "labels" does not use responses: set generate.refresh = "round"'
            )
        if generate.refresh == "stage" and not generate.student_responses:
            raise ValueError(
                'generate.refresh = "stage" lets the student answer at the beginning of each mask stage, but '
                "generate.student_share = 0 gives it no responses: raise generate.student_share, or set "
                'generate.refresh = "round"'
            )
        judge_tokens = self.rewards.judge_tokens or 0
        if self.needs_judge and not is_url(self.rewards.judge) and judge_tokens >= self.runtime.max_model_len:
            raise ValueError(
                f"rewards.judge_tokens ({judge_tokens}) leaves no room for a judge's prompt in runtime.max_model_len "
                f"({self.runtime.max_model_len})"
            )
        if generate.max_tokens >= self.runtime.max_model_len:
            raise ValueError(
                f"generate.max_tokens ({generate.max_tokens}) leaves no room for a prompt in "
                f"runtime.max_model_len ({self.runtime.max_model_len})"
            )
        return self
