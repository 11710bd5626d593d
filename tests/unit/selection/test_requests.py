"""ATTNIMG_BACKEND replaces auto, attn_backends refines it; both are honoured or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_facts import a_problem

from attnimg.errors import AttnimgError
from attnimg.facts import Machine
from attnimg.run_facts import LayerGroup, Model, Reason
from attnimg.selection.gpus_and_images import image_for, machine_with, parse_gpu
from attnimg.selection.plan import choose, rule_out

FULL = LayerGroup(count=4, heads=8, kv_heads=2, head_dim_qk=256, head_dim_v=256)
SLIDING = LayerGroup(count=20, heads=8, kv_heads=2, head_dim_qk=256, head_dim_v=256, window=1024)
WIDE = replace(FULL, head_dim_qk=512, head_dim_v=512)
MIXED = Model(type="gemma3_text", layers=(SLIDING, FULL))
HOPPER = parse_gpu("h100")


def machine(**changes) -> Machine:
    found = machine_with(image_for(HOPPER.arch, cpu=HOPPER.cpu), HOPPER.arch, HOPPER.label)
    return replace(found, **changes)


def problem(model=MIXED, **changes):
    return a_problem(model=model, dtype="bfloat16", sequence_len=8192, **changes)


def with_variable(name):
    return machine(variables={"ATTNIMG_BACKEND": name})


@pytest.mark.parametrize("requested", [None, "auto"])
def test_the_variable_replaces_auto_and_is_named_as_the_reason(requested):
    plan = choose(requested, with_variable("sdpa"), problem())
    assert plan.chosen.backend.name == "sdpa"
    assert plan.reason == "ATTNIMG_BACKEND names it, and it fits"


def test_a_name_in_the_config_goes_before_the_variable():
    plan = choose("eager", with_variable("sdpa"), problem())
    assert plan.chosen.backend.name == "eager"


def test_a_backend_of_the_variable_that_does_not_fit_is_refused_and_not_replaced():
    plan = choose(
        None, with_variable("flash_attention_3"), problem(Model(type="x", layers=(WIDE,)))
    )
    assert plan.chosen is None
    assert plan.remedy.startswith("set ATTNIMG_BACKEND=")
    assert plan.remedy.endswith("or unset ATTNIMG_BACKEND")


def test_a_backend_of_the_variable_that_fails_its_proof_is_not_replaced():
    plan = choose(None, with_variable("xformers"), problem())
    plan = rule_out(plan, "xformers", Reason(code="wrong", text="dq is wrong"))
    assert plan.chosen is None
    assert plan.remedy == "unset ATTNIMG_BACKEND: auto tries the next one"


@pytest.mark.parametrize("name", ["sdpaa", "flash", "sdpa_math"])
def test_a_misspelt_variable_is_refused(name):
    with pytest.raises(AttnimgError, match="ATTNIMG_BACKEND") as error:
        choose(None, with_variable(name), problem())
    assert error.value.code == "bad-environment"
    assert error.value.do.endswith("or unset ATTNIMG_BACKEND")


def backends_of(plan):
    return {choice.layers.kind: choice.verdict.backend.name for choice in plan.groups}


def test_each_kind_of_layers_runs_the_backend_that_is_named_for_it():
    kinds = {"sliding": "flash_attention_2", "full": "sdpa"}
    plan = choose(None, machine(), problem(), kinds=kinds)
    assert backends_of(plan) == kinds
    assert plan.reason.startswith("the backends that attn_backends names fit")


def test_a_kind_that_is_not_named_gets_the_best_backend():
    plan = choose(None, machine(), problem(), kinds={"full": "xformers"})
    best = choose(None, machine(), problem(Model(type="gemma3_text", layers=(SLIDING,))))
    assert backends_of(plan) == {"full": "xformers", "sliding": best.chosen.backend.name}


def test_one_backend_for_all_kinds_needs_no_router():
    kinds = dict.fromkeys(("sliding", "full"), "flex_attention")
    plan = choose(None, machine(), problem(compiled=True), kinds=kinds)
    assert (plan.chosen.backend.name, plan.groups) == ("flex_attention", ())


REFUSED = [
    pytest.param({"full": "flash_attention_3"}, (SLIDING, WIDE), "does not fit", id="head-dim"),
    pytest.param({"sliding": "sdpa"}, (FULL,), "no sliding layers", id="no-such-layers"),
    pytest.param({"sliding": "flex_attention"}, (SLIDING, FULL), "a mask of its own", id="flex"),
    pytest.param({"full": "sdpa"}, (replace(SLIDING, softcap=50.0), replace(FULL, softcap=50.0)),
                 "does not fit", id="softcap"),
    pytest.param({"full": "eager"}, (replace(SLIDING, softcap=50.0), replace(FULL, softcap=50.0)),
                 "has no soft cap", id="softcap-in-a-router"),
    pytest.param({"full": "sdpa"}, (), "not known here", id="unknown-layers"),
]  # fmt: skip


@pytest.mark.parametrize(("kinds", "layers", "text"), REFUSED)
def test_a_backend_that_does_not_fit_its_layers_is_refused(kinds, layers, text):
    plan = choose(None, machine(), problem(Model(type="gemma3_text", layers=layers)), kinds=kinds)
    assert plan.chosen is None
    assert text in plan.reason
    assert "attn_backends" in plan.remedy


def test_no_layer_gets_another_backend_when_a_named_one_fails_its_proof():
    kinds = {"sliding": "flash_attention_2", "full": "sdpa"}
    plan = choose(None, machine(), problem(), kinds=kinds)
    plan = rule_out(plan, "flash_attention_2", Reason(code="wrong", text="dq is wrong"))
    assert plan.chosen is None
    assert plan.remedy.startswith("remove attn_backends")


def test_the_variable_does_not_replace_named_kinds():
    kinds = {"sliding": "flash_attention_2", "full": "sdpa"}
    plan = choose(None, with_variable("eager"), problem(), kinds=kinds)
    assert backends_of(plan) == kinds
