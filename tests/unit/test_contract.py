"""The config contract, row by row: names, flags, legacy keys, and checks on values alone."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from attnimg.config import check_values
from attnimg.config.schema import CheckResult
from attnimg.errors import AttnimgError
from attnimg.selection.gpus_and_images import parse_gpu

REQUIRED: dict[str, Any] = {
    "base_model": "org/model",
    "learning_rate": 2e-4,
    "datasets": [{"path": "data.jsonl", "type": "alpaca"}],
}


def check(
    values: dict[str, Any], *, on: str | None = None, torch: str | None = None
) -> CheckResult:
    arch = parse_gpu(on).arch if on else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return check_values(REQUIRED | values, file="x.yaml", on=arch, torch=torch)


def codes(checked: CheckResult) -> tuple[list[str], list[str]]:
    return [e.code for e in checked.errors], [w.code for w in checked.warnings]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (None, (False, False, False)),
        ("eager", (False, False, False)),
        ("sdpa", (False, False, False)),
        ("flash_attention_2", (True, True, True)),
        ("flash_attention_3", (True, True, True)),
        ("flash_attention_4", (True, False, True)),
        ("flex_attention", (True, False, True)),
        ("xformers", (True, False, True)),
        ("sage", (True, False, True)),
        ("s2", (False, True, True)),
        ("fp8", (False, False, True)),
        ("kernels-community/flash-attn2", (True, True, True)),
        ("kernels-community/flash-attn3", (True, True, True)),
        ("kernels-community/flash-attn3@v1:flash_attn_func", (True, True, True)),
        ("kernels-community/sage-attention", (True, False, True)),
        ("kernels-community/vllm-flash-attn3", (False, False, True)),
        ("some-org/kernel@main", (False, False, True)),
        ("auto", (None, None, None)),
    ],
)
def test_each_name_has_its_flags(name: str | None, flags: tuple[bool | None, ...]) -> None:
    config = check({"attn_implementation": name}).config
    assert config is not None
    assert config.attn_implementation == name
    assert (
        config.attn_supports_packing,
        config.attn_uses_flash_lib,
        config.attn_needs_dtype_cast,
    ) == flags


@pytest.mark.parametrize(
    ("alias", "canonical"),
    [
        ("flash", "flash_attention_2"),
        ("flash_attn", "flash_attention_2"),
        ("fa2", "flash_attention_2"),
        ("fa3", "flash_attention_3"),
        ("fa4", "flash_attention_4"),
        ("flex", "flex_attention"),
        ("sdp", "sdpa"),
        ("sdpa_attention", "sdpa"),
        ("xformer", "xformers"),
        ("sageattention", "sage"),
    ],
)
def test_an_alias_is_rejected_by_its_canonical_name(alias: str, canonical: str) -> None:
    checked = check({"attn_implementation": alias, "sample_packing": True})
    assert codes(checked) == (["alias-rejected"], [])
    assert canonical in checked.errors[0].do
    assert checked.config is not None
    assert checked.config.attn_implementation is None


@pytest.mark.parametrize(
    ("value", "code"),
    [
        *[(name, "unknown-backend") for name in ("Flash", "SDPA", " sdpa", "sdpa ", "", "paged")],
        *[(name, "unknown-backend") for name in ("sdpa_flash", "varlen_attn", "math")],
        *[(name, "unknown-backend") for name in ("/", "a/b/c", "./x", "a/", "/b", "a/b@", "a/b:")],
        *[(value, "not-a-string") for value in (True, 2, 1.5, ["sdpa"], {"a": 1})],
    ],
)
def test_what_is_no_name_is_refused(value: object, code: str) -> None:
    assert codes(check({"attn_implementation": value})) == ([code], [])


def test_the_nearest_name_is_named() -> None:
    assert "flash_attention_2" in check({"attn_implementation": "flash_attention"}).errors[0].do


@pytest.mark.parametrize(
    ("keys", "becomes", "ignored"),
    [
        (["flash_attention"], "flash_attention_2", []),
        (["sdp_attention"], "sdpa", []),
        (["xformers_attention"], "xformers", []),
        (["flex_attention"], "flex_attention", []),
        (["sage_attention"], "sage", []),
        (["s2_attention"], "s2", []),
        (["eager_attention"], "eager", []),
        (["flash_attention", "s2_attention"], "s2", ["flash_attention"]),
        (
            ["eager_attention", "sdp_attention", "flash_attention", "flex_attention",
             "sage_attention", "s2_attention", "xformers_attention"],
            "xformers",
            ["s2_attention", "sage_attention", "flex_attention", "flash_attention",
             "sdp_attention", "eager_attention"],
        ),
    ],
)  # fmt: skip
def test_legacy_keys_become_a_name(keys: list[str], becomes: str, ignored: list[str]) -> None:
    values = REQUIRED | {"adapter": "lora"} | dict.fromkeys(keys, True)
    with pytest.warns(DeprecationWarning, match="attn_implementation") as caught:
        checked = check_values(values, file="x.yaml")
    assert len(caught) == len(keys)
    assert checked.ok
    assert checked.config is not None
    assert checked.config.attn_implementation == checked.requested == becomes
    found = {(w.code, w.key) for w in checked.warnings}
    assert found == {("legacy-flag-deprecated", key) for key in keys} | {
        ("legacy-flag-ignored", key) for key in ignored
    }
    assert not set(keys) & set(checked.config.model_dump())


@pytest.mark.parametrize("value", [False, None, 0])
def test_a_false_legacy_key_is_stripped_in_silence(value: object) -> None:
    checked = check({"flash_attention": value, "attn_implementation": "sdpa"})
    assert codes(checked) == ([], [])
    assert checked.requested == "sdpa"


@pytest.mark.parametrize("value", ["false", "true", 2, 1.0, []])
def test_a_legacy_key_takes_no_other_value(value: object) -> None:
    assert codes(check({"flash_attention": value})) == (["bad-value"], [])


@pytest.mark.parametrize("name", ["flash_attention_2", "sdpa", "", "auto"])
def test_a_name_and_a_legacy_key_exclude_each_other(name: str) -> None:
    errors, found = codes(check({"attn_implementation": name, "flash_attention": 1}))
    assert "canonical-plus-legacy" in errors
    assert found == ["legacy-flag-deprecated"]


FA2, PACK = {"attn_implementation": "flash_attention_2"}, {"sample_packing": True}
HUB = {"attn_implementation": "org/kernel"}


def named(name: str, **more: object) -> dict[str, object]:
    return {"attn_implementation": name, **more}


@pytest.mark.parametrize(
    ("values", "errors", "found"),
    [
        pytest.param({}, [], [], id="a plain config passes"),
        pytest.param(PACK, [], [], id="packing without a name is left to train"),
        pytest.param(named("auto") | PACK, [], [], id="packing with auto is left to train"),
        pytest.param(named("eager") | PACK, [], ["packing-by-mask"], id="eager packs by mask"),
        pytest.param(named("sdpa") | PACK, [], ["packing-by-mask"], id="sdpa packs by mask"),
        pytest.param(FA2 | PACK, [], [], id="flash packs"),
        pytest.param(named("s2") | PACK, ["s2-with-packing"], [], id="s2 does not pack"),
        pytest.param(named("fp8") | PACK, ["packing-not-isolated"], [], id="fp8 does not pack"),
        pytest.param(
            named("fp8", trust_remote_code=True) | PACK,
            ["packing-not-isolated"],
            [],
            id="trust does not help fp8",
        ),
        pytest.param(HUB | PACK, ["packing-not-isolated"], [], id="an unread kernel does not pack"),
        pytest.param(
            HUB | PACK | {"trust_remote_code": True},
            [],
            ["packing-unproven"],
            id="a trusted one has to prove it",
        ),
        pytest.param(named("sage"), [], ["sage-full-finetune"], id="sage wants an adapter"),
        pytest.param(named("sage", adapter="lora"), [], [], id="sage with lora"),
        pytest.param(named("sage", adapter="qlora"), [], [], id="sage with qlora"),
        pytest.param(FA2 | {"batch_flattening": True}, [], [], id="flash flattens"),
        pytest.param(
            {"batch_flattening": True},
            ["batch-flattening-needs-varlen"],
            [],
            id="no name does not flatten",
        ),
        pytest.param(
            named("auto", batch_flattening=True), [], [], id="auto has no attention error"
        ),
        pytest.param(
            named("sdpa", batch_flattening=True) | PACK,
            ["batch-flattening-needs-varlen", "batch-flattening-with-packing"],
            ["packing-by-mask"],
            id="both rows of batch_flattening",
        ),
        pytest.param(
            FA2 | {"scaling_softmax": True},
            ["scaling-softmax-needs-flex"],
            [],
            id="scaling_softmax needs flex",
        ),
        pytest.param(
            named("flex_attention", scaling_softmax=True),
            ["unsupported-key"],
            [],
            id="after its own row, scaling_softmax is not implemented",
        ),
        pytest.param(
            named("sdpa", context_parallel_size=2), ["cp-needs-flash"], [], id="cp needs flash"
        ),
        pytest.param(
            FA2 | PACK | {"context_parallel_size": 2, "micro_batch_size": 2},
            ["cp-packing-mbs1"],
            [],
            id="cp with packing takes one row",
        ),
        pytest.param(
            FA2 | {"context_parallel_size": 2}, ["unsupported-key"], [], id="cp is not implemented"
        ),
        pytest.param({"context_parallel_size": 0}, [], [], id="cp of 0 means 1"),
        pytest.param({"context_parallel_size": 1}, [], [], id="cp of 1 is no cp"),
        pytest.param({"context_parallel_size": -1}, ["bad-value"], [], id="cp is not negative"),
        pytest.param({"rl": "dpo"} | PACK, ["packing-with-rl"], [], id="rl does not pack"),
        pytest.param({"rl": "dpo"}, ["unsupported-key"], [], id="rl needs pairs of answers"),
        pytest.param({"rl": "grpo"}, ["unsupported-key"], [], id="rl of rewards"),
        pytest.param(
            {"rl": "dpo", "datasets": [{"path": "a", "type": "chatml.intel"}]},
            [],
            [],
            id="rl with pairs of answers",
        ),
        pytest.param({"rl": False}, [], [], id="no rl is no rl"),
        pytest.param({"learning_rate": 0}, ["bad-value"], [], id="learning_rate 0"),
        pytest.param({"learning_rate": "fast"}, ["bad-value"], [], id="learning_rate in words"),
        pytest.param({"sequence_len": 0}, ["bad-value"], [], id="sequence_len 0"),
        pytest.param({"micro_batch_size": 0}, ["bad-value"], [], id="micro_batch_size 0"),
        pytest.param({"attn_check_steps": -1}, ["bad-value"], [], id="attn_check_steps -1"),
        pytest.param({"attn_check_steps": 1.5}, ["bad-value"], [], id="attn_check_steps 1.5"),
        pytest.param({"attn_check_steps": 0}, [], [], id="attn_check_steps 0"),
        pytest.param({"micro_batch_size": True}, ["bad-value"], [], id="true is no number"),
        pytest.param({"sample_packing": "yes"}, ["bad-value"], [], id='"yes" is no boolean'),
        pytest.param({"adapter": "llama-adapter"}, ["bad-value"], [], id="an adapter we lack"),
        pytest.param({"val_set_size": 1.0}, ["bad-value"], [], id="1.0 leaves nothing to train on"),
        pytest.param({"val_set_size": 2.5}, ["bad-value"], [], id="half a document"),
        pytest.param({"val_set_size": 2}, [], [], id="two documents"),
        pytest.param({"val_set_size": 0.99}, [], [], id="a share of the documents"),
        pytest.param({"datasets": []}, ["bad-value"], [], id="an empty list of data sets"),
        pytest.param(
            {"datasets": [{"path": "a", "type": "completions"}]},
            ["bad-value"],
            [],
            id="a typo of a dataset type",
        ),
        pytest.param({"datasets": [{"path": "a", "type": "alpaca"}]}, [], [], id="a dataset type"),
        pytest.param({"datasets": [{"type": "alpaca"}]}, ["missing-key"], [], id="no path"),
        pytest.param(
            {"datasets": [{"path": "x", "typ": "alpaca"}]}, ["unknown-key"], [], id="in a data set"
        ),
        pytest.param(
            {"datasets": [{"path": "x", "input_transform": "t"}]},
            ["unsupported-key"],
            [],
            id="a key of a data set",
        ),
        pytest.param(
            {"datasets": [{"path": "x", "input_transform": None}]},
            [],
            [],
            id="a null in a data set",
        ),
        pytest.param({"attn_implementaton": "sdpa"}, ["unknown-key"], [], id="a typo"),
        pytest.param({"wandb_project": "p"}, [], [], id="a tracker"),
        pytest.param({"swanlab_project": "p"}, ["unsupported-key"], [], id="another tracker"),
        pytest.param({"wandb_project": None}, [], [], id="no tracker"),
        pytest.param({"use_wandb": 0, "unfrozen_parameters": []}, [], [], id="nothing asked for"),
        pytest.param({"lora_bias": "all"}, ["unsupported-key"], [], id="any lora key is known"),
        pytest.param({"lora_bias": False}, [], [], id="any lora key, off"),
        pytest.param({"lora_droput": 0}, ["unsupported-key"], [], id="a misspelt key of 0"),
        pytest.param({"rl": True}, ["unsupported-key"], [], id="rl of true"),
        pytest.param({"rl": True} | PACK, ["packing-with-rl"], [], id="rl of true does not pack"),
        pytest.param({"seed": 2**32}, ["bad-value"], [], id="a seed too large"),
        pytest.param({"sequence_len": 10**20}, ["bad-value"], [], id="a length too large"),
        pytest.param({"special_tokens": {"pad_token": None}}, [], [], id="a null special token"),
        pytest.param({"special_tokens": {"foo": "x"}}, ["bad-value"], [], id="no special token"),
        pytest.param({"special_tokens": {"pad_token": 5}}, ["bad-value"], [], id="5 is no token"),
        pytest.param(
            {"datasets": [{"path": "x", "input_transform": False}]},
            [],
            [],
            id="false in a data set",
        ),
        pytest.param({"liger_rope": False}, [], [], id="a plugin's key, off"),
        pytest.param({"attn_supports_packing": True}, ["computed-flag"], [], id="a computed flag"),
        pytest.param({"attn_uses_flash_lib": False}, ["computed-flag"], [], id="another one"),
        pytest.param({"attn_needs_dtype_cast": None}, [], [], id="a computed flag of null"),
        pytest.param({"fp16": True, "bf16": True}, ["bad-value"], [], id="two precisions"),
        pytest.param({"load_in_4bit": True}, ["bad-value"], [], id="4 bits and no adapter"),
    ],
)
def test_rows_on_values(values: dict[str, Any], errors: list[str], found: list[str]) -> None:
    assert codes(check(values)) == (errors, found)


@pytest.mark.parametrize(
    ("key", "do"),
    [
        ("lora_alpa", "did you mean lora_alpha?"),
        ("lora_target_module", "did you mean lora_target_modules?"),
        ("lora_zzzz", "remove it; docs/config-keys.md lists the keys"),
    ],
)
def test_a_misspelt_key_of_an_adapter_is_not_said_to_be_axolotls(key: str, do: str) -> None:
    (error,) = check({key: 3}).errors
    assert (error.what, error.do) == (f"{key} is not a known key", do)
    assert "neither attnimg nor axolotl knows it" in error.why


@pytest.mark.parametrize("missing", ["base_model", "learning_rate", "datasets"])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_three_keys_have_no_default(missing: str, how: str) -> None:
    values = dict(REQUIRED) | ({missing: None} if how == "null" else {})
    if how == "absent":
        del values[missing]
    checked = check_values(values, file="x.yaml")
    assert [(e.code, e.key) for e in checked.errors] == [("missing-key", missing)]


def test_pretraining_data_stands_in_for_datasets() -> None:
    values = REQUIRED | {"datasets": None, "pretraining_dataset": "corpus.txt"}
    assert check_values(values, file="x.yaml").ok


@pytest.mark.parametrize(
    ("values", "on", "errors"),
    [
        *[(named("sage", adapter="lora"), gpu, []) for gpu in
          ("sm_80", "sm_86", "l4", "h100", "rtx5090", "sm_121")],
        *[(named("sage", adapter="lora"), gpu, ["sage-arch"]) for gpu in
          ("t4", "sm_87", "b200", "b300", "cpu", "mi300x")],
        *[(named("fp8"), gpu, []) for gpu in ("h100", "h200")],
        *[(named("fp8"), gpu, ["fp8-arch"]) for gpu in
          ("a100", "b200", "rtx5090", "cpu", "gfx942")],
        *[(FA2, gpu, []) for gpu in ("a100", "l4", "h100", "b200", "rtx5090", "mi300x")],
        *[(FA2, gpu, ["arch-too-old"]) for gpu in ("t4", "v100", "sm_61", "cpu")],
        *[(named("flash_attention_3"), gpu, []) for gpu in ("h100", "sm_90")],
        *[(named("flash_attention_3"), gpu, ["arch-mismatch"]) for gpu in
          ("a100", "b200", "t4", "cpu", "mi300x")],
        *[(named("flash_attention_4"), gpu, []) for gpu in ("h100", "b200", "b300", "rtx5090")],
        *[(named("flash_attention_4"), gpu, ["arch-too-old"]) for gpu in ("a100", "l4", "cpu")],
        (named("flash_attention_4"), "sm_130", ["arch-mismatch"]),
        *[(FA2, gpu, []) for gpu in ("rx7900xtx", "gfx906")],
        *[(named("xformers"), gpu, []) for gpu in ("t4", "v100", "a100", "b200", "mi355x")],
        (named("xformers"), "cpu", ["arch-too-old"]),
        *[(named("sdpa"), gpu, []) for gpu in ("t4", "cpu", "mi300x", "sm_999")],
    ],
)  # fmt: skip
def test_rows_on_gpus(values: dict[str, Any], on: str, errors: list[str]) -> None:
    assert codes(check(values, on=on))[0] == errors
    assert codes(check(values))[0] == []


def test_flash_on_turing_names_what_runs_there() -> None:
    do = check(FA2, on="t4").errors[0].do
    assert "xformers" in do
    assert "sdpa" in do


@pytest.mark.parametrize(
    ("values", "on", "found"),
    [
        (named("flex_attention"), "h100", ["flex-uncompiled"]),
        (named("flex_attention"), "cpu", []),
        (named("flex_attention"), None, []),
        (named("flex_attention", torch_compile=True), "h100", []),
        (named("sdpa"), "h100", []),
    ],
)
def test_flex_is_slow_uncompiled(values: dict[str, Any], on: str | None, found: list[str]) -> None:
    assert codes(check(values, on=on)) == ([], found)


@pytest.mark.parametrize(
    ("name", "torch", "errors"),
    [
        ("flex_attention", "2.5.1", ["flex-torch"]),
        ("flex_attention", "2.6.0", []),
        ("fp8", "2.10.0+cu128", ["fp8-torch"]),
        ("fp8", "2.11.0+cu130", []),
        ("fp8", None, []),
        ("sdpa", "1.13", []),
        ("flex_attention", "2.6.0a0", []),
        ("fp8", "2.12.0.dev20260101+cu130", []),
    ],
)
def test_rows_on_versions(name: str, torch: str | None, errors: list[str]) -> None:
    assert codes(check(named(name), torch=torch))[0] == errors


@pytest.mark.parametrize("version", ["", "2", "new", "2.5junk", "2.5+", " 2.5", "v2.5", "2.5.1.x"])
def test_what_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(AttnimgError):
        check({}, torch=version)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("attn_implementaton", "attn_implementation"),
        ("lr", "learning_rate"),
        ("max_seq_length", "sequence_len"),
        ("per_device_train_batch_size", "micro_batch_size"),
    ],
)
def test_an_unknown_key_names_the_one_that_is_meant(key: str, known: str) -> None:
    (error,) = check({key: 1}).errors
    assert error.code == "unknown-key"
    assert known in error.do


def test_every_error_is_listed() -> None:
    values = {"nonsense": 1, "rl": "grpo", "micro_batch_size": 0, "attn_implementation": "fa2"}
    checked = check_values(values, file="x.yaml")
    assert sorted(e.code for e in checked.errors) == sorted(
        ["alias-rejected", "missing-key", "missing-key", "missing-key", "bad-value",
         "unknown-key", "unsupported-key"]
    )  # fmt: skip
    assert all(e.what and e.why and e.do for e in checked.errors)
