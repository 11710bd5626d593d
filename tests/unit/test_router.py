"""One function for layers that differ: by a call's own shape, and at next to no cost."""

from __future__ import annotations

import pytest
import torch
from attention_cases import LAYER, draw
from run_facts import a_problem

from attnimg.application import plan_backend
from attnimg.application.router import Router, Shape
from attnimg.errors import AttnimgError
from attnimg.facts import DType, Machine
from attnimg.run_facts import LayerGroup, Model, Plan, Reason
from attnimg.selection.gpus_and_images import parse_gpu
from attnimg.selection.plan import choose, rule_out


def named(name):
    return lambda *tensors, **arguments: name


with_sinks = named("sinks")  # one function, as a backend that many layers run
ROUTES = {
    Shape(16, 16, 8, None, False): named("short"),
    Shape(16, 16, None, None, False): named("long"),
    Shape(32, 16, None, None, False): named("wide"),
    Shape(64, 64, 128, None, True): with_sinks,
    Shape(64, 64, None, None, True): with_sinks,
}


@pytest.mark.parametrize(
    ("size", "size_v", "arguments", "taken"),
    [
        pytest.param(16, 16, {"sliding_window": 8}, "short", id="by its window"),
        pytest.param(16, 16, {"sliding_window": None}, "long", id="by having none"),
        pytest.param(16, 16, {}, "long", id="by not naming one"),
        pytest.param(32, 16, {}, "wide", id="by its head sizes"),
        pytest.param(32, 16, {"sliding_window": 4}, "wide", id="by size where that decides"),
        pytest.param(64, 64, {"s_aux": torch.ones(4)}, "sinks", id="by its sinks"),
    ],
)
def test_a_call_goes_where_its_shape_says(size, size_v, arguments, taken):
    router = Router(ROUTES)
    for _ in range(2):
        tensors = draw(size=size, size_v=size_v)
        assert router(LAYER, *tensors, None, scaling=1.0, **arguments) == taken


@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        pytest.param(48, {}, id="a size that no layer has"),
        pytest.param(16, {"sliding_window": 9}, id="a window between two backends"),
        pytest.param(64, {}, id="layers with sinks that pass none"),
    ],
)
def test_a_shape_that_was_not_planned_stops(size, arguments):
    with pytest.raises(AttnimgError, match="not in the plan") as caught:
        Router(ROUTES)(LAYER, *draw(size=size), None, scaling=1.0, **arguments)
    assert str(size) in caught.value.why


def group(size: int, **more: object) -> LayerGroup:
    return LayerGroup(
        count=6, heads=8, kv_heads=4, head_dim_qk=size, head_dim_v=size,
        **more,  # type: ignore[arg-type]  # a table's cell
    )  # fmt: skip


GEMMA4 = (group(256, window=512), group(512))
ALIKE = (group(128, window=512), group(128))


def plan_for(
    gpu: str, layers: tuple[LayerGroup, ...], asked: str | None = None, dtype: DType = "bfloat16"
) -> Plan:
    target = parse_gpu(gpu)
    arch, label = target.arch, target.label
    problem = a_problem(model=Model(type="m", layers=layers), dtype=dtype, packing=True)
    return choose(asked, Machine(arch=arch, gpu=label), problem)


@pytest.mark.parametrize(
    ("gpu", "layers", "asked", "groups"),
    [
        pytest.param("h100", GEMMA4, None, ["flash_attention_3", "sdpa"], id="Hopper, gemma4"),
        pytest.param("a100", GEMMA4, None, ["flash_attention_2", "sdpa"], id="Ampere, gemma4"),
        pytest.param("h100", GEMMA4, "sdpa", [], id="a name is not split up"),
        pytest.param("h100", ALIKE, None, [], id="one backend is best for all"),
        pytest.param("t4", GEMMA4, None, [], id="Turing has none that is better"),
        pytest.param(
            "a100",
            (group(64, sinks=True), group(128)),
            None,
            [],
            id="flex, which alone has these sinks, has a mask of its own",
        ),
    ],
)
def test_groups_of_layers_get_their_own_backend_where_that_is_better(gpu, layers, asked, groups):
    dtype = "float16" if gpu == "t4" else "bfloat16"
    found = plan_for(gpu, layers, asked, dtype)
    assert [choice.verdict.backend.name for choice in found.groups] == groups
    assert found.chosen is not None


def test_a_router_that_fails_leaves_the_best_for_all_layers():
    found = plan_for("h100", GEMMA4)
    router = plan_backend(found)
    left = rule_out(found, router.name, Reason(code="packing-not-isolated", text="it leaks"))
    assert left.groups == ()
    assert left.chosen == found.chosen
    # Of those that take all layers, the first that needs no mask over the whole row.
    assert plan_backend(left).name == "sdpa_efficient"


def test_two_sets_of_routes_have_two_names():
    names = {plan_backend(plan_for(gpu, GEMMA4)).applied_as for gpu in ("h100", "a100", "h100")}
    assert len(names) == 2
    assert all(name.startswith("attnimg_router") for name in names)
