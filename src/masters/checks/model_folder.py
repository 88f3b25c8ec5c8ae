"""A model folder on this machine: found, sound, and fit to be distilled with another one."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from masters.checks.processor import ProcessorOutput
from masters.checks.weights import check_weights
from masters.common.errors import InputError
from masters.common.hashing import model_digest
from masters.config import Config, Model, allowlist
from masters.config.allowlist import Setting, check_model
from masters.models.families import FAMILIES, family_of
from masters.models.model_loading import check_readable, resolve
from masters.store.artifacts import Artifact, External

STUDENT_BEFORE, STUDENT_AFTER = "student-before", "student-after"  # the student's names in the predictions table
STUDENT_NAMES = (STUDENT_BEFORE, STUDENT_AFTER)


@dataclass(frozen=True)
class LocalModel:
    """A model folder on this machine, its name in tables and its identity."""

    name: str
    folder: Path
    digest: str
    artifact: Artifact | None = None  # the artifact that it was fetched from; None: it came from outside
    has_custom_code: bool = False  # whether it runs code of its own, which this machine's owner trusts
    processor_output: ProcessorOutput | None = None  # what its processor made of a small prompt; None: of none of our families

    @property
    def origin(self) -> Artifact | External:
        return self.artifact or External("model", str(self.folder), self.digest)


@dataclass(frozen=True)
class JudgeServer:
    """Where an OpenAI-compatible API begins, and the model's name there (None: the first that it lists)."""

    url: str
    model: str | None

    @property
    def origin(self) -> External:
        return External("server", self.url, None)


def disambiguate_names(models: list[LocalModel]) -> list[LocalModel]:
    """Models under names that tell them apart in tables: folders are often called the same, such as `final`."""
    digests: dict[str, set[str]] = {}
    for model in models:
        digests.setdefault(model.name, set()).add(model.digest)
    return [
        replace(model, name=f"{model.name}-{model.digest[:8]}")
        if len(digests[model.name]) > 1 or model.name in STUDENT_NAMES
        else model
        for model in models
    ]


def find_model(model: Model, store: str | None = None) -> LocalModel:
    """A model that is allowed, here and sound. `store`: whose students are allowed too."""
    check_model(model.model, store)
    folder = resolve(model.model, model.revision)
    check_readable(folder)
    name = model.model if not Path(model.model).is_dir() else folder.name
    digest, kind = model_digest(folder), read_model_type(folder)
    own_code = kind not in FAMILIES and has_custom_code(folder)
    if own_code and not allowlist.may_run_code(model.model, str(folder)):
        raise InputError(
            f"model {model.model} ({kind}) wants to run code of its own, which is off; whoever runs this machine can "
            f"name it in {Setting.CODE} after reading that code"
        )
    processor_output = check_weights(folder, digest, shaped=kind in FAMILIES)
    return LocalModel(name, folder, digest, has_custom_code=own_code, processor_output=processor_output)


def check_pair(teacher: LocalModel, student: LocalModel) -> None:
    """A teacher and a student must be of one family, write the same tokens and be asked in the same ones."""
    kinds = [read_model_type(m.folder) for m in (teacher, student)]
    for kind in kinds:
        family_of(kind)
    if kinds[0] != kinds[1]:
        raise InputError(
            f"teacher {teacher.name} is {kinds[0]}, student {student.name} is {kinds[1]}: both must be of one family"
        )
    ours, theirs = (load_tokenizer(m.folder).get_vocab() for m in (teacher, student))
    if ours != theirs:
        differ = sum(1 for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise InputError(
            f"teacher {teacher.name} and student {student.name} have different tokenizers ({differ} tokens differ): "
            "distillation compares the same vocabulary; choose models that share one"
        )
    if teacher.processor_output and student.processor_output and (unlike := teacher.processor_output.unlike(student.processor_output)):
        raise InputError(
            f"teacher {teacher.name} and student {student.name} make different prompts of one question and picture: "
            f"{unlike}; distillation reads a response behind one prompt: give them the same chat template and "
            "processor_config.json (or preprocessor_config.json)"
        )


def check_context_length(model: LocalModel, config: Config) -> None:
    """A short question on a small picture and the longest answer fit what an engine admits of this model."""
    if model.processor_output is None:
        return
    prompt, answer, limit = model.processor_output.prompt, config.generate.max_tokens, config.runtime.max_model_len
    if prompt + answer > min(limit, model.processor_output.positions):
        raise InputError(
            f"model {model.name}: a short question on a small picture takes {prompt} tokens and generate.max_tokens "
            f"{answer}, together more than runtime.max_model_len ({limit}) or the model's max_position_embeddings "
            f"({model.processor_output.positions}): raise the one, or lower generate.max_tokens"
        )


def read_model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text())["model_type"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / 'config.json'} names no model_type: {error}") from error


def has_custom_code(folder: Path) -> bool:
    """Whether a model's configuration names Python code of its own."""
    return any('"auto_map"' in file.read_text(errors="replace") for file in folder.glob("*config.json"))


def read_special_tokens(folder: Path) -> tuple[str, ...]:
    """The texts that a tokenizer reads as control tokens, sorted."""
    return tuple(sorted(t.content for t in load_tokenizer(folder).added_tokens_decoder.values() if t.special))


def load_tokenizer(folder: Path):
    """The tokenizer; from its one file where there is one: choosing its class imports every model's code first."""
    if (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast as Tokenizer
    else:
        from transformers import AutoTokenizer as Tokenizer
    try:
        return Tokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
