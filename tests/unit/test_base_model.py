"""Test the checks on positions and multimodal parts, and what is saved of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_vlms import tiny_vlm

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.selection.model_types import position_table, read_causal_types
from attnimg.train.base_model import class_to_load, judge_files, rope_positions
from attnimg.train.lora import freeze_other_parts
from attnimg.train.model import attention_by_part
from attnimg.train.model_files import correct_saved_config, read_tensor_headers, unused_weights

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
WHOLE = "Qwen3_5ForConditionalGeneration"
QWEN = {"model_type": "qwen3_5", "architectures": [WHOLE], "vision_config": {"depth": 1},
        "text_config": {"model_type": "qwen3_5_text"}}  # fmt: skip
LLAVA = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
         "vision_config": {"depth": 1}, "text_config": {"model_type": "llama"}}  # fmt: skip


def judged(raw: dict[str, Any], **keys: Any) -> tuple[list[AttnimgError], dict[str, str]]:
    """Judge a base model; its errors, and code -> do of its warnings."""
    values = Config(base_model="org/model", learning_rate=1e-3, **keys)
    errors, warnings = judge_files(values, raw, packages={}, folder=None)
    return errors, {finding.code: f"{finding.what}\n{finding.do}" for finding in warnings}


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "biogpt", "gptj", "ctrl", "mpt", "roberta"])
def test_a_row_longer_than_the_table_raises_and_one_as_long_does_not(model_type: str) -> None:
    table = position_table(model_type)
    assert table is not None
    changes: dict[str, Any] = {"is_decoder": True} if model_type == "roberta" else {}
    model = tiny_model(model_type, **{table.keys[0]: 16}, **changes).eval()
    longest = 16 - (model.config.pad_token_id + 1 if table.reserved else 0)
    model(input_ids=torch.full((1, longest), 7), use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 7), use_cache=False)


@pytest.mark.parametrize("model_type", ["llama", "bloom", "xglm", "falcon"])
def test_a_type_without_a_table_takes_longer_rows(model_type: str) -> None:
    assert position_table(model_type) is None
    model = tiny_model(model_type).eval()
    model(input_ids=torch.full((1, 300), 7), use_cache=False)


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        pytest.param({"model_type": "gpt2", "n_positions": 256}, 256, id="gpt2"),
        pytest.param({"model_type": "gpt2"}, 1024, id="gpt2's default"),
        pytest.param({"model_type": "gpt_bigcode", "max_position_embeddings": 512}, 512,
                     id="under its other name"),
        pytest.param({"model_type": "opt", "max_position_embeddings": 2048}, 2048, id="opt"),
        pytest.param({"model_type": "xlm-roberta", "max_position_embeddings": 514,
                      "is_decoder": True}, 512, id="two places are the padding's"),
        pytest.param({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 0,
                      "is_decoder": True}, 513, id="up to the padding's own number"),
        pytest.param({"model_type": "mpt", "max_seq_len": 128}, 128, id="mpt's ALiBi"),
    ],
)  # fmt: skip
def test_a_row_must_fit_in_the_table_of_positions(raw: dict[str, Any], found: int) -> None:
    errors, _ = judged(raw, sequence_len=found + 1)
    assert [error.code for error in errors] == ["positions-short"]
    assert f"found {found:,} positions" in errors[0].why
    assert f"{found + 1:,}" in errors[0].why
    assert errors[0].do == f"set sequence_len: {found}"
    errors, warnings = judged(raw, sequence_len=found)
    assert not errors
    assert not warnings


@pytest.mark.parametrize(
    ("part", "reach"),
    [
        pytest.param({}, None, id="no length"),
        pytest.param({"max_position_embeddings": 256}, 256, id="plain"),
        pytest.param({"max_position_embeddings": 256, "rope_scaling": YARN}, 1024, id="yarn"),
        pytest.param({"max_position_embeddings": 1024, "rope_parameters": YARN}, 1024,
                     id="yarn, its length counted in"),
        pytest.param({"max_position_embeddings": 256,
                      "rope_scaling": {"type": "linear", "factor": 2.0}}, 512, id="linear"),
        pytest.param({"max_position_embeddings": 131072,
                      "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                                       "original_max_position_embeddings": 8192}}, 131072,
                     id="llama 3.1"),
        pytest.param({"max_position_embeddings": 256, "rope_parameters": {
            "full_attention": YARN, "sliding_attention": {"rope_type": "default"}}}, 1024,
                     id="by the kind of layer"),
        pytest.param({"max_position_embeddings": 256, "alibi": True}, None, id="ALiBi"),
        pytest.param({"max_position_embeddings": 256, "rope_scaling": None}, 256, id="null"),
    ],
)  # fmt: skip
def test_the_reach_of_rope_counts_its_scaling_in(part: dict[str, Any], reach: int | None) -> None:
    assert rope_positions(part) == reach
    for raw in ({"model_type": "llama", **part},
                {"model_type": "llama", "text_config": part or None}):  # fmt: skip
        longer = judged(raw, sequence_len=(reach or 10**6) + 1)
        assert not longer[0]
        if reach is None:
            assert "positions-beyond" not in longer[1]
        else:
            assert f"{reach + 1:,}" in longer[1]["positions-beyond"]
            assert f"set sequence_len: {reach}" in longer[1]["positions-beyond"]
            assert "positions-beyond" not in judged(raw, sequence_len=reach)[1]


@pytest.mark.parametrize(
    ("raw", "keys", "loads", "code"),
    [
        pytest.param(QWEN, {}, WHOLE, "towers-frozen", id="its own class"),
        pytest.param({**QWEN, "architectures": None}, {}, WHOLE, "towers-frozen",
                     id="no class named"),
        pytest.param(QWEN, {"model_type": "AutoModelForCausalLM"}, "AutoModelForCausalLM",
                     "loses-towers", id="the language model alone, as asked"),
        pytest.param(QWEN, {"model_type": "AutoModelForImageTextToText"},
                     "AutoModelForImageTextToText", "towers-frozen", id="named by the user"),
        pytest.param({**QWEN, "architectures": ["Qwen3_5ForCausalLM"]}, {},
                     "AutoModelForCausalLM", None, id="a language model that was taken out"),
        pytest.param(LLAVA, {}, "LlavaForConditionalGeneration", "towers-frozen", id="llava"),
        pytest.param(LLAVA, {"model_type": "AutoModelForCausalLM"},
                     "LlavaForConditionalGeneration", "towers-frozen", id="llava, by the default"),
        pytest.param({"model_type": "llama"}, {}, "AutoModelForCausalLM", None, id="llama"),
    ],
)  # fmt: skip
def test_a_checkpoint_is_loaded_by_the_class_that_keeps_all_of_it(
    raw: dict[str, Any], keys: dict[str, Any], loads: str, code: str | None
) -> None:
    errors, warnings = judged(raw, sequence_len=64, **keys)
    assert not errors, errors[0]
    assert list(warnings) == ([code] if code else [])
    values = Config(base_model="org/model", learning_rate=1e-3, **keys)
    assert class_to_load(values, raw) == loads


def test_a_type_that_was_not_trained_on_text_is_refused_with_what_to_set() -> None:
    types = read_causal_types()
    untried = sorted(types.with_other_inputs.keys() - types.text_trained)
    assert "florence2" in untried
    for name in untried:
        errors, _ = judged({"model_type": name, "vision_config": {}})
        assert [error.code for error in errors] == ["not-causal-lm"], name


def test_all_but_the_language_model_is_frozen() -> None:
    model = tiny_vlm("llava")
    assert freeze_other_parts(model) == ("model.vision_tower", "model.multi_modal_projector")
    for name, weight in model.named_parameters():
        frozen = name.startswith(("model.vision_tower", "model.multi_modal_projector"))
        assert weight.requires_grad is not frozen, name
    assert freeze_other_parts(tiny_model("llama")) == ()


def test_the_attention_is_that_of_the_language_model_alone() -> None:
    config = tiny_vlm("llava").config
    assert attention_by_part(config, "eager") == {"": "eager", "text_config": "eager"}
    assert attention_by_part(tiny_model("llama").config, "eager") == "eager"


def test_weights_without_a_place_are_named_and_old_buffers_are_not(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_vlm("qwen3_5").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    unused = unused_weights(model, read_tensor_headers(tmp_path), ())
    assert unused
    assert all(name.startswith("model.visual.") for name in unused)
    plain = tiny_model("llama")
    assert unused_weights(plain, (), ["layers.0.inv_freq", "extra.weight"]) == ("extra.weight",)


def test_a_saved_config_says_what_was_loaded_and_what_dtype_is_stored(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", dtype="bfloat16")
    loaded = model.config.to_dict()
    model.model.embed_tokens.to(torch.float32)
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    assert before["dtype"] == "float32"
    correct_saved_config(tmp_path, loaded)
    after = json.loads((tmp_path / "config.json").read_text())
    assert (after["dtype"], after["output_router_logits"]) == ("bfloat16", False)
    changed = {key for key in before if before[key] != after.get(key)}
    assert changed == {"dtype", "output_router_logits"}
