"""The JSON Schema accepts and refuses the values of single keys as `check` does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnimg.config import check_values
from attnimg.config.attention import LEGACY
from attnimg.config.json_schema import config_schema
from attnimg.config.keys import COMPUTED, IN_SCHEMA, dataset_key_answers, key_answers
from attnimg.config.other_names import OTHER_NAMES, without_unset
from attnimg.config.read import parse_yaml
from attnimg.config.schema import Config, DatasetSpec

ROOT = Path(__file__).parents[3]
SCHEMA = config_schema()
KEYS, ENTRY = SCHEMA["properties"], SCHEMA["$defs"]["DatasetSpec"]["properties"]
REQUIRED: dict[str, Any] = {
    "base_model": "org/model",
    "learning_rate": 2e-4,
    "datasets": [{"path": "data.jsonl", "type": "chat_template"}],
}
# The package is in `make test/mistral`, whose packages need it, and not among the locked ones.
NEEDS = "jsonschema is not installed; `make test/mistral` has it"
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 0.5, 1.5, 2.5, 1e9, 3e9, "", "x", "auto", "2e-4", "-1",
    "org/name", "org/name@v1:fn", "a/b/c", "lora", "cosine", "steps", [], ["x"], [1], [0],
    [{"path": "x"}], [{}], {}, {"x": "y"}, {"path": "x"}, {"full": "sdpa"}, {"full": "fa2"},
    {"pad_token": "<p>"}, {"bnb_4bit_quant_type": "nf5"},
)  # fmt: skip
# Codes of errors about the value of one key, or about a key; others are about several keys.
CODES = {"bad-value", "unsupported-key", "unknown-key", "unknown-backend", "alias-rejected",
         "not-a-string", "missing-key", "computed-flag"}  # fmt: skip


@cache
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason=NEEDS)
    return jsonschema.Draft202012Validator(SCHEMA)


def is_valid(values: dict[str, Any]) -> bool:
    return bool(validator().is_valid(values))


def errors(values: dict[str, Any]) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return list(check_values(values, file="x.yaml").errors)


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each key with each value, in a config and in an entry of datasets."""
    for value in VALUES:
        for key in KEYS:
            yield key, {**REQUIRED, key: value}
        for key in ENTRY:
            entry = {"path": "data.jsonl", "type": "chat_template", key: value}
            yield f"datasets[0].{key}", {**REQUIRED, "datasets": [entry]}


@cache
def judged() -> list[tuple[str, dict[str, Any], list[Any], bool]]:
    """Return each case, the errors of `check`, and whether the schema accepts it."""
    return [(key, values, errors(values), is_valid(values)) for key, values in cases()]


def test_no_valid_value_of_any_key_is_marked_as_wrong() -> None:
    marked = [
        (key, values)
        for key, values, found, valid in judged()
        if not found and not valid and values.get("fsdp_version") is not True
    ]  # to Python, fsdp_version: true is 1
    assert marked == []
    assert sum(not found for _, _, found, _ in judged()) > 5000


def test_wrong_values_of_single_keys_are_marked() -> None:
    wrong = [
        (key, values, valid)
        for key, values, found, valid in judged()
        if any(error.code in CODES and is_about(error, key) for error in found)
        and not any("regular expression" in error.why for error in found)  # only Python reads them
        and is_single(key, values)
    ]
    assert [(key, values) for key, values, valid in wrong if valid] == []
    assert len(wrong) > 10_000


def is_about(error: Any, key: str) -> bool:
    return (error.key or "") == key or (error.key or "").startswith((f"{key}.", f"{key}["))


def is_single(key: str, values: dict[str, Any]) -> bool:
    """Return whether pydantic or the table of answers refuses the value, not a rule on keys."""
    from attnimg.config import _other_keys, _validate

    known = without_unset(values)
    if key in LEGACY or key in COMPUTED:
        return True
    if key in OTHER_NAMES:
        known[OTHER_NAMES[key]] = known.pop(key)
    _, found, _ = _validate({k: v for k, v in known.items() if k != "attn_implementation"})
    return bool(found) or bool([e for e in _other_keys(known, failed=set()) if e.why])


def test_the_examples_are_valid_and_name_the_schema() -> None:
    # examples/trainer is for other trainers.
    files = [*(ROOT / "examples").glob("*.yaml"), *(ROOT / "examples/demo").glob("*.yaml")]
    assert len(files) >= 5
    for file in files:
        text = file.read_text(encoding="utf-8")
        first = text.splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema="), file
        assert (
            file.parent / first.partition("=")[2]
        ).resolve() == ROOT / "docs/attnimg.schema.json"
        read = parse_yaml(text, name=str(file))
        assert errors(read) == []
        assert is_valid(read), file


@pytest.mark.parametrize("key", sorted(Config.model_fields.keys() - set(COMPUTED)))
def test_each_key_has_a_description_and_a_valid_example(key: str) -> None:
    assert KEYS[key]["description"]
    (example,) = KEYS[key]["examples"]
    Config.model_validate({key: example})
    assert is_valid({**REQUIRED, key: example})


@pytest.mark.parametrize("key", sorted(DatasetSpec.model_fields))
def test_each_key_of_an_entry_has_a_description_and_a_valid_example(key: str) -> None:
    assert ENTRY[key]["description"]
    (example,) = ENTRY[key]["examples"]
    DatasetSpec.model_validate({"path": "x", key: example})


def test_every_known_key_is_in_it_and_says_what_becomes_of_it() -> None:
    assert KEYS.keys() >= {*LEGACY, *OTHER_NAMES, *key_answers(), "plugins"}
    assert ENTRY.keys() == {*DatasetSpec.model_fields, *dataset_key_answers()}
    for key, answer in key_answers().items():
        if key in IN_SCHEMA:  # implemented in part
            continue
        assert KEYS[key]["deprecated"]
        assert KEYS[key]["description"].startswith(f"{answer.answer}: {answer.reason}")


@pytest.mark.parametrize("word", ["yes", "No", "ON", "off", "true", "False", "1"])
def test_flags_of_yaml_1_1_are_accepted_as_an_editor_reads_them(word: str) -> None:
    text = yaml.safe_dump(REQUIRED) + f"sample_packing: {word}\n"
    assert errors(parse_yaml(text, name="x")) == []
    # An editor reads YAML 1.2, in which yes and on are texts.
    as_editor = {"true": True, "False": False, "1": 1}.get(word, word)
    assert is_valid({**REQUIRED, "sample_packing": as_editor})
    assert not is_valid({**REQUIRED, "sample_packing": "maybe"})


@pytest.mark.parametrize(
    ("values", "valid"),
    [
        pytest.param(REQUIRED, True, id="what is required"),
        pytest.param({**REQUIRED, "sequence_le": 5}, False, id="an unknown key"),
        pytest.param({**REQUIRED, "tiled_mlp": True}, True, id="a hint"),
        pytest.param({**REQUIRED, "qat": {"a": 1}}, False, id="an unknown key of a mapping"),
        pytest.param({**REQUIRED, "qat": {}}, False, id="a mapping without what it needs"),
        pytest.param({**REQUIRED, "qat": {"weight_dtype": "nvfp4"}}, False, id="a refused value"),
        pytest.param({**REQUIRED, "qat": {"weight_dtype": "int4", "activation_dtype": "int8",
                                          "group_size": None}}, True, id="a mapping"),
        pytest.param({**REQUIRED, "relora": True}, False, id="a refused key"),
        pytest.param({**REQUIRED, "lora_other": False}, True, id="an adapter key that is off"),
        pytest.param({**REQUIRED, "lora_other": 1}, False, id="an unknown adapter key"),
        pytest.param({**REQUIRED, "flash_attention": True}, True, id="a legacy key"),
        pytest.param({"base_model": "x", "learning_rate": 1}, False, id="no data"),
        pytest.param({"base_model": "x", "learning_rate": 1, "pretraining_dataset": "x"}, True,
                     id="text to pretrain on"),
        pytest.param({**REQUIRED, "datasets": None}, False, id="null data"),
        pytest.param({**REQUIRED, "base_model": None}, False, id="no model"),
        pytest.param({**REQUIRED, "plugins": ["x.Y"]}, False, id="an unknown plugin"),
    ],
)  # fmt: skip
def test_whole_configs_are_judged_as_check_judges_them(values: dict[str, Any], valid: bool) -> None:
    assert (errors(values) == []) is valid
    assert is_valid(values) is valid


def test_the_schema_is_a_schema() -> None:
    validator().check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
