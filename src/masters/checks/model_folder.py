"""Model folders on this machine: finding and checking them, alone and as a pair of teacher and student."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from masters.checks.model_files import (
    REMEDY,
    check_adapter_tensors,
    check_files,
    check_unquantized,
    quantization_method,
)
from masters.checks.processor import ProcessorOutput
from masters.checks.weights import check_weights
from masters.common.errors import InputError, one_line
from masters.common.hashing import model_digest
from masters.common.machine import cache_folder
from masters.config import Config, Model, allowlist
from masters.config.allowlist import Setting, check_model
from masters.models.families import FAMILIES, unsupported_family
from masters.models.model_loading import check_readable, resolve_model_folder
from masters.store.artifacts import Artifact, External

ORIGINAL_INTERNVL = "internvl_chat"  # model type of the repositories with code of their own
STUDENT_BEFORE, STUDENT_AFTER = "student-before", "student-after"  # the student's names in the predictions table
STUDENT_NAMES = (STUDENT_BEFORE, STUDENT_AFTER)


@dataclass(frozen=True)
class LocalModel:
    """A model folder on this machine, with its name in tables and its digest."""

    name: str
    folder: Path
    digest: str
    artifact: Artifact | None = None  # the artifact it was downloaded from; None: it comes from outside the store
    has_custom_code: bool = False  # whether it runs code of its own, which this machine's owner trusts
    processor_output: ProcessorOutput | None = None  # None: not a supported family

    @property
    def origin(self) -> Artifact | External:
        """The model's source, for lineage."""
        return self.artifact or External("model", str(self.folder), self.digest)


@dataclass(frozen=True)
class JudgeServer:
    """Base URL of an OpenAI-compatible API, and the model's name there (None: the first one that it lists)."""

    url: str
    model: str | None

    @property
    def origin(self) -> External:
        """The judge's source, for lineage."""
        return External("server", self.url, None)


def disambiguate_names(models: list[LocalModel]) -> list[LocalModel]:
    """Return the models with unique names: folders often have equal names, such as `final`."""
    digests: dict[str, set[str]] = {}
    for model in models:
        digests.setdefault(model.name, set()).add(model.digest)
    return [
        replace(model, name=f"{model.name}-{model.digest[:8]}")
        if len(digests[model.name]) > 1 or model.name in STUDENT_NAMES
        else model
        for model in models
    ]


def find_model(model: Model, store: str | None = None, must_be_supported: bool = False) -> LocalModel:
    """Return a model that is allowed and passes all checks. Students in the store `store` are allowed too.

    `must_be_supported`: its family must be, as a student's and a teacher's; judges may be any model.
    """
    check_model(model.model, store)
    folder = resolve_model_folder(model.model, model.revision)
    check_files(model.model, folder)
    check_readable(folder)
    check_adapter_tensors(folder)
    name = model.model if not Path(model.model).is_dir() else folder.name
    model_type = read_model_type(folder)
    is_supported = model_type in FAMILIES
    needs_custom_code = not is_supported and has_custom_code(folder)
    is_refused = needs_custom_code and not allowlist.may_run_code(model.model, str(folder))
    if model_type == ORIGINAL_INTERNVL and (must_be_supported or is_refused):
        raise InputError(
            f"model {model.model} is InternVL's original repository, which runs code of its own; expected the same "
            f"model in transformers' format, whose name ends in -hf: {_internvl_twin(model.model)}"
        )
    if must_be_supported and not is_supported:
        raise InputError(f"model {model.model}: {unsupported_family(model_type)}")
    if must_be_supported:
        check_unquantized(model.model, folder)
    if is_refused:
        raise InputError(
            f"model {model.model} ({model_type}) needs code of its own, which is off; the owner of this machine can "
            f"allow it in {Setting.CODE} after reading that code"
        )
    digest = model_digest(folder)
    # a judge may be quantized: its tensors are not those that config.json describes
    output = check_weights(folder, digest, is_supported and quantization_method(folder) is None)
    return LocalModel(name, folder, digest, has_custom_code=needs_custom_code, processor_output=output)


def _internvl_twin(model: str) -> str:
    """Return the name of the published model in transformers' format for InternVL's original one, if it is known."""
    name = Path(model).name
    for generation, ending in (("InternVL3-", "-hf"), ("InternVL3_5-", "-HF")):
        if name.startswith(generation):
            return f"OpenGVLab/{name}{ending}"
    return "such as OpenGVLab/InternVL3-1B-hf or OpenGVLab/InternVL3_5-1B-HF"


def download_student(trained: Artifact) -> Path:
    """Return a local copy of a train artifact's model. The copy is named by content: a rebuilt model has another."""
    target = cache_folder() / "models" / trained.part_digests["model"][:32]
    return trained.storage.download(f"{trained.folder}/model", target)


def check_pair(teacher: LocalModel, student: LocalModel) -> None:
    """Raise InputError unless both models have the same family, the same tokenizer and the same prompts."""
    teacher_type, student_type = read_model_type(teacher.folder), read_model_type(student.folder)
    if teacher_type != student_type:
        raise InputError(
            f"teacher {teacher.name} is {teacher_type}, student {student.name} is {student_type}: both must be of one "
            "family"
        )
    teacher_vocabulary, student_vocabulary = (load_tokenizer(m.folder).get_vocab() for m in (teacher, student))
    if teacher_vocabulary != student_vocabulary:
        tokens = teacher_vocabulary.keys() | student_vocabulary.keys()
        different = sum(1 for token in tokens if teacher_vocabulary.get(token) != student_vocabulary.get(token))
        raise InputError(
            f"teacher {teacher.name} and student {student.name} have different tokenizers ({different} tokens differ), "
            "but distillation compares probabilities over one vocabulary: choose models with the same tokenizer"
        )
    if not teacher.processor_output or not student.processor_output:
        return
    if difference := teacher.processor_output.describe_difference(student.processor_output):
        raise InputError(
            f"teacher {teacher.name} and student {student.name} make different prompts of one question and image: "
            f"{difference}; both must read a response after the same prompt: give them the same chat template and "
            "processor_config.json (or preprocessor_config.json)"
        )


def check_context_length(model: LocalModel, config: Config) -> None:
    """Raise InputError unless a short question with a small image and the longest response fit the context length."""
    if model.processor_output is None:
        return
    prompt, answer, limit = model.processor_output.prompt, config.generate.max_tokens, config.runtime.max_model_len
    positions = model.processor_output.positions
    if prompt + answer > config.runtime.context_length(positions):
        raise InputError(
            f"model {model.name}: a short question with a small image takes {prompt} tokens and generate.max_tokens "
            f"{answer}, together more than runtime.max_model_len ({limit}) or the model's max_position_embeddings "
            f"({positions}): raise runtime.max_model_len, or lower generate.max_tokens"
        )


def read_model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text())["model_type"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"model {folder}: its config.json names no model_type ({one_line(error)}): {REMEDY}"
        ) from error


def has_custom_code(folder: Path) -> bool:
    """Return whether a model's configuration names Python code in its folder."""
    return any('"auto_map"' in file.read_text(errors="replace") for file in folder.glob("*config.json"))


def read_special_tokens(folder: Path) -> tuple[str, ...]:
    """Return the sorted texts that the tokenizer reads as control tokens."""
    return tuple(sorted(t.content for t in load_tokenizer(folder).added_tokens_decoder.values() if t.special))


def load_tokenizer(folder: Path):
    """Load a tokenizer, from tokenizer.json if it exists: AutoTokenizer imports the code of every model first."""
    if (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast as Tokenizer
    else:
        from transformers import AutoTokenizer as Tokenizer
    try:
        return Tokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types of errors
        raise InputError(f"model {folder}: its tokenizer cannot be loaded ({one_line(error)}): {REMEDY}") from error
