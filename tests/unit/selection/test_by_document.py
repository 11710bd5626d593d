"""Test that layers called once per document compute what they compute for a document alone."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from run_facts import a_problem
from tiny_models import tiny_model

from attnimg.application.by_document import _find_spans, call_by_document, call_whole_rows
from attnimg.backends import find_backend
from attnimg.context import build_context
from attnimg.selection.model_types import other_layer_kinds
from attnimg.verification.isolation import check_isolation

KINDS = other_layer_kinds()
# One type of each kind of layers; the mask of granitemoehybrid has no document boundaries.
TYPES = {
    "gated_delta_net": "qwen3_5_text",
    "kimi_delta": "kimi_linear",
    "mamba2": "nemotron_h",
    "mamba2_beside": "falcon_h1",
    "mamba": "jamba",
    "short_convolution": "lfm2_moe",
}


def context(rows: int = 2) -> Any:
    problem = a_problem(model=None, dtype="float32", packing=True)
    return replace(
        build_context(problem, find_backend("sdpa")), rows=rows, sequence_len=64, seq_idx=True
    )


def isolated(model: Any, rows: int = 2) -> bool:
    return check_isolation(model, implementation="sdpa", context=context(rows)).isolated


def test_the_table_names_a_type_of_each_kind_that_is_called_by_document() -> None:
    assert {name for name, kind in KINDS.items() if kind.modules} == TYPES.keys()


@pytest.mark.parametrize("kind", TYPES)
def test_documents_are_isolated_while_layers_are_called_once_for_each(kind: str) -> None:
    model = tiny_model(TYPES[kind], "sdpa")
    assert not isolated(model)
    call_by_document(model, KINDS[kind].modules)
    assert isolated(model)
    assert isolated(model, rows=1)
    call_whole_rows(model)
    assert not isolated(model)


@pytest.mark.parametrize("kind", TYPES)
def test_a_batch_without_documents_is_computed_as_before(kind: str) -> None:
    model = tiny_model(TYPES[kind], "sdpa").eval()
    tokens = torch.arange(40).reshape(2, 20)
    before = model(input_ids=tokens, use_cache=False).logits
    packed = {"position_ids": torch.arange(10).repeat(2, 2), "input_ids": tokens}
    call_by_document(model, KINDS[kind].modules)
    model(**packed, use_cache=False)
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, before)


def test_gradient_checkpointing_recomputes_the_documents_of_its_own_batch() -> None:
    model = tiny_model("qwen3_5_text", "sdpa")
    call_by_document(model, KINDS["gated_delta_net"].modules)
    batch = {"input_ids": torch.arange(60)[None], "use_cache": False,
             "position_ids": torch.cat([torch.arange(25), torch.arange(35)])[None]}  # fmt: skip

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch).logits.float().square().mean().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_under_lora_is_changed_inside() -> None:
    peft = importlib.import_module("peft")
    model = tiny_model("falcon_h1", "sdpa")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    call_by_document(wrapped, KINDS["mamba2_beside"].modules)
    assert isolated(wrapped)


def test_a_copy_of_the_model_calls_its_own_layers() -> None:
    model = tiny_model("falcon_h1", "sdpa").eval()
    call_by_document(model, KINDS["mamba2_beside"].modules)
    other = copy.deepcopy(model)
    for weight in model.parameters():
        weight.data.zero_()
    assert isolated(other)
    call_whole_rows(model)
    assert isolated(other)
    call_whole_rows(other)
    assert not isolated(other)


def test_spans_are_those_of_the_documents_of_each_row() -> None:
    seq_idx = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 0, 0, 0]])
    found = [(0, 0, 2), (0, 2, 4), (0, 4, 5), (1, 0, 5)]
    assert list(_find_spans(seq_idx, None)) == found
    positions = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 2, 3, 4]])
    assert list(_find_spans(None, positions)) == found
    assert list(_find_spans(torch.zeros(2, 5), positions)) == []
    assert list(_find_spans(None, torch.arange(5)[None])) == []


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(LookupError, match="has none of the layers FalconH1Mixer"):
        call_by_document(tiny_model("llama", "sdpa"), KINDS["mamba2_beside"].modules)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [(type_, name) for kind in KINDS.values() for type_ in kind.types[:1] for name in kind.modules],
)
def test_the_classes_of_the_table_exist(model_type: str, name: str) -> None:
    found = [
        module
        for type_ in next(kind.types for kind in KINDS.values() if model_type in kind.types)
        if (module := _modeling(type_)) is not None and hasattr(module, name)
    ]
    assert found, f"transformers has no {name}"


def _modeling(type_: str) -> Any:
    folder = type_.removesuffix("_text")
    try:
        return importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ImportError:
        return None
