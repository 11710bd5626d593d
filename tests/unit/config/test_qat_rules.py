"""Test the key qat without torchao: which roundings are accepted, and with which other keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_run import CPU

from attnimg.config import check_values
from attnimg.config.qat_rules import QAT_DTYPES
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.check import require_package_of_qat

RUN: dict[str, Any] = {
    "base_model": "org/model", "learning_rate": 1e-4,
    "datasets": [{"path": "data.jsonl", "type": "completion"}],
}  # fmt: skip
INT4 = {"weight_dtype": "int4"}


def found(**keys: Any) -> list[tuple[str, str | None]]:
    result = check_values({**RUN, **keys}, file="c.yaml")
    assert all(error.why and error.do for error in result.errors)
    return [(error.code, error.key) for error in result.errors]


@pytest.mark.parametrize(
    "qat",
    [
        None,
        INT4,
        {**INT4, "activation_dtype": "int8"},
        {**INT4, "activation_dtype": None, "group_size": None, "quantize_embedding": None},
        {**INT4, "activation_dtype": "int8", "group_size": 256, "fake_quant_after_n_steps": 1000},
        {**INT4, "quantize_embedding": True, "fake_quant_after_n_steps": 0},
    ],
)
def test_a_simulated_rounding_is_accepted(qat: Any) -> None:
    assert found(qat=qat) == []


def test_a_null_is_the_default() -> None:
    config = check_values({**RUN, "qat": {**INT4, "group_size": None}}, file="c.yaml").config
    assert config is not None
    assert config.qat is not None
    assert config.qat.group_size == 32


@pytest.mark.parametrize(
    ("qat", "words"),
    [
        ({}, "int8, the default"),
        ({"activation_dtype": "int8"}, "int8, the default"),
        ({**INT4, "activation_dtype": "int4"}, "with int8 inputs"),
        ({**INT4, "activation_dtype": "fp8"}, "with int8 inputs"),
        ({"weight_dtype": "fp8", "activation_dtype": "fp8"}, "need a GPU"),
        ({"weight_dtype": "nvfp4", "activation_dtype": "nvfp4", "group_size": 16}, "raises"),
        ({"weight_dtype": "mxfp4", "activation_dtype": "mxfp4"}, "no gradient"),
        ({"weight_dtype": "ternary", "activation_dtype": "int8"}, "axolotl's own"),
        ({"weight_dtype": "int3"}, ", ".join(QAT_DTYPES)),
        ({**INT4, "activation_dtype": "int16"}, ", ".join(QAT_DTYPES)),
    ],
)
def test_another_rounding_is_refused_with_the_reason(qat: Any, words: str) -> None:
    (error,) = check_values({**RUN, "qat": qat}, file="c.yaml").errors
    assert (error.code, error.key) == ("bad-value", "qat")
    assert words in error.why


@pytest.mark.parametrize(
    ("qat", "code", "key"),
    [
        (True, "bad-value", "qat"),
        (False, "bad-value", "qat"),
        ("int4", "bad-value", "qat"),
        ({**INT4, "group_size": 1}, "bad-value", "qat.group_size"),
        ({**INT4, "group_size": "32"}, "bad-value", "qat.group_size"),
        ({**INT4, "fake_quant_after_n_steps": -1}, "bad-value", "qat.fake_quant_after_n_steps"),
        ({**INT4, "quantize_embedding": "yes"}, "bad-value", "qat.quantize_embedding"),
        ({**INT4, "groups": 32}, "unknown-key", "qat.groups"),
        ({"weight_dtype": 4}, "bad-value", "qat.weight_dtype"),
        ({**INT4, "activation_dtype": ""}, "bad-value", "qat.activation_dtype"),
    ],
)
def test_a_wrong_value_is_refused_by_name(qat: Any, code: str, key: str) -> None:
    assert found(qat=qat) == [(code, key)]


def test_a_value_of_the_wrong_kind_is_answered() -> None:
    (error,) = check_values({**RUN, "qat": {"weight_dtype": ["int4"]}}, file="c.yaml").errors
    assert error.do == "set qat.weight_dtype to a valid value"  # its default is refused
    (error,) = check_values({**RUN, "qat": "int4"}, file="c.yaml").errors
    assert error.why == "found 'int4'; needed a mapping of keys"


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"adapter": "lora"}, "adapter"),
        ({"adapter": "qlora"}, "adapter"),
        ({"torch_compile": True}, "torch_compile"),
        ({"deepspeed": {"zero": 1}}, "deepspeed"),
        ({"rl": "orpo", "datasets": [{"path": "d.jsonl", "type": "chat_template.argilla"}]}, "rl"),
    ],
)
def test_keys_that_contradict_it_are_refused(keys: dict[str, Any], named: str) -> None:
    assert found(**keys) == []
    (error,) = check_values({**RUN, "qat": INT4, **keys}, file="c.yaml").errors
    assert (error.code, error.key) == ("bad-value", "qat")
    assert error.what == f"qat contradicts {named}"


def test_sharding_and_liger_do_not_contradict_it() -> None:
    fsdp = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}
    liger = {"liger_rms_norm": True, "liger_glu_activation": True}
    assert found(qat=INT4, gradient_checkpointing=True, sample_packing=True, **fsdp, **liger) == []


def test_it_needs_torchao() -> None:
    config = Config.model_validate({**RUN, "qat": INT4})
    with pytest.raises(AttnimgError) as caught:
        require_package_of_qat(config, CPU)
    assert (caught.value.code, caught.value.key) == ("not-installed", "qat")
    assert caught.value.do == "pip install torchao, or remove qat"
    require_package_of_qat(config, replace(CPU, packages={"torchao": "0.18.0"}))
    require_package_of_qat(config, replace(CPU, packages=None))
    require_package_of_qat(Config.model_validate(RUN), CPU)
