"""Named sets of the method's switches, e.g. `preset = "paper"`. Keys in the configuration file override a preset."""

from masters.common.errors import InputError

PRESETS: dict[str, dict[str, object]] = {
    # The paper's equations as written. The paper leaves the form of the KL term open: here, the whole vocabulary.
    "paper": {
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
    },
    # Distillation where the teacher is right, elsewhere only the advantage of right responses. The divergence is one
    # whose gradient does not vanish where the student is confidently wrong.
    "recommended": {
        "train.objective": "masters",
        "train.targets": "responses",
        "train.divergence": "kl",
        "train.beta": 0.0,
        "train.kl": "exact",
        "train.negatives": "none",
        "train.baseline_shift": 0.0,
        "train.reward_weight": 1.0,
        "train.balance": "teacher_accuracy",
        "rewards.distillation": "minmax",
        "rewards.combine": "gated",
        "rewards.distillation_floor": 1e-5,
        "rewards.distillation_relative_floor": 0.0,
    },
}


def get_preset(name: object) -> dict[str, object]:
    """Return a preset's values by dotted key. Raises InputError if there is no preset of this name."""
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r:.100}")
    return PRESETS[name]
