"""The run forms in Prefect's UI accept the same values as TOML files."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.flows import Flow
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import is_valid, preprocess_schema
from pydantic import ValidationError

from masters.config import Config
from masters.config.loading import load
from masters.config.study_file import load_study
from masters.flows.distill import distill
from masters.flows.evaluate import evaluate
from masters.flows.nightly import nightly
from masters.flows.study import study

SCHEMA = preprocess_schema(parameter_schema(distill).model_dump())
DEFINITIONS = parameter_schema(distill).model_dump()["definitions"]
TREE = load(Path(__file__).parents[2] / "configs/easyvqa.toml").model_dump()


def form_accepts(tree: dict) -> bool:
    return is_valid({"config": tree}, SCHEMA)


def toml_accepts(tree: dict) -> bool:
    """Return whether each value alone is valid. A form cannot check combinations, such as a share of 7 responses."""
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        return all(fault["type"] == "value_error" for fault in error.errors())
    return True


def fields() -> list[tuple[str, str, dict]]:
    """Return section, name and form schema of every field."""
    return [
        (section, name, schema)
        for section in TREE
        if isinstance(TREE[section], dict)
        for name, schema in DEFINITIONS[section.capitalize() if section != "student" else "Model"]["properties"].items()
    ]


def edge_values(schema: dict) -> list:
    """Return values on both sides of a field's bounds, and of other types."""
    kinds = schema.get("anyOf", [schema])
    bounds = [b for kind in kinds for key, b in kind.items() if "inimum" in key or "aximum" in key or "Length" in key]
    near = [b + d for b in bounds for d in (-1, -1e-9, 0, 1e-9, 1)]
    return [*near, *schema.get("enum", []), "none of them", "", None, True, 3, 0.5, [], ["x"], {}, "3"]


@pytest.mark.parametrize(
    ("section", "name", "schema"), fields(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_form_and_toml_agree_at_every_bound(section: str, name: str, schema: dict) -> None:
    for value in edge_values(schema):
        tree = TREE | {section: TREE[section] | {name: value}}
        assert form_accepts(tree) == toml_accepts(tree), (section, name, value)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.text(max_size=5),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-3, 100).map(float),
)


@settings(max_examples=300)
@given(st.sampled_from(fields()), VALUES)
def test_form_and_toml_agree_on_any_value(field: tuple[str, str, dict], value: object) -> None:
    section, name, _ = field
    tree = TREE | {section: TREE[section] | {name: value}}
    assert form_accepts(tree) == toml_accepts(tree), (section, name, value)


@pytest.mark.parametrize(
    "name", ["demo", "demo\n", "demo\n\n", "\ndemo", "-demo", "de mo", "d" * 64, "d" * 65, "", 7, None]
)
def test_form_and_toml_agree_on_names(name: object) -> None:
    assert form_accepts(TREE | {"name": name}) == toml_accepts(TREE | {"name": name})


def test_unknown_and_missing_keys_are_refused_by_both() -> None:
    for tree in (
        TREE | {"trian": {}},
        TREE | {"train": {"lerning_rate": 1}},
        TREE | {"teachers": []},
        {k: v for k, v in TREE.items() if k != "student"},
        TREE | {"teachers": [{"model": "t", "r_max": 1.5}]},
    ):
        assert (form_accepts(tree), toml_accepts(tree)) == (False, False)


def test_optional_sections_have_defaults() -> None:
    needed = {key: TREE[key] for key in ("name", "store", "data", "student", "teachers")}
    assert form_accepts(needed) and toml_accepts(needed)


def test_every_field_is_described() -> None:
    undescribed = [
        f"{kind}.{name}"
        for kind, schema in DEFINITIONS.items()
        for name, field in schema.get("properties", {}).items()
        if not field.get("description") and "$ref" not in field
    ]
    assert undescribed == []
    assert [kind for kind, schema in DEFINITIONS.items() if not schema.get("description")] == []


def test_the_form_of_a_study_accepts_the_content_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of an arm may have any key in the form; the flow validates them like those of a file."""
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    config, design = load_study(root / "configs/studies/easyvqa.toml")
    sent = dict(config=config.model_dump(mode="json"), design=design.model_dump(mode="json"))
    assert is_valid(sent, preprocess_schema(parameter_schema(study).model_dump()))
    assert study.validate_parameters(sent) == dict(config=config, design=design)


@pytest.mark.parametrize("flow", [distill, nightly, evaluate, study], ids=lambda flow: flow.name)
def test_every_parameter_is_described(flow: Flow) -> None:
    assert all(schema.get("description") for schema in parameter_schema(flow).properties.values())
