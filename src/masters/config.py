"""The configuration: its keys, what each may hold and what they must be together. Imports no torch.

Everything but `[runtime]`, `[nightly]`, `[store]` and `name` is semantic: it takes part in the identity of what is
built.
"""

from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from masters import patterns, store_root
from masters.judge_url import is_url

LARGEST = 2**31 - 1  # of whole numbers: what engines, tables and the flow's JSON take
STAGES = 1000  # of a teacher's mask
COLDEST = 0.01  # what vLLM would silently make of a temperature between 0 and it
TEACHER = "teacher"  # rewards.judge: the round's own teacher, unmasked
BUILT_IN = ("digits", "easyvqa")  # data.source: data sets that come with installed packages
LOCAL = "local"  # runtime.ray_address: a Ray of our own
ADDRESS = r"(local|(\[[0-9A-Fa-f:]{2,39}\]|[A-Za-z0-9][A-Za-z0-9._-]{0,253}):[1-9][0-9]{0,4})"
NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}"

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Text = Annotated[str, Field(min_length=1)]
PoolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")]
Dtype = Literal["bfloat16", "float16", "float32"]


def _takes_whole(annotation: object) -> bool:
    return annotation is int or any(_takes_whole(part) for part in get_args(annotation))


class Section(BaseModel):
    """Unknown keys are errors; values are not coerced from other types. Descriptions are the run form's help texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _integral(cls, value: object, info: ValidationInfo) -> object:
        """To a form, whose numbers are JSON's, 1.0 is a whole number: so it is in a file."""
        if isinstance(value, float) and value.is_integer():
            return int(value) if _takes_whole(cls.model_fields[info.field_name or ""].annotation) else value
        return value


class Store(Section):
    """Where everything that is built is kept."""

    root: Annotated[Text, AfterValidator(store_root.checked)] = Field(
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
        default=0.2, description="Mask ratio that training begins with; a multiple of step, 0 leaves the teacher whole"
    )
    step: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.05, description="How much of the mask is taken back from one stage to the next"
    )

    @model_validator(mode="after")
    def _multiple(self) -> "Teacher":
        stages = self.r_max / self.step
        if stages > STAGES:
            raise ValueError(f"step ({self.step}) takes r_max ({self.r_max}) back in more than {STAGES} stages")
        if abs(stages - round(stages)) > 1e-6:
            raise ValueError(f"r_max ({self.r_max}) must be a multiple of step ({self.step})")
        return self


class Mask(Section):
    """Which of a teacher's weights are masked: the smallest by magnitude."""

    granularity: Literal["matrix", "block", "global"] = Field(
        default="matrix", description="Where weights compete to be kept: in their matrix, their block, the whole model"
    )
    exclude: list[Annotated[str, AfterValidator(patterns.checked)]] = Field(
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
        default=50, ge=0, le=LARGEST, description="Sample from this many likeliest tokens; 0 keeps every token"
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

    @model_validator(mode="after")
    def _whole(self) -> "Generate":
        if 0 < self.temperature < COLDEST:
            raise ValueError(f"engines take a temperature of 0 or from {COLDEST}, found {self.temperature}")
        if abs(self.responses * self.student_share - self.student_responses) > 1e-6:
            raise ValueError(
                f"student_share ({self.student_share}) of {self.responses} responses is not a whole number"
            )
        return self


class Answers(Section):
    """When an answer counts as right: by `rewards.accuracy = "rules"`, and in every evaluation."""

    verifier: Literal["exact", "final", "number", "choice"] = Field(
        default="exact",
        description="exact: the whole answer, but for case, white space, quotes and closing punctuation; final: only "
        "what stands after its last marker; number: the same number, however it is written; choice: the letter of a "
        "multiple-choice answer",
    )
    final_pattern: Annotated[Text, AfterValidator(patterns.checked)] | None = Field(
        default=None,
        description="For verifier final: a pattern (RE2's syntax); the first group of its last match is the final "
        'answer. Default: the content of \\boxed{}, or what stands after the last "####", "=", ":" or "answer is"',
    )

    @model_validator(mode="after")
    def _used(self) -> "Answers":
        if self.final_pattern is not None and self.verifier != "final":
            raise ValueError(
                f'final_pattern is for verifier = "final"; verifier is "{self.verifier}": leave final_pattern out'
            )
        return self


class Rewards(Section):
    """What a response is rewarded for."""

    accuracy: Literal["llm", "rules", "off"] = Field(
        default="llm",
        description="Whether it is right: judged by a language model, by rules (answers.verifier), or not at all",
    )
    judge: str = Field(
        default=TEACHER,
        min_length=1,
        description="teacher (the round's, unmasked), a model's folder or Hugging Face id, "
        "or the URL of an OpenAI-compatible server",
    )
    judge_model: str | None = Field(
        default=None, min_length=1, description="The model's name at the judge's URL; default: the first that it lists"
    )
    distillation: Literal["minmax", "raw", "off"] = Field(
        default="minmax",
        description="How easy it is to pass on: scaled to [0, 1] within its question, as it is, or not at all",
    )
    combine: Literal["sum", "gated"] = Field(
        default="sum",
        description="sum: R_acc + R_distill, as in the paper; gated: R_acc (1 + R_distill), so that a wrong response "
        "never has a higher reward than a right one",
    )
    distillation_floor: NotNegative = Field(
        default=1e-5, description="Nats. Where the divergences of a question's responses differ by no more than this, "
        "the minmax distillation reward is 0: the difference is noise",
    )  # fmt: skip
    distillation_relative_floor: NotNegative = Field(
        default=0.0, description="The same, as a multiple of the mean divergence of the question's responses"
    )

    @model_validator(mode="after")
    def _named(self) -> "Rewards":
        if self.judge_model and not is_url(self.judge):
            raise ValueError(f"judge_model names a model at a URL; judge is {self.judge!r}")
        return self


class Train(Section):
    """How the student learns from the responses."""

    objective: Literal["masters", "kd", "sft"] = Field(
        default="masters",
        description="masters: distillation and rewards; kd: distillation alone; sft: fine-tuning on the labels, or "
        "on the responses that are right",
    )
    targets: Literal["responses", "labels"] = Field(
        default="responses", description="What is learnt from: generated responses, or the data's answers (kd, sft)"
    )
    divergence: Literal["jsd", "kl", "skew"] = Field(
        default="jsd",
        description="Between teacher and student: Jensen-Shannon, Kullback-Leibler, or Kullback-Leibler from a mixture "
        "of a tenth teacher and nine tenths student",
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = Field(
        default=1e-6, description="AdamW learning rate, at its highest. 1e-6 suits models with billions of weights"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="How the learning rate falls after the warmup: not at all, or to 0 at the end"
    )
    warmup_steps: int = Field(
        default=0, ge=0, le=10**9, description="Steps over which the learning rate rises linearly to its highest value"
    )
    max_gradient_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Clip the gradient of a step to this global norm; default: no clipping"
    )
    beta: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = Field(
        default=0.1, description="Weight of the term that keeps the student near where it started"
    )
    kl: Literal["exact", "k3", "clipped", "squared"] = Field(
        default="exact",
        description="The KL term. exact: over the whole vocabulary, with the student as it started held in memory "
        "beside the teacher. Or estimated from a token's d = log pi_ref - log pi, computed once before the first step: "
        "k3: exp(d) - d - 1, whose slope has no bound on stored tokens; clipped: k3 with a bounded slope; squared: "
        "d^2 / 2",
    )
    negatives: Literal["full", "clipped", "first_difference", "none"] = Field(
        default="full",
        description="Negative advantages. full: as they are; clipped: times min(1, pi / pi_ref) of the token, so that "
        "tokens which the student has given up are pushed no further; first_difference: only from the token on where "
        "the response leaves every right one of its question, and as they are where none is right; none: 0",
    )
    baseline_shift: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = Field(
        default=0.0,
        description="Added to the mean reward that rewards are compared with: below 0 fewer responses are pushed away",
    )
    reward_weight: NotNegative = Field(
        default=1.0, description="Weight of the reward term L_GRPO beside the distillation term D"
    )
    balance: Literal["sum", "teacher_accuracy"] = Field(
        default="sum",
        description="Of the two terms of a question's loss. sum: L_GRPO + D; teacher_accuracy: (1 - p) L_GRPO + p D, "
        "where p is the share of the teacher's responses to the question that are right",
    )
    control: Literal["none", "shuffled_verdicts", "random_advantages"] = Field(
        default="none",
        description="Negative control. shuffled_verdicts: each question's verdicts are permuted across its responses; "
        "random_advantages: advantages are random numbers, normalized within the question",
    )
    epochs: int = Field(default=1, ge=1, le=1000, description="Passes over the questions of each mask stage")
    questions_per_step: Count = Field(default=8, description="Questions that an optimiser step learns from")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of the weights while it trains")
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Of the products while it trains; bfloat16 is what GPUs are fast at, with float32 weights and sums",
    )
    seed: Seed = Field(default=0, description="Of the order of the questions")
    probe_drop: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Hold 128 training questions out (at most a tenth) and end when the share of them that the student "
        "has right falls by more than this below its best; default: no such guard",
    )
    on_drop: Literal["stop", "rollback"] = Field(
        default="stop", description="After such a fall: stop with an error, or end with the best weights until then"
    )

    @model_validator(mode="after")
    def _sensible(self) -> "Train":
        if self.targets == "labels" and self.objective == "masters":
            raise ValueError('objective "masters" rewards sampled responses; with targets = "labels" use "kd" or "sft"')
        verdicts_used = self.targets == "responses" and self.objective != "kd"
        if self.control == "shuffled_verdicts" and not verdicts_used:
            raise ValueError(
                'control = "shuffled_verdicts" needs objective "masters", or "sft" with targets = "responses"'
            )
        if self.control == "random_advantages" and self.objective != "masters":
            raise ValueError(f'control = "random_advantages" needs objective "masters", found {self.objective!r}')
        if self.dtype == self.compute_dtype == "bfloat16":
            raise ValueError('weights of dtype "bfloat16" compute in it anyway; leave compute_dtype out')
        return self

    @property
    def holds_reference(self) -> bool:
        """Whether pi_ref itself, the student as it started, is held in memory beside the teacher."""
        return self.objective == "masters" and self.beta > 0 and self.kl == "exact"

    @property
    def stores_reference(self) -> bool:
        """Whether log pi_ref of the responses' tokens is computed before the first step and stored."""
        needed = self.beta > 0 or self.negatives == "clipped"
        return self.objective == "masters" and needed and not self.holds_reference


class Evaluate(Section):
    """What the models are evaluated on."""

    split: Literal["test", "validation"] = Field(
        default="test",
        description="test: the evaluation split; validation: the training images that data.validation_share holds out, "
        "to choose settings by",
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
        pattern=f"^{ADDRESS}$",
        json_schema_extra={"pattern": rf"^{ADDRESS}$(?!\n)"},  # as with `Config.name`
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
    sharding: Literal["replicate", "fsdp2", "zero3"] = Field(
        default="replicate",
        description="What a training process holds: replicate: all weights; fsdp2, zero3 (DeepSpeed): its share of "
        "student and teacher",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Compute the student's blocks again in the backward pass instead of keeping their values",
    )
    token_budget: Count = Field(
        default=16_384, description="Tokens of a training forward pass; a step takes as many passes as it needs"
    )
    checkpoint_steps: Count = Field(default=100, description="Optimiser steps between checkpoints")
    engine_memory_gib: Annotated[float, Field(gt=0, le=2**20, allow_inf_nan=False)] = Field(
        default=1.0,
        description="GiB of an engine's cache of keys and values on a CPU; on a GPU vLLM takes what is free",
    )
    max_model_len: int = Field(
        default=2048, ge=16, le=LARGEST, description="Prompt and response tokens an engine admits"
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, le=1024, description="Devices that an engine spreads a model over"
    )
    silence_minutes: Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)] = Field(
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
        return None if self.ray_address == LOCAL else self.ray_address


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
        pattern=f"^{NAME}$",
        # Python's $, by which Prefect's server goes, also stands before a line's end
        json_schema_extra={"pattern": rf"^{NAME}$(?!\n)"},
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
    def probe_split(self) -> Literal["test", "validation"]:
        """The split that training is watched on: the test split only where no validation split is held out."""
        return "validation" if self.data.validation_share else "test"

    @model_validator(mode="after")
    def _needed(self) -> "Config":
        if self.evaluate.split == "validation" and not self.data.validation_share:
            raise ValueError('evaluate.split = "validation" needs data.validation_share above 0, e.g. 0.1, found 0')
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
