"""The configuration: its sections and keys. Imports no torch."""

from masters.config.fields import Section
from masters.config.sampling import Sampling
from masters.config.schema import Config, Data, Evaluate, Generate, Mask, Model, Nightly, Pools, Runtime, Store, Teacher
from masters.config.training import Answers, Rewards, Train

__all__ = [
    "Answers",
    "Config",
    "Data",
    "Evaluate",
    "Generate",
    "Mask",
    "Model",
    "Nightly",
    "Pools",
    "Rewards",
    "Runtime",
    "Sampling",
    "Section",
    "Store",
    "Teacher",
    "Train",
]
