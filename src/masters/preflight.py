"""Everything that can be refused before work starts: store, source, models, families, tokenizers."""

import json
import socket
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from masters import allowed
from masters.allowed import Setting, check_config, check_model
from masters.artifacts import Artifact, External
from masters.config import TEACHER, Config, Model
from masters.errors import InputError
from masters.judge_url import base_url, is_url
from masters.machine import cache
from masters.models.checkpoints import check_readable, model_digest, resolve
from masters.models.families import FAMILIES, family_of
from masters.models.probe import Probed
from masters.models.soundness import check_maskable, check_sound
from masters.sources import Source, open_source
from masters.storage import Storage

RAY_SECONDS = 5.0  # for the head of a Ray cluster to answer
BEFORE, AFTER = "student-before", "student-after"  # the student's names in the predictions table
STUDENTS = (BEFORE, AFTER)


@dataclass(frozen=True)
class LocalModel:
    """A model folder on this machine, its name in tables and its identity."""

    name: str
    folder: Path
    digest: str
    made: Artifact | None = None  # the artifact that it was fetched from; None: it came from outside
    own_code: bool = False  # whether it runs code of its own, which this machine's owner trusts
    probed: Probed | None = None  # what its processor made of a small prompt; None: of none of our families

    @property
    def origin(self) -> Artifact | External:
        return self.made or External("model", str(self.folder), self.digest)


@dataclass(frozen=True)
class Server:
    """Where an OpenAI-compatible API begins, and the model's name there (None: the first that it lists)."""

    url: str
    model: str | None

    @property
    def origin(self) -> External:
        return External("server", self.url, None)


@dataclass(frozen=True)
class Ready:
    """A configuration whose parts were found and fit together."""

    storage: Storage
    source: Source
    student: LocalModel
    teachers: list[LocalModel]
    special_tokens: tuple[str, ...]  # of the tokenizer that all models share
    judge: LocalModel | Server | None = None  # None: no LLM judges, or each round's teacher does


def preflight(config: Config) -> Ready:
    """Check all parts together. Raises InputError with what was expected, what was found and what to do."""
    check_config(config)
    check_answers(config.runtime.cluster)
    check_installed(config)
    judge = judge_of(config)
    source = open_source(config.data)
    student = local_model(config.student, config.store.root)
    teachers = [local_model(teacher, config.store.root) for teacher in config.teachers]
    check_room(student, config)
    for teacher, wanted in zip(teachers, config.teachers, strict=True):
        check_pair(teacher, student)
        check_room(teacher, config)
        if wanted.r_max > 0:
            check_maskable(teacher.folder, tuple(config.mask.exclude))
    storage = open_storage(config.store.root)
    student, *teachers = distinct([student, *teachers])
    return Ready(storage, source, student, teachers, special_tokens(student.folder), judge)


def started_from(config: Config, trained: Artifact, name: str) -> Ready:
    """What preflight finds with a trained student as the student: lineage goes on into its train artifact."""
    folder = trained.storage.download(f"{trained.folder}/model", cache() / "models" / trained.parts["model"][:32])
    ready = preflight(config.model_copy(update=dict(student=Model(model=str(folder)))))
    return replace(ready, student=replace(ready.student, name=name, made=trained))


def check_answers(cluster: str | None) -> None:
    """Raises InputError if nothing listens where a Ray cluster should. Ray itself is asked when engines are."""
    if cluster is None:
        return
    host, port = cluster.rsplit(":", 1)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), RAY_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(
            f"runtime.ray_address: no Ray cluster answers at {cluster} ({error}); "
            "start its head with `ray start --head`, or leave the setting out"
        ) from error


def check_installed(config: Config) -> None:
    """Raises InputError where a stage would need a package that is not here."""
    if config.answers.verifier == "number" and find_spec("math_verify") is None:
        raise InputError(
            'answers.verifier = "number" needs math-verify, which is not installed: install masters[number], or take '
            '"final"'
        )
    if config.runtime.sharding == "zero3" and find_spec("deepspeed") is None:
        raise InputError(
            'runtime.sharding = "zero3" needs DeepSpeed, which is not installed: install masters[zero3], or take '
            '"fsdp2", which holds shares too'
        )


def distinct(models: list[LocalModel]) -> list[LocalModel]:
    """Models under names that tell them apart in tables: folders are often called the same, such as `final`."""
    digests: dict[str, set[str]] = {}
    for model in models:
        digests.setdefault(model.name, set()).add(model.digest)
    return [
        replace(model, name=f"{model.name}-{model.digest[:8]}")
        if len(digests[model.name]) > 1 or model.name in STUDENTS
        else model
        for model in models
    ]


def judge_of(config: Config) -> LocalModel | Server | None:
    """The judge that the configuration names, where it needs one beside the teachers."""
    rewards = config.rewards
    if rewards.accuracy != "llm" or not config.needs_verdicts or rewards.judge == TEACHER:
        return None
    if is_url(rewards.judge):
        return Server(base_url(rewards.judge), rewards.judge_model)
    try:
        return local_model(Model(model=rewards.judge), config.store.root)
    except InputError as error:
        raise InputError(f"rewards.judge: {error}") from error


def open_storage(root: str) -> Storage:
    """The store, allowed and proven to work."""
    allowed.check(Setting.STORES, "store.root", allowed.on_disk(root))
    try:
        storage = Storage(root)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(f"store.root {root!r} cannot be opened: {error}") from error
    storage.check()
    return storage


def local_model(model: Model, store: str | None = None) -> LocalModel:
    """A model that is allowed, here and sound. `store`: whose students are allowed too."""
    check_model(model.model, store)
    folder = resolve(model.model, model.revision)
    check_readable(folder)
    name = model.model if not Path(model.model).is_dir() else folder.name
    digest, kind = model_digest(folder), model_type(folder)
    own_code = kind not in FAMILIES and brings_code(folder)
    if own_code and not allowed.may_run_code(model.model, str(folder)):
        raise InputError(
            f"model {model.model} ({kind}) wants to run code of its own, which is off; whoever runs this machine can "
            f"name it in {Setting.CODE} after reading that code"
        )
    probed = check_sound(folder, digest, shaped=kind in FAMILIES)
    return LocalModel(name, folder, digest, own_code=own_code, probed=probed)


def check_pair(teacher: LocalModel, student: LocalModel) -> None:
    """A teacher and a student must be of one family, write the same tokens and be asked in the same ones."""
    kinds = [model_type(m.folder) for m in (teacher, student)]
    for kind in kinds:
        family_of(kind)
    if kinds[0] != kinds[1]:
        raise InputError(
            f"teacher {teacher.name} is {kinds[0]}, student {student.name} is {kinds[1]}: both must be of one family"
        )
    ours, theirs = (tokenizer(m.folder).get_vocab() for m in (teacher, student))
    if ours != theirs:
        differ = sum(1 for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise InputError(
            f"teacher {teacher.name} and student {student.name} have different tokenizers ({differ} tokens differ): "
            "distillation compares the same vocabulary; choose models that share one"
        )
    if teacher.probed and student.probed and (unlike := teacher.probed.unlike(student.probed)):
        raise InputError(
            f"teacher {teacher.name} and student {student.name} make different prompts of one question and picture: "
            f"{unlike}; distillation reads a response behind one prompt: give them the same chat template and "
            "processor_config.json (or preprocessor_config.json)"
        )


def check_room(model: LocalModel, config: Config) -> None:
    """A short question on a small picture and the longest answer fit what an engine admits of this model."""
    if model.probed is None:
        return
    prompt, answer, limit = model.probed.prompt, config.generate.max_tokens, config.runtime.max_model_len
    if prompt + answer > min(limit, model.probed.positions):
        raise InputError(
            f"model {model.name}: a short question on a small picture takes {prompt} tokens and generate.max_tokens "
            f"{answer}, together more than runtime.max_model_len ({limit}) or the model's max_position_embeddings "
            f"({model.probed.positions}): raise the one, or lower generate.max_tokens"
        )


def model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text())["model_type"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / 'config.json'} names no model_type: {error}") from error


def brings_code(folder: Path) -> bool:
    """Whether a model's configuration names Python code of its own."""
    return any('"auto_map"' in file.read_text(errors="replace") for file in folder.glob("*config.json"))


def special_tokens(folder: Path) -> tuple[str, ...]:
    """The texts that a tokenizer reads as control tokens, sorted."""
    return tuple(sorted(t.content for t in tokenizer(folder).added_tokens_decoder.values() if t.special))


def tokenizer(folder: Path):
    """The tokenizer; from its one file where there is one: choosing its class imports every model's code first."""
    if (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast as Tokenizer
    else:
        from transformers import AutoTokenizer as Tokenizer
    try:
        return Tokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {error}") from error


def warnings_of(config: Config) -> list[str]:
    """What is allowed but was found to do harm."""
    return [
        f"teacher {t.model}: r_max = {t.r_max} is above 0.2; "
        "in the paper three of four teachers did worse at 0.3 than without masks"
        for t in config.teachers
        if t.r_max > 0.2
    ]
