"""The TOML file of a study: arms that are compared over learning rates and seeds. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from masters.common.errors import InputError
from masters.config import Config, Section, presets
from masters.config.fields import NAME_PATTERN, Seed, Text
from masters.config.loading import describe_errors, flatten, load, override_values, read_toml

# keys that the study itself sets, or that change nothing that is built
RESERVED_KEYS = ("name", "store", "nightly", "train.learning_rate", "train.seed", "data.validation_share", "evaluate")

ArmName = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
Rate = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Rates = Annotated[list[Rate], Field(min_length=1)]


class Validation(Section):
    """The validation questions, with which learning rates are chosen."""

    share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        default=0.1,
        description="Share of the training images that are held out of training in every arm; 0 if no arm has rates to "
        "choose from",
    )


class Arm(Section):
    """One way to train. Its further keys are settings of the configuration, e.g. "train.objective" = "kd"."""

    model_config = ConfigDict(extra="allow")

    learning_rates: Rates | None = Field(
        default=None, description="Learning rates to choose from. Default: those of the study"
    )
    different_steps: bool = Field(
        default=False, description="Whether this arm may take a different number of optimizer steps than the others"
    )

    @property
    def settings(self) -> dict[str, Any]:
        """Settings by dotted key, whether the file contains them as quoted keys or as nested tables."""
        return flatten(self.model_extra or {})


class Comparison(Section):
    """A planned comparison of two arms."""

    better: ArmName = Field(description="The arm that is expected to be better; the test is two-sided")
    than: ArmName = Field(description="The arm it is compared with")


class Study(Section):
    """Arms, the choice of their learning rates, and the comparisons between them."""

    name: ArmName = Field(description="Name of the study: letters, digits, - and _")
    results: Text = Field(description="Folder for the report and one JSON file per finished run")
    learning_rates: Rates = Field(description="Learning rates from which each arm's is chosen on validation questions")
    tuning_seeds: list[Seed] = Field(default=[0], min_length=1, description="Seeds of the runs that choose the rate")
    seeds: list[Seed] = Field(min_length=1, description="Different seeds, of the runs that test the chosen rate")
    validation: Validation = Validation()
    base: dict[str, Any] = Field(default={}, description="Settings that all arms share, by dotted key")
    arms: dict[ArmName, Arm] = Field(min_length=1, description="Arms by name")
    comparisons: list[Comparison] = Field(
        default=[], description="Planned comparisons; their p-values are corrected together"
    )

    def rates(self, arm: str) -> list[float]:
        """Return the arm's learning rates in ascending order."""
        return sorted(self.arms[arm].learning_rates or self.learning_rates)

    @property
    def chooses_rates(self) -> bool:
        """Whether an arm has several learning rates, of which validation questions choose one."""
        return any(len(self.rates(arm)) > 1 for arm in self.arms)

    @model_validator(mode="after")
    def _check_validation(self) -> "Study":
        if self.chooses_rates and not self.validation.share:
            raise ValueError("validation.share: expected more than 0, as learning rates are chosen, found 0")
        return self

    @model_validator(mode="after")
    def _check_duplicates(self) -> "Study":
        lists = {"learning_rates": self.learning_rates, "tuning_seeds": self.tuning_seeds, "seeds": self.seeds}
        lists |= {f"arms.{name}.learning_rates": arm.learning_rates or [] for name, arm in self.arms.items()}
        for name, values in lists.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected each value once, found {values}")
        if self.chooses_rates and (both := sorted({*self.seeds} & {*self.tuning_seeds})):
            raise ValueError(f"seeds: expected other seeds than tuning_seeds, found {both} in both")
        return self

    @model_validator(mode="after")
    def _check_comparisons(self) -> "Study":
        if self.comparisons and len(self.seeds) < 2:
            raise ValueError("seeds: expected at least 2, as arms are compared, found 1")
        for pair in self.comparisons:
            if unknown := sorted({pair.better, pair.than} - self.arms.keys()):
                raise ValueError(f"comparisons: expected arms of this study, found {', '.join(unknown)}")
            if pair.better == pair.than:
                raise ValueError(f"comparisons: expected two arms, found {pair.better} twice")
        return self

    @model_validator(mode="after")
    def _check_settings(self) -> "Study":
        settings_by_place = {"base": flatten(self.base)}
        settings_by_place |= {f"arms.{name}": arm.settings for name, arm in self.arms.items()}
        for place, settings in settings_by_place.items():
            for key in settings:
                if any(key == reserved or key.startswith(f"{reserved}.") for reserved in RESERVED_KEYS):
                    raise ValueError(
                        f"{place}: {key} cannot be set here: the study sets it, or it does not affect the results"
                    )
        return self


class StudyFile(Study):
    """The content of a study's TOML file: a study and the path of its base configuration."""

    config: Text = Field(description="Base configuration, relative to the study's file")


def load_study(path: Path) -> tuple[Config, Study]:
    """Read a study's file and its base configuration; folders are relative to the file.

    Raises InputError with one line that names every invalid key.
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
    """Return an arm's configuration, without learning rate and seed. Raises InputError as `override_values` does.

    The arm's own keys override its preset, and its preset overrides the keys that all arms share.
    """
    validation = {"data.validation_share": study.validation.share}
    settings, shared = study.arms[arm].settings, flatten(study.base)
    try:
        preset = presets.get_preset(settings["preset"]) if "preset" in settings else {}
        shared = {key: value for key, value in shared.items() if key not in preset}
        return override_values(config, shared | settings | validation)
    except InputError as error:
        raise InputError(f"study {study.name}, arm {arm}: {error}") from None
