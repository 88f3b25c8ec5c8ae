"""Refuses a judge in an engine whose chat template or context length does not allow a judge's prompt."""

from masters.checks.model_folder import LocalModel
from masters.common.errors import InputError, one_line
from masters.config import Config
from masters.models.prompts import render_conversation, tokenize_conversation
from masters.rewards.judge_probe import QUESTION
from masters.rewards.judge_prompts import TokenLimits, grading_conversation


def check_judge_prompt(model: LocalModel, config: Config) -> None:
    """Raise InputError unless the judge's engine takes the prompt of a short text together with the longest reply."""
    from transformers import AutoProcessor

    conversation = grading_conversation(QUESTION)
    remedy = "choose another judge, or put one behind a server"
    try:
        processor = AutoProcessor.from_pretrained(model.folder, trust_remote_code=model.has_custom_code)
        text = render_conversation(processor, conversation)
        tokens = tokenize_conversation(processor, getattr(processor, "tokenizer", processor), conversation)
    except Exception as error:  # transformers and Jinja raise many types of errors
        raise InputError(
            f"judge {model.name}: its chat template makes no prompt of a text ({one_line(error)}): {remedy}"
        ) from error
    if tokens is None or any(turn["content"] not in text for turn in conversation):
        raise InputError(f"judge {model.name}: its chat template leaves out or changes the text to judge: {remedy}")
    _check_room(model, config, len(tokens))


def _check_room(model: LocalModel, config: Config, prompt: int) -> None:
    from transformers import AutoConfig

    reply = TokenLimits.for_each_reply(config.rewards.judge_tokens).explanation
    text_config = AutoConfig.from_pretrained(model.folder, trust_remote_code=model.has_custom_code).get_text_config()
    positions = text_config.max_position_embeddings
    if prompt + reply > config.runtime.context_length(positions):
        raise InputError(
            f"judge {model.name}: the prompt of a short text takes {prompt} tokens and the reply up to {reply}, "
            f"together more than runtime.max_model_len ({config.runtime.max_model_len}) or the model's "
            f"max_position_embeddings ({positions}): raise runtime.max_model_len, or choose another judge"
        )
