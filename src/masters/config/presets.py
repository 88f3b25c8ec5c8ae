"""Named sets of the method's switches, e.g. `preset = "paper"`. Keys in the configuration file override a preset."""

from typing import Any

from masters.common.errors import InputError
from masters.config.schema import Generate
from masters.config.training import Rewards, Train

# The paper's equations as written. The paper leaves the form of the KL term open: here, the whole vocabulary.
PAPER: dict[str, object] = {
    "generate.truncated": "keep",
    "train.objective": "masters",
    "train.targets": "responses",
    "train.divergence": "jsd",
    "train.beta": 0.1,
    "train.kl": "exact",
    "train.negatives": "full",
    "train.baseline_shift": 0.0,
    "train.reward_weight": 1.0,
    "train.balance": "sum",
    "rewards.distillation": "minmax",
    "rewards.combine": "sum",
    "rewards.distillation_floor": 1e-5,
    "rewards.distillation_relative_floor": 0.0,
}
# Distillation where the teacher is right, elsewhere only the advantage of right responses. The divergence is one whose
# gradient does not vanish where the student is confidently wrong. The best of the studies, and so the default.
_SECTIONS = {"generate": Generate, "rewards": Rewards, "train": Train}
RECOMMENDED: dict[str, object] = {
    key: _SECTIONS[section].model_fields[name].default for key in PAPER for section, name in [key.split(".")]
}
PRESETS = {"paper": PAPER, "recommended": RECOMMENDED}


def get_preset(name: object) -> dict[str, object]:
    """Return a preset's values by dotted key. Raises InputError if there is no preset of this name."""
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r:.100}")
    return PRESETS[name]


def section_values(name: str, section: str) -> dict[str, Any]:
    """Return a preset's values of one section by key, e.g. for `Train(**section_values("paper", "train"))`."""
    prefix = f"{section}."
    return {key.removeprefix(prefix): value for key, value in get_preset(name).items() if key.startswith(prefix)}
