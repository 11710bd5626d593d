"""Checkpoints that are quantized: dequantized, kept under an adapter, or refused by name."""

from __future__ import annotations

import inspect
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import (
    DEQUANTIZED,
    Tensors,
    dequantized_case,
    fp8,
    plain,
    with_bitsandbytes,
    write,
)
from run_facts import a_context
from safetensors.torch import load_file, save_file

from attnimg.__main__ import run as attnimg
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import DType
from attnimg.selection.model_types import quantizations
from attnimg.train.base_model import judge_files
from attnimg.train.model import load_model
from attnimg.train.tokenizer import load_tokenizer

BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LORA, QLORA = {"adapter": "lora"}, {"adapter": "qlora"}
DEQUANTIZE = {"model_quantization_config_kwargs": {"dequantize": True}}
MXFP4_CLASS = {"model_quantization_config": "Mxfp4Config", **DEQUANTIZE}
FP8_CLASS = {"model_quantization_config": "FineGrainedFP8Config", **DEQUANTIZE}


def config_for(model: Path | str, **keys: Any) -> Config:
    return Config(
        base_model=str(model),
        learning_rate=1e-3,
        datasets=[{"path": "data.jsonl", "type": "completion"}],
        lora_r=4,
        lora_alpha=8,
        lora_target_linear=True,
        **keys,
    )


def judged(
    quantization: dict[str, Any] | None,
    *,
    packages: dict[str, str] | None = None,
    raw: dict[str, Any] | None = None,
    folder: Path | None = None,
    **keys: Any,
) -> tuple[list[AttnimgError], list[str]]:
    """Judge a llama with a quantization_config; errors, and the codes of the warnings."""
    given = {"quantization_config": quantization} if quantization else {}
    errors, warnings = judge_files(
        config_for("org/model", **keys),
        {"model_type": "llama", **given, **(raw or {})},
        packages={} if packages is None else packages,
        folder=folder,
    )
    return errors, [finding.code for finding in warnings]


def load(folder: Path, *, dtype: DType = "float32", **keys: Any) -> Any:
    values = config_for(folder, **keys)
    return load_model(
        values,
        tokenizer=load_tokenizer(values, log=lambda _: None),
        implementation="eager",
        context=a_context(dtype=dtype, autocast=None),
        needs_dtype_cast=False,
    )


def test_every_method_of_transformers_has_a_row_that_agrees_with_it() -> None:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )

    assert quantizations().keys() == AUTO_QUANTIZER_MAPPING.keys()
    for name, row in quantizations().items():
        assert row.source, name
        quantizer = AUTO_QUANTIZER_MAPPING[name]
        own = vars(quantizer).get("get_load_operations")
        dequantizes = own is not None and '"dequantize"' in inspect.getsource(own)
        if row.loaded != "refused":
            assert dequantizes is (row.loaded == "dequantized"), name
        assert bool(row.why) is (row.loaded == "refused"), name
        assert name in AUTO_QUANTIZATION_CONFIG_MAPPING


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DEQUANTIZED)
def test_weights_are_dequantized_as_the_checkpoint_says(
    tmp_path: Path, name: str, dtype: DType
) -> None:
    folder, meant = dequantized_case(tmp_path, name)
    raw = json.loads((folder / "config.json").read_text())
    errors, warnings = judge_files(config_for(folder), raw, packages={}, folder=folder)
    assert not errors, errors[0]
    assert "dequantized" in [finding.code for finding in warnings]
    model = load(folder, dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {weight.dtype for weight in model.parameters()} == {wanted}
    found = model.state_dict()
    for key, weight in meant.items():
        torch.testing.assert_close(found[key], weight.to(wanted), rtol=1e-6, atol=1e-6)
    assert all(weight.requires_grad for weight in model.parameters())
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-3  # as training does: what float8 holds no more
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    again = type(model).from_pretrained(tmp_path / "saved", dtype=wanted).state_dict()
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(again[key], weight, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "keys"), [("mxfp4", MXFP4_CLASS), ("fp8 in blocks", FP8_CLASS)])
def test_a_named_quantization_is_dequantized_as_without_its_name(
    tmp_path: Path, name: str, keys: dict[str, Any]
) -> None:
    folder, meant = dequantized_case(tmp_path, name)
    raw = json.loads((folder / "config.json").read_text())
    errors, warnings = judge_files(config_for(folder, **keys), raw, packages={}, folder=folder)
    assert not errors, errors[0]
    assert "dequantized" in [finding.code for finding in warnings]
    found = load(folder, **keys).state_dict()
    for key, weight in meant.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-6, atol=1e-6)


def test_a_named_quantization_of_plain_weights_is_a_warning() -> None:
    errors, codes = judged(None, **MXFP4_CLASS)
    assert (errors, codes) == ([], ["done-otherwise"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_arguments_of_bitsandbytes_are_those_of_the_loaded_weights(
    tmp_path: Path, kind: str
) -> None:
    given = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": kind == "fp4",
             "bnb_4bit_compute_dtype": "bfloat16"}  # fmt: skip
    model = load(plain(tmp_path / "plain"), **QLORA, bnb_config_kwargs=given)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert layer.weight.quant_state.quant_type == kind
    assert layer.weight.quant_state.nested is (kind == "fp4")
    assert layer.compute_dtype == torch.bfloat16


def test_a_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    source = plain(tmp_path / "plain")
    full = load_file(source / "model.safetensors")
    raw = json.loads((source / "config.json").read_text())
    torch.save(full, source / "pytorch_model.bin")
    assert judged(None, raw=raw, folder=source)[0] == [], "the safetensors are loaded"
    (source / "model.safetensors").unlink()
    errors, _ = judged(None, raw=raw, folder=source)
    assert [error.code for error in errors] == ["pickled-weights"]


def test_an_empty_quantization_config_says_nothing(tmp_path: Path) -> None:
    source = plain(tmp_path / "plain")
    folder = write(tmp_path / "empty", source, load_file(source / "model.safetensors"), {})
    found, meant = load(folder).state_dict(), load(source).state_dict()
    assert all(torch.equal(found[name], meant[name]) for name in meant)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_float8_weight_without_its_scale_is_refused(tmp_path: Path, kind: torch.dtype) -> None:
    source = plain(tmp_path / "plain")
    stored, _ = fp8(load_file(source / "model.safetensors"), block=128)
    name = "model.layers.1.mlp.up_proj.weight"
    stored[name] = stored[name].float().to(kind)
    whole = write(tmp_path / "whole", source, stored, FP8)
    assert judged(FP8, folder=whole)[0] == []
    del stored[f"{name}_scale_inv"]
    lacking = write(tmp_path / "lacking", source, stored, FP8)
    error = judged(FP8, folder=lacking)[0][0]
    assert name in (error.why or "")
    assert error.do.startswith("download all files of the checkpoint again")
    # Downloading again would not help where the scale has another name.
    stored[f"{name}_scale"] = torch.ones(1)
    error = judged(FP8, folder=write(tmp_path / "named", source, stored, FP8))[0][0]
    assert f"{name}_scale; transformers reads" in (error.why or "")
    assert error.do == "set base_model to the checkpoint that it was quantized from"


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(("bits", "adapter"), [(4, "qlora"), (4, "lora"), (8, "lora")])
def test_bitsandbytes_weights_stay_quantized_under_an_adapter(
    tmp_path: Path, bits: int, adapter: str
) -> None:
    folder = with_bitsandbytes(tmp_path, bits=bits)
    raw = json.loads((folder / "config.json").read_text())
    keys: dict[str, Any] = {"adapter": adapter}
    errors, _ = judge_files(config_for(folder, **keys), raw, packages={}, folder=folder)
    assert not errors, errors[0]
    model = load(folder, **keys)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("quantization", "keys", "says"),
    [
        pytest.param(BNB4, {}, "set adapter: qlora", id="4 bit without an adapter"),
        pytest.param(BNB8, {}, "set adapter: lora", id="8 bit without an adapter"),
        pytest.param(BNB8, QLORA, "set adapter: lora", id="8 bit under qlora"),
        pytest.param(BNB4, {**LORA, "load_in_8bit": True}, "remove load_in_8bit",
                     id="4 bit loaded in 8 bit"),
        pytest.param(BNB8, {**LORA, "load_in_4bit": True}, "remove load_in_4bit",
                     id="8 bit loaded in 4 bit"),
        pytest.param({"load_in_4bit": True}, {}, "set adapter: qlora",
                     id="old bitsandbytes configs name no method"),
        pytest.param(FP8, QLORA, "set adapter: lora", id="fp8 under qlora"),
        pytest.param(FP8, {**LORA, "load_in_8bit": True}, "remove load_in_8bit",
                     id="fp8 loaded in 8 bit"),
        pytest.param(FP8, MXFP4_CLASS, "remove model_quantization_config", id="fp8 named mxfp4"),
        pytest.param(BNB4, {**QLORA, "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}},
                     "remove bnb_config_kwargs", id="arguments for weights that are quantized"),
        pytest.param({"quant_method": "gptq"}, LORA, "pip install 'optimum'", id="gptq alone"),
        pytest.param({"quant_method": "awq"}, LORA, "pip install 'gptqmodel", id="awq alone"),
        pytest.param({"quant_method": "compressed-tensors"}, {},
                     "pip install 'compressed-tensors>=0.15.0'", id="compressed-tensors alone"),
        pytest.param({"quant_method": "fbgemm_fp8"}, {}, "set base_model", id="fbgemm"),
        pytest.param({"quant_method": "modelopt"}, {}, "set base_model", id="an unknown method"),
        pytest.param({"bits": 4}, LORA, "set base_model", id="no method at all"),
    ],
)  # fmt: skip
def test_what_a_run_can_t_use_is_refused_by_name_with_what_to_set(
    quantization: dict[str, Any], keys: dict[str, Any], says: str
) -> None:
    for raw in (
        {"quantization_config": quantization},
        {"compression_config": quantization},
        {"text_config": {"model_type": "llama", "quantization_config": quantization}},
    ):
        errors, _ = judged(None, raw=raw, **keys)
        assert [error.code for error in errors] == ["quantized-checkpoint"]
        assert says in errors[0].do
        assert str(quantization.get("quant_method", "")) in str(errors[0])


@pytest.mark.parametrize(
    ("quantization", "packages", "keys"),
    [
        pytest.param(None, {}, {}, id="not quantized"),
        pytest.param(None, {}, {**LORA, "load_in_8bit": True}, id="quantized by the run"),
        pytest.param(BNB4, {}, QLORA, id="4 bit under qlora"),
        pytest.param(BNB4, {}, {**QLORA, "load_in_4bit": True}, id="said twice"),
        pytest.param(BNB8, {}, {**LORA, "load_in_8bit": True}, id="8 bit said twice"),
        pytest.param(FP8, {}, LORA, id="fp8 under lora"),
        pytest.param({"quant_method": "gptq"}, {"optimum": "2.1", "gptqmodel": "5.0"}, LORA,
                     id="gptq with its packages"),
        pytest.param({"quant_method": "gptq", "bits": 4}, {"optimum": "2.1", "gptqmodel": "5.0"},
                     QLORA, id="gptq in 4 bits under qlora"),
        pytest.param({"quant_method": "awq", "bits": 4}, {"gptqmodel": "5.0"}, QLORA,
                     id="awq in 4 bits under qlora"),
        pytest.param({"quant_method": "compressed-tensors"}, {"compressed-tensors": "0.15.1"}, {},
                     id="compressed-tensors with its package"),
        pytest.param({"quant_method": "torchao",
                      "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
                     {"torchao": "0.15"}, LORA, id="torchao in 8 bit"),
    ],
)  # fmt: skip
def test_what_a_run_can_use_passes(
    quantization: dict[str, Any] | None, packages: dict[str, str], keys: dict[str, Any]
) -> None:
    errors, _ = judged(quantization, packages=packages, **keys)
    assert not errors, errors[0]


def test_torchao_names_the_bits_of_weights_after_those_of_inputs() -> None:
    name = "Int8DynamicActivationInt4WeightConfig"
    stored = {"quant_method": "torchao", "quant_type": {"default": {"_type": name}}}
    errors, _ = judged(stored, packages={"torchao": "0.15"}, **LORA)
    assert "found weights of 4 bits; only torchao weights of 8 bits" in errors[0].why


def test_a_package_that_is_too_old_is_named_with_both_versions() -> None:
    errors, _ = judged(
        {"quant_method": "compressed-tensors"}, packages={"compressed-tensors": "0.14.0"}
    )
    assert "found compressed-tensors 0.14.0; needed compressed-tensors>=0.15.0" in errors[0].why


def without_scale(stored: Tensors) -> Tensors:
    return {name: tensor for name, tensor in stored.items() if "layers.1.mlp.up" not in name
            or not name.endswith("_scale_inv")}  # fmt: skip


def with_a_scale_that_does_not_divide(stored: Tensors) -> Tensors:
    name = "model.layers.0.self_attn.k_proj.weight_scale_inv"
    return {**stored, name: torch.ones(3, 1)}


@pytest.mark.parametrize(
    ("change", "quantization", "says"),
    [
        pytest.param(without_scale, FP8, "without model.layers.1.mlp.up_proj.weight_scale_inv",
                     id="a scale is missing"),
        pytest.param(with_a_scale_that_does_not_divide, FP8, "multiples of the number of scales",
                     id="a scale does not divide its weight"),
        pytest.param(lambda stored: stored, None, "config.json has no quantization_config",
                     id="the config says nothing"),
        pytest.param(lambda stored: {name: tensor.view(torch.uint8) if tensor.element_size() == 1
                                     else tensor for name, tensor in stored.items()
                                     if not name.endswith("_scale_inv")}, None,
                     "config.json has no quantization_config", id="integers as weights"),
    ],
)  # fmt: skip
def test_numbers_that_would_be_loaded_as_weights_are_refused_before(
    tmp_path: Path, change: Any, quantization: dict[str, Any] | None, says: str
) -> None:
    source = plain(tmp_path / "plain")
    stored, _ = fp8(load_file(source / "model.safetensors"), block=128)
    folder = write(tmp_path / "bad", source, change(stored), quantization or {})
    errors, _ = judged(quantization, folder=folder)
    assert [error.code for error in errors] == ["quantized-checkpoint"]
    assert says in errors[0].why
    if quantization is None:
        return
    with pytest.raises(AttnimgError) as caught:
        load(folder)
    assert caught.value.exit_code == 2


def test_a_mask_that_old_checkpoints_store_is_no_quantized_weight(tmp_path: Path) -> None:
    save_file(
        {"h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8), "wte.weight": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    errors, _ = judged(None, folder=tmp_path)
    assert not errors, errors[0]


@pytest.mark.parametrize(
    ("quantization", "errors", "warnings"),
    [
        pytest.param({"quant_method": "quark"}, ["quantized-checkpoint"], [], id="no run can"),
        pytest.param(BNB4, [], ["quantized-checkpoint"], id="a run with an adapter can"),
        pytest.param(FP8, [], ["dequantized"], id="any run can"),
        pytest.param(None, [], [], id="not quantized"),
    ],
)
def test_explain_judges_a_folder_as_a_config_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quantization: Any, errors: list[str],
    warnings: list[str],
) -> None:  # fmt: skip
    folder = plain(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": quantization} if quantization else {}
    # Its rows may be of any length: nothing is said of positions.
    config["max_position_embeddings"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    assert attnimg(["explain", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [error["code"] for error in found["errors"]] == errors
    assert [note["code"] for note in found["warnings"]] == warnings


@pytest.mark.parametrize("command", ["explain", "train"])
def test_both_commands_refuse_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = plain(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quark"}
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "data.jsonl").write_text('{"text": "the ship"}\n')
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "base_model": str(folder),
                "learning_rate": 1e-3,
                "datasets": [{"path": str(tmp_path / "data.jsonl"), "type": "completion"}],
                "output_dir": str(tmp_path / "out"),
            }
        )
    )
    (folder / "model.safetensors").write_bytes(b"never read")
    code = attnimg([command, str(tmp_path / "run.yaml")])
    assert code == (2 if command == "train" else 0)
    assert "quantized (quark)" in capsys.readouterr().err


def test_compressed_tensors_are_decompressed(tmp_path: Path) -> None:
    try:
        metadata.version("compressed-tensors")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package compressed-tensors")
    source = plain(tmp_path / "plain")
    stored, meant = fp8(load_file(source / "model.safetensors"), block=None)
    renamed = {
        name.replace("_scale_inv", "_scale"): tensor.reshape(1) if "_scale_inv" in name else tensor
        for name, tensor in stored.items()
    }
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True,
               "dynamic": False}  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "float-quantized"}}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": groups,
    }
    folder = write(tmp_path / "compressed", source, renamed, quantization)
    model = load(folder)
    found = model.state_dict()
    for key, weight in meant.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


@pytest.mark.parametrize("quantization", [BNB4, BNB8, FP8, {"quant_method": "mxfp4"}])
def test_a_quantization_config_beside_whole_weights_is_refused(
    tmp_path: Path, quantization: dict[str, Any]
) -> None:
    folder = plain(tmp_path / "plain")
    raw = json.loads((folder / "config.json").read_text())
    assert not judge_files(config_for(folder, **LORA), raw, packages={}, folder=folder)[0]
    given = {**raw, "quantization_config": quantization}
    errors, _ = judge_files(config_for(folder, **LORA), given, packages={}, folder=folder)
    assert [error.code for error in errors] == ["quantized-checkpoint"]
    assert "only unquantized weights in its files: F32" in errors[0].why
    assert errors[0].do == "remove quantization_config from its config.json"
