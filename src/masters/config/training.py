"""Sections of the configuration that say what the student learns from: answers, rewards, training."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from masters.common import safe_regex
from masters.config.fields import TEACHER, Count, NotNegative, Section, Seed, Text
from masters.config.judge_url import is_url


class Answers(Section):
    """When an answer counts as right by rules: `rewards.accuracy = "rules"`, `evaluate.accuracy = "rules"`."""

    verifier: Literal["exact", "final", "number", "choice"] = Field(
        default="exact",
        description="exact: the whole answer, but for case, white space, quotes and closing punctuation; final: only "
        "what stands after its last marker; number: the same number, however it is written; choice: the letter of a "
        "multiple-choice answer",
    )
    final_pattern: Annotated[Text, AfterValidator(safe_regex.check_pattern)] | None = Field(
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
    questions_per_step: Count = Field(default=8, description="Questions that an optimizer step learns from")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of the weights while it trains")
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Of the products while it trains; bfloat16 is what GPUs are fast at, with float32 weights and sums",
    )
    seed: Seed = Field(default=0, description="Of the order of the questions")
    max_validation_drop: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
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
