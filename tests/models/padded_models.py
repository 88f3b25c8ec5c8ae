"""Models whose embedding and head have rows beyond the tokenizer's entries, as published models have: of garbage."""

import copy
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

GARBAGE = 5.0  # standard deviation of the rows: without the rule they would take most of the probability


def pad_model(model: torch.nn.Module, rows: int) -> torch.nn.Module:
    """Return a copy of a model with so many more rows of garbage in its embedding and its head."""
    padded = copy.deepcopy(model)
    old = padded.get_input_embeddings().weight.shape[0]
    padded.resize_token_embeddings(old + rows, mean_resizing=False)
    with torch.no_grad():
        for weight in {padded.get_input_embeddings().weight, padded.lm_head.weight}:  # one weight if they are tied
            garbage = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
            weight[old:] = GARBAGE * garbage
    return padded


def save_padded(source: Path, folder: Path, rows: int) -> Path:
    """Write a copy of a model's folder with so many more rows of garbage. Returns `folder`."""
    shutil.copytree(source, folder)
    pad_model(AutoModelForImageTextToText.from_pretrained(source, dtype="auto"), rows).save_pretrained(folder)
    return folder
