"""Configuration sections that define what the student learns from: answers, rewards and training."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from masters.common import safe_regex
from masters.config.fields import MAX_INT, TEACHER, Count, ModelName, NotNegative, Section, Seed, Text
from masters.config.judge_url import is_url


class Answers(Section):
    """The rule by which an answer counts as right (`rewards.accuracy = "rules"`, `evaluate.accuracy = "rules"`)."""

    verifier: Literal["exact", "final", "number", "choice"] = Field(
        default="exact",
        description="How an answer is compared with the reference answer. exact: as a whole, ignoring case, white "
        "space, quotes and closing punctuation; final: only the text after its last marker; number: as a number, in "
        "whatever notation; choice: by the letter of a multiple-choice answer",
    )
    final_pattern: Annotated[Text, AfterValidator(safe_regex.check_pattern)] | None = Field(
        default=None,
        description="For verifier final: a regular expression (RE2 syntax); the first group of its last match is the "
        'final answer. Default: the content of \\boxed{}, or the text after the last "####", "=", ":" or "answer is"',
    )

    @model_validator(mode="after")
    def _check_final_pattern(self) -> "Answers":
        if self.final_pattern is not None and self.verifier != "final":
            raise ValueError(
                f'final_pattern is only used with verifier = "final", found verifier = "{self.verifier}": remove '
                "final_pattern"
            )
        return self


class Rewards(Section):
    """Rewards of a response."""

    accuracy: Literal["llm", "rules", "off"] = Field(
        default="llm",
        description="Accuracy reward: whether a response is right. llm: a language model judges it (rewards.judge); "
        "rules: by answers.verifier; off: no accuracy reward",
    )
    judge: ModelName = Field(
        default=TEACHER,
        description="The judge: teacher (the teacher of the round, unmasked), a model's folder or Hugging Face id, or "
        "the URL of an OpenAI-compatible server",
    )
    judge_model: str | None = Field(
        default=None,
        min_length=1,
        description="The model's name at the judge's URL. Default: the first model that the server lists",
    )
    judge_tokens: int | None = Field(
        default=None,
        ge=16,
        le=MAX_INT,
        description="Maximum number of tokens of each reply of the judge, thoughts included. A judge that thinks needs "
        "thousands. Default: 256 for its explanation and 8 for the score that it repeats",
    )
    distillation: Literal["minmax", "raw", "off"] = Field(
        default="minmax",
        description="Distillation reward: how easily the student learns a response from the teacher. minmax: scaled "
        "to [0, 1] among the responses to a question; raw: not scaled; off: no distillation reward",
    )
    combine: Literal["sum", "gated"] = Field(
        default="gated",
        description="How the two rewards are combined. sum: R_acc + R_distill, as in the paper; gated: "
        "R_acc (1 + R_distill), so that a wrong response never has a higher reward than a right one. Without an "
        "accuracy reward the default is sum",
    )
    distillation_floor: NotNegative = Field(
        default=1e-5,
        description="In nats. If the divergences of a question's responses differ by no more than this, the minmax "
        "distillation reward is 0, because such a difference is noise",
    )
    distillation_relative_floor: NotNegative = Field(
        default=0.0,
        description="Like distillation_floor, as a multiple of the mean divergence of the question's responses",
    )

    @model_validator(mode="after")
    def _check_judge_model(self) -> "Rewards":
        if self.judge_model and not is_url(self.judge):
            raise ValueError(f"judge_model is only used with a URL in judge, found judge = {self.judge!r}")
        return self


class Train(Section):
    """Training of the student on the responses."""

    objective: Literal["masters", "kd", "sft"] = Field(
        default="masters",
        description="masters: distillation and rewards; kd: distillation only; sft: fine-tuning on the labels, or "
        "on the responses that are right",
    )
    targets: Literal["responses", "labels"] = Field(
        default="responses",
        description="What the student learns from. responses: the generated responses; labels: the data's answers "
        "(only with kd and sft)",
    )
    divergence: Literal["jsd", "kl", "skew"] = Field(
        default="kl",
        description="Divergence between teacher and student. jsd: Jensen-Shannon; kl: Kullback-Leibler; skew: "
        "Kullback-Leibler to a mixture of one tenth teacher and nine tenths student",
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = Field(
        default=1e-6, description="Peak learning rate of AdamW. 1e-6 suits models with billions of weights"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="How the learning rate changes after the warmup. constant: not at all; linear, cosine: it falls "
        "to 0 at the end",
    )
    warmup_steps: int = Field(
        default=0, ge=0, le=10**9, description="Steps over which the learning rate rises linearly to its peak"
    )
    max_gradient_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Clip the gradient of a step to this global norm. Default: no clipping"
    )
    beta: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = Field(
        default=0.0, description="Weight of the KL term, which keeps the student near its initial weights"
    )
    kl: Literal["exact", "k3", "clipped", "squared"] = Field(
        default="exact",
        description="How the KL term is computed. exact: over the whole vocabulary, with the initial student kept in "
        "memory beside the teacher. The others estimate it from d = log pi_ref - log pi of each token, where "
        "log pi_ref is computed once before the first step. k3: exp(d) - d - 1, whose gradient is unbounded on stored "
        "tokens; clipped: k3 with a bounded gradient; squared: d^2 / 2",
    )
    negatives: Literal["full", "clipped", "first_difference", "none"] = Field(
        default="none",
        description="How negative advantages are used. full: unchanged; clipped: multiplied by min(1, pi / pi_ref) of "
        "the token, so that tokens that have become unlikely are not pushed further down; first_difference: only from "
        "the token on where the response differs from every right response to its question (unchanged if no response "
        "is right); none: set to 0",
    )
    baseline_shift: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = Field(
        default=0.0,
        description="Added to the mean reward, which is the baseline of the advantages. Below 0, fewer responses have "
        "a negative advantage",
    )
    reward_weight: NotNegative = Field(
        default=1.0, description="Weight of the reward term L_GRPO relative to the distillation term D"
    )
    balance: Literal["sum", "teacher_accuracy"] = Field(
        default="teacher_accuracy",
        description="How the two terms of a question's loss are combined. sum: L_GRPO + D; teacher_accuracy: "
        "(1 - p) L_GRPO + p D, where p is the share of the teacher's responses to the question that are right. Without "
        "an accuracy reward, or responses of the teacher, the default is sum",
    )
    control: Literal["none", "shuffled_verdicts", "random_advantages"] = Field(
        default="none",
        description="Negative control of an experiment. shuffled_verdicts: each question's verdicts are permuted "
        "across its responses; random_advantages: advantages are random numbers, normalized within the question",
    )
    epochs: int = Field(default=1, ge=1, le=1000, description="Passes over the questions of each mask stage")
    questions_per_step: Count = Field(default=8, description="Questions in an optimizer step")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Data type of the student's weights during training"
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Data type of matrix products during training. bfloat16 is fast on GPUs; weights and sums stay in "
        "float32",
    )
    seed: Seed = Field(default=0, description="Random seed of the order of the questions")
    max_validation_drop: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Hold out 128 training questions (at most a tenth of them) and end the training if the student's "
        "accuracy on them falls by more than this below its best. Default: no such guard",
    )
    on_drop: Literal["stop", "rollback"] = Field(
        default="stop",
        description="What happens after such a drop. stop: training ends with an error; rollback: training ends with "
        "the best weights so far",
    )

    @model_validator(mode="after")
    def _check_combination(self) -> "Train":
        if self.targets == "labels" and self.objective == "masters":
            raise ValueError('objective "masters" rewards sampled responses; with targets = "labels" use "kd" or "sft"')
        uses_verdicts = self.targets == "responses" and self.objective != "kd"
        if self.control == "shuffled_verdicts" and not uses_verdicts:
            raise ValueError(
                'control = "shuffled_verdicts" needs objective "masters", or "sft" with targets = "responses"'
            )
        if self.control == "random_advantages" and self.objective != "masters":
            raise ValueError(f'control = "random_advantages" needs objective "masters", found {self.objective!r}')
        if self.dtype == self.compute_dtype == "bfloat16":
            raise ValueError('dtype = "bfloat16" already computes in bfloat16: remove compute_dtype')
        return self

    @property
    def holds_reference(self) -> bool:
        """Whether the reference policy pi_ref, the initial student, is kept in memory beside the teacher."""
        return self.objective == "masters" and self.beta > 0 and self.kl == "exact"

    @property
    def stores_reference(self) -> bool:
        """Whether log pi_ref of the responses' tokens is computed before the first step and stored."""
        needs_reference = self.beta > 0 or self.negatives == "clipped"
        return self.objective == "masters" and needs_reference and not self.holds_reference
