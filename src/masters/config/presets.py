"""Named sets of the method's switches: `preset = "paper"` in a configuration. The file's own keys go before them."""

from masters.common.errors import InputError

PRESETS: dict[str, dict[str, object]] = {
    # the equations to the letter; the KL term, whose form the paper leaves open, over the whole vocabulary
    "paper": {
        "train.objective": "masters", "train.targets": "responses", "train.divergence": "jsd", "train.beta": 0.1,
        "train.kl": "exact", "train.negatives": "full", "train.baseline_shift": 0.0, "train.reward_weight": 1.0,
        "train.balance": "sum", "rewards.distillation": "minmax", "rewards.combine": "sum",
        "rewards.distillation_floor": 1e-5, "rewards.distillation_relative_floor": 0.0,
    },
    # the teacher's distribution where the teacher is right, elsewhere the advantage of right responses alone; a
    # divergence whose slope stays where the student is confidently wrong
    "recommended": {
        "train.objective": "masters", "train.targets": "responses", "train.divergence": "kl", "train.beta": 0.0,
        "train.kl": "exact", "train.negatives": "none", "train.baseline_shift": 0.0, "train.reward_weight": 1.0,
        "train.balance": "teacher_accuracy", "rewards.distillation": "minmax", "rewards.combine": "gated",
        "rewards.distillation_floor": 1e-5, "rewards.distillation_relative_floor": 0.0,
    },
}  # fmt: skip


def get_preset(name: object) -> dict[str, object]:
    """The preset's values by key. Raises InputError if there is none of that name."""
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r:.100}")
    return PRESETS[name]
