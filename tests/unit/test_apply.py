"""Backends in real models: each trains as sdpa does, and the process stays as it was."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_facts import a_context
from tiny_models import tiny_model

from attnimg import application
from attnimg.backends import all_backends, find_backend
from attnimg.errors import AttnimgError
from attnimg.run_facts import GroupChoice, LayerGroup, Plan, Verdict
from attnimg.train.rows import PackedCollator, PaddedCollator
from attnimg.verification.isolation import check_isolation
from attnimg.verification.reference import attend, shifted_keys

FIXTURES = Path(__file__).parents[1] / "fixtures"
FLASH = "kernels-community/flash-attn2"


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Serve the stand-ins, and leave nothing of them in transformers."""
    served = {FLASH: "flash_attn2", "org/unread": "flash_attn2"}
    spec = ":".join(f"{name}={FIXTURES / folder}" for name, folder in served.items())
    monkeypatch.setenv("LOCAL_KERNELS", spec)
    monkeypatch.syspath_prepend(str(FIXTURES / "sage_stand_in"))
    with application.restore_registries():
        yield
    sys.modules.pop("sageattention", None)


def applied(name, model_type="llama", **changes):
    """Build a tiny model that runs a backend."""
    backend = find_backend(name)
    model = tiny_model(model_type, application.load_and_register(backend), **changes)
    application.require_applied(model, backend)
    return model, backend


def examples(count, *, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        lengths = torch.randint(3, 12, (3,), generator=generator).tolist()
        ids = torch.randint(3, 128, (sum(lengths),), generator=generator).tolist()
        yield {"input_ids": ids, "labels": ids, "document_lengths": lengths}


def twenty_losses(name, *, is_packed):
    model, backend = applied(name)
    collate = PaddedCollator(pad_token_id=0)
    if is_packed:
        collate = PackedCollator(
            pad_token_id=0, seq_idx=False, padding_free=backend.packing == "native"
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(20):
        loss = model(**collate(list(examples(2, seed=step))), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def of_sdpa():
    return {is_packed: twenty_losses("sdpa", is_packed=is_packed) for is_packed in (True, False)}


TRAINS = [
    pytest.param("eager", 1e-4),
    pytest.param("sdpa_flash", 1e-4),
    pytest.param("sdpa_math", 1e-4),
    pytest.param("flash_attention_2", 1e-4, id="flash, served by LOCAL_KERNELS"),
    pytest.param(FLASH, 1e-4, id="a hub path"),
    pytest.param(f"{FLASH}:flash_attn_varlen_func", 1e-4, id="a hub path with :fn"),
    pytest.param(f"{FLASH}:flash_attn_func", 1e-4, id="a hub path with its dense :fn"),
    pytest.param("org/unread", 1e-4, id="a hub kernel nobody has read"),
    pytest.param("sage", 5e-2, id="sage, in int8"),
]


@pytest.mark.parametrize(("name", "allowed"), TRAINS)
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])
def test_twenty_steps_lose_what_sdpa_loses(of_sdpa, name, allowed, is_packed):
    losses = twenty_losses(name, is_packed=is_packed)
    assert losses == pytest.approx(of_sdpa[is_packed], abs=allowed)
    assert losses[-1] < losses[0]


def s2_plainly(module, query, key, value, mask, *, scaling, **_):
    """Attend as the reference of s2's proof does, in float64."""
    documents = torch.zeros(len(query), key.shape[2], dtype=torch.int64)
    if mask is not None:
        documents -= (~mask.bool()).long()
    visible = shifted_keys(documents, heads=query.shape[1])
    tensors = (x.double() for x in (query, key, value))
    return attend(*tensors, visible=visible, scale=scaling).to(query.dtype), None


def test_s2_trains_as_its_reference_does_and_not_as_sdpa(of_sdpa, monkeypatch):
    losses = twenty_losses("s2", is_packed=False)
    assert losses[-1] < losses[0] - 0.1
    assert losses != pytest.approx(of_sdpa[False], abs=1e-4)
    plain = replace(find_backend("s2"), load_function=lambda: s2_plainly)
    monkeypatch.setitem(twenty_losses.__globals__, "find_backend", lambda name: plain)
    assert twenty_losses("s2", is_packed=False) == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "org/unread", "sage", "sdpa_flash", "sdpa_math"]
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "opt"])
def test_packed_documents_are_isolated(name, model_type):
    model, backend = applied(name, model_type)
    proof = check_isolation(
        model, implementation=name, context=a_context(padding_free=backend.packing == "native")
    )
    assert proof.isolated, proof.why


@pytest.mark.parametrize(
    ("name", "model_type", "argument"),
    [
        pytest.param("sage", "mistral", "window", id="sage has no window"),
        pytest.param("sdpa_flash", "mistral", "window", id="nor has sdpa's flash kernel"),
        pytest.param("s2", "gpt_oss", "window", id="nor has s2"),
        pytest.param("org/unread", "gpt_oss", "sinks", id="FlashAttention-2 has none"),
    ],
)
def test_a_model_that_passes_more_than_a_backend_can_do_stops(name, model_type, argument):
    model, _ = applied(name, model_type)
    with pytest.raises(AttnimgError, match="does not support an argument") as caught:
        model(torch.arange(3, 35)[None], use_cache=False)
    assert argument in caught.value.why


def snapshot():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import modeling_flash_attention_utils as flash

    return (
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        {name: value for name, value in vars(flash).items() if name.startswith("_")},
    )


@pytest.mark.parametrize("name", ["sage", "s2", "flash_attention_2", "org/unread", "sdpa"])
def test_undoing_leaves_the_process_as_it_was(name):
    before = snapshot()
    with application.restore_registries():
        for _ in range(2):
            model, _ = applied(name)
            model(torch.ones(1, 8, dtype=torch.long))
        applied(name, hidden_size=128)
    assert snapshot() == before


def test_a_second_model_runs_its_own_backend():
    first, _ = applied("sage")
    second, _ = applied("sdpa")
    assert application.current_implementation(first) == "attnimg_sage"
    assert application.current_implementation(second) == "sdpa"


def test_models_of_one_config_object_flip_each_other_unless_it_is_copied():
    from transformers import AutoModelForCausalLM

    first, _ = applied("sdpa")
    name = application.load_and_register(find_backend("s2"))
    AutoModelForCausalLM.from_config(deepcopy(first.config), attn_implementation=name)
    application.require_applied(first, find_backend("sdpa"))
    AutoModelForCausalLM.from_config(first.config, attn_implementation=name)
    with pytest.raises(AttnimgError, match="was not applied"):
        application.require_applied(first, find_backend("sdpa"))


def test_switching_a_loaded_model_changes_what_it_computes():
    model, _ = applied("sdpa")
    ids = torch.arange(3, 35)[None]
    full = model(ids, use_cache=False).logits
    application.switch_backend(model, find_backend("s2"))
    assert (model(ids, use_cache=False).logits - full).abs().max() > 1e-3
    application.switch_backend(model, find_backend("sdpa"))
    assert torch.equal(model(ids, use_cache=False).logits, full)


@pytest.mark.parametrize("backend", all_backends(), ids=lambda backend: backend.name)
def test_no_registered_name_has_a_word_that_transformers_goes_by(backend):
    name = backend.applied_as
    assert name
    if name.startswith("attnimg"):
        assert not any(word in name for word in ("flash", "sdpa", "flex"))


def test_a_load_that_failed_does_not_stick(monkeypatch):
    from transformers import modeling_flash_attention_utils as flash

    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setenv("LOCAL_KERNELS", f"{FLASH}={FIXTURES}")  # serves no kernel
    for _ in range(2):
        with pytest.raises(AttnimgError) as caught:
            application.load_and_register(find_backend("flash_attention_2"))
        assert caught.value.exit_code == 1
    assert flash._loaded_implementation is None
    monkeypatch.setenv("LOCAL_KERNELS", f"{FLASH}={FIXTURES / 'flash_attn2'}")
    model, _ = applied("flash_attention_2")
    assert torch.isfinite(model(torch.ones(1, 4, dtype=torch.long)).logits).all()


def test_nothing_is_downloaded_for_a_name_that_is_no_hub_path(monkeypatch):
    monkeypatch.delenv("LOCAL_KERNELS")
    with pytest.raises(AttnimgError) as caught:
        application.load_and_register(find_backend("flash_attention_2"))
    assert caught.value.code == "not-installed"
    assert "does not name the hub kernel" in caught.value.why


@pytest.mark.parametrize("name", ["xformers", "fp8"])
def test_a_package_that_is_missing_is_named(name):
    with pytest.raises(AttnimgError) as caught:
        application.load_and_register(find_backend(name))
    assert caught.value.code == "import-error"
    assert "ModuleNotFoundError" in caught.value.why


MLA = LayerGroup(count=2, heads=4, kv_heads=4, head_dim_qk=192, head_dim_v=128)


@pytest.mark.parametrize(
    ("unpadded", "layers", "padded"),
    [
        pytest.param(True, (MLA,), False, id="a kernel that takes such values gets them"),
        pytest.param(False, (MLA,), True, id="others get them padded, by transformers"),
        pytest.param(True, (replace(MLA, kv_heads=2),), True, id="so do grouped heads"),
        pytest.param(True, (replace(MLA, head_dim_qk=128),), True, id="and other models"),
    ],
)
def test_values_of_another_size_reach_the_kernel_unpadded(monkeypatch, unpadded, layers, padded):
    from attnimg.backends import _varlen as flash

    seen = set()
    whole = flash.FlashKernel._dense

    def watched(self, q, k, v, options):
        seen.add(v.shape[-1] != q.shape[-1] and self.unpadded_v)
        return whole(self, q, k, v, options)

    monkeypatch.setattr(flash.FlashKernel, "_dense", watched)
    backend = replace(find_backend("flash_attention_2"), unpadded_v=unpadded)
    name = application.load_and_register(backend, layers=layers)
    assert (name == "flash_attention_2") == padded
    model = tiny_model("deepseek_v3", name)
    application.require_applied(model, backend)
    ids = torch.arange(3, 35)[None]
    plain = tiny_model("deepseek_v3", "sdpa")(ids, use_cache=False).logits
    assert (model(ids, use_cache=False).logits - plain).abs().max() < 1e-4
    assert seen == (set() if padded else {unpadded})


def choices(*pairs):
    groups = [
        (LayerGroup(count=1, heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, window=w), b)
        for w, b in pairs
    ]
    return tuple(
        GroupChoice(
            layers=group, verdict=Verdict(backend=find_backend(backend), rank=1, reasons=())
        )
        for group, backend in groups
    )


def test_layers_that_differ_run_their_own_backends_and_compute_the_same():
    chosen = Verdict(backend=find_backend("sdpa"), rank=1, reasons=())
    groups = choices((8, "flash_attention_2"), (None, "sdpa"))
    plan = Plan(requested="auto", chosen=chosen, reason="", verdicts=(chosen,), groups=groups)
    backend = application.plan_backend(plan)
    assert backend.packing == "native"
    model = tiny_model("gemma3_text", application.load_and_register(backend), num_hidden_layers=6)
    application.require_applied(model, backend)
    proof = check_isolation(
        model, implementation=backend.name, context=a_context(padding_free=True)
    )
    assert proof.isolated, proof.why
    ids = torch.arange(3, 35)[None]
    plain = tiny_model("gemma3_text", "eager", num_hidden_layers=6)
    difference = model(ids, use_cache=False).logits - plain(ids, use_cache=False).logits
    assert difference.abs().max() < 1e-4
