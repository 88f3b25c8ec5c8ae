"""A study: arms that are compared over learning rates and seeds, as a TOML file describes it. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from masters.common.errors import InputError
from masters.config import Config, Section, presets
from masters.config.fields import NAME_PATTERN, Seed, Text
from masters.config.loading import override_values, describe_errors, flatten, load, read_toml

# what the study itself sets, or what changes nothing that is made
RESERVED_KEYS = ("name", "store", "nightly", "train.learning_rate", "train.seed", "data.validation_share", "evaluate")

ArmName = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
Rate = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Rates = Annotated[list[Rate], Field(min_length=1)]


class Validation(Section):
    """The questions that learning rates are chosen on."""

    share: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = Field(
        default=0.1, description="Share of the training images that are held out of every arm's training"
    )


class Arm(Section):
    """One way to train. Its further keys are settings of the configuration, e.g. "train.objective" = "kd"."""

    model_config = ConfigDict(extra="allow")

    learning_rates: Rates | None = Field(
        default=None, description="Learning rates to choose from; default: the study's"
    )
    different_steps: bool = Field(
        default=False, description="Whether this arm may take another number of optimizer steps than the others"
    )

    @property
    def settings(self) -> dict[str, Any]:
        """By dotted key, whether the file wrote them quoted or as nested tables."""
        return flatten(self.model_extra or {})


class Comparison(Section):
    """A planned comparison of two arms."""

    better: ArmName = Field(description="The arm that is expected to be better; the test is two-sided")
    than: ArmName = Field(description="The arm that it is compared with")


class Study(Section):
    """Arms, how each one's learning rate is chosen, and which arms are compared."""

    name: ArmName = Field(description="Of the study: letters, digits, - and _")
    results: Text = Field(description="Folder for one JSON file a finished run, and for the report")
    learning_rates: Rates = Field(description="Learning rates that each arm chooses from, on validation questions")
    tuning_seeds: list[Seed] = Field(default=[0], min_length=1, description="Seeds at which the rate is chosen")
    seeds: list[Seed] = Field(min_length=2, description="Other seeds, at which the chosen rate is tested")
    validation: Validation = Validation()
    base: dict[str, Any] = Field(default={}, description="Settings that all arms share, by dotted key")
    arms: dict[ArmName, Arm] = Field(min_length=1, description="Arms by name")
    comparisons: list[Comparison] = Field(default=[], description="Planned comparisons, corrected together")

    def rates(self, arm: str) -> list[float]:
        """The arm's learning rates, ascending."""
        return sorted(self.arms[arm].learning_rates or self.learning_rates)

    @model_validator(mode="after")
    def _once(self) -> "Study":
        lists = {"learning_rates": self.learning_rates, "tuning_seeds": self.tuning_seeds, "seeds": self.seeds}
        lists |= {f"arms.{name}.learning_rates": arm.learning_rates or [] for name, arm in self.arms.items()}
        for name, values in lists.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected each value once, found {values}")
        if both := sorted({*self.seeds} & {*self.tuning_seeds}):
            raise ValueError(f"seeds: expected other seeds than tuning_seeds, found {both} in both")
        return self

    @model_validator(mode="after")
    def _known(self) -> "Study":
        for pair in self.comparisons:
            if unknown := sorted({pair.better, pair.than} - self.arms.keys()):
                raise ValueError(f"comparisons: expected arms of this study, found {', '.join(unknown)}")
            if pair.better == pair.than:
                raise ValueError(f"comparisons: expected two arms, found {pair.better} twice")
        return self

    @model_validator(mode="after")
    def _settable(self) -> "Study":
        given = {"base": flatten(self.base)} | {f"arms.{name}": arm.settings for name, arm in self.arms.items()}
        for place, settings in given.items():
            for key in settings:
                if any(key == own or key.startswith(f"{own}.") for own in RESERVED_KEYS):
                    raise ValueError(
                        f"{place}: {key} is no setting of an arm: the study sets it, or it changes nothing"
                    )
        return self


class StudyFile(Study):
    """What a TOML file holds: a study and the configuration that it starts from."""

    config: Text = Field(description="Base configuration, relative to the study's file")


def load_study(path: Path) -> tuple[Config, Study]:
    """Read a study's file and its base configuration; folders are relative to the file.

    Raises InputError with one line that names every key at fault.
    """
    try:
        file = StudyFile.model_validate(read_toml(path, "study"))
    except ValidationError as error:
        raise InputError(f"study {path}: {describe_errors(error)}") from None
    values = file.model_dump(exclude={"config"}) | dict(results=str((path.parent / file.results).resolve()))
    config, study = load(path.parent / file.config), Study.model_validate(values)
    for arm in study.arms:
        arm_config(config, study, arm)
    return config, study


def arm_config(config: Config, study: Study, arm: str) -> Config:
    """The configuration of an arm, without learning rate and seed. Raises InputError as `changed` does.

    An arm's own keys go before its preset, and its preset before the keys that all arms share.
    """
    held_out = {"data.validation_share": study.validation.share}
    own, shared = study.arms[arm].settings, flatten(study.base)
    try:
        decided = presets.get_preset(own["preset"]) if "preset" in own else {}
        shared = {key: value for key, value in shared.items() if key not in decided}
        return override_values(config, shared | own | held_out)
    except InputError as error:
        raise InputError(f"study {study.name}, arm {arm}: {error}") from None
