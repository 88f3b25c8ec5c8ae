"""A call that takes 64 MiB: a fresh process that measures it imports this module, and nothing heavier than PyTorch."""

import torch


def prepare():
    torch.zeros(1)
    return allocate


def allocate() -> object:
    return torch.zeros(64 << 18).add_(1)
