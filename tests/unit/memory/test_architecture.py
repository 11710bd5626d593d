"""Compare the sizes that are read from config.json with transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attnimg.memory.architecture import TYPES, Architecture, read_architecture
from attnimg.selection.attention_shapes import read_model

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "num_experts": 6,
    "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
}  # fmt: skip


def model_and_architecture(type_: str, **fields: Any) -> tuple[Any, Architecture]:
    config = AutoConfig.for_model(type_)
    known = config.to_dict()
    changes = {name: value for name, value in (SIZES | fields).items() if name in known}
    config = AutoConfig.for_model(type_, **changes, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    raw = config.to_dict()
    found = read_architecture(raw, read_model(raw))
    assert isinstance(found, Architecture), found
    return model, found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("type_", TYPES)
def test_the_weights_of_a_type_are_counted_exactly(type_: str, tied: bool) -> None:
    model, found = model_and_architecture(type_, tie_word_embeddings=tied)
    assert found.parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("type_", TYPES)
def test_the_linear_layers_of_a_type_have_their_names_and_sizes(type_: str) -> None:
    model, found = model_and_architecture(type_)
    layer = model.model.layers[0]
    own = {name: tuple(module.weight.shape) for name, module in layer.named_modules()
           if isinstance(module, torch.nn.Linear)}  # fmt: skip
    assert {each.name: (each.outputs, each.inputs) for each in found.layers[0].linears} == own


def test_other_types_have_a_reason_instead_of_sizes() -> None:
    raw = AutoConfig.for_model("gpt2").to_dict()
    assert "gpt2" in str(read_architecture(raw, read_model(raw)))
