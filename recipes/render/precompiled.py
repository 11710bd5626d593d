"""Write docker/images/IMAGE/*_kernels.json: which kernels docker/precompiled compiles."""

from __future__ import annotations

import json
from typing import Any

from attnimg.backends import backend_named
from attnimg.facts import LayerGroup
from attnimg.select.gpus import arch_from_name
from attnimg.select.judge import layer_reasons
from recipes.archs import device_name
from recipes.facts import AheadOfTime, ImagePlan, Step, TrainedModel, TritonSet
from recipes.files import NOTICE


def kernel_sets(plans: tuple[ImagePlan, ...]) -> dict[str, str]:
    """Write the set of each image that has one: path -> text."""
    texts = {}
    for plan in plans:
        folder = f"docker/images/{plan.image.name}"
        for step in plan.steps:
            if step.kernel.ahead_of_time:
                texts[f"{folder}/fa4_kernels.json"] = _text(step, step.kernel.ahead_of_time)
            if step.kernel.triton:
                texts[f"{folder}/triton_kernels.json"] = _triton_text(step, step.kernel.triton)
    return texts


def coverage(model: TrainedModel, arch: str, *, backend: str) -> str:
    """Return whether all ("yes"), no ("-") or which layers of a model have kernels."""
    fits = {group.window: not _against(backend, group, arch) for group in _groups(model)}
    if len(set(fits.values())) == 1:
        return "yes" if all(fits.values()) else "-"
    return "full layers" if fits[None] else "sliding layers"


def _groups(model: TrainedModel) -> tuple[LayerGroup, ...]:
    """Return the kinds of attention layers of a model; how many of each does not matter here."""
    return tuple(
        LayerGroup(
            count=1,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim_qk=model.head_dim,
            head_dim_v=model.head_dim_v or model.head_dim,
            window=window or None,
            softcap=model.softcap or None,
            sinks=model.sinks,
        )
        for window in model.windows
    )


def _against(name: str, group: LayerGroup, arch: str) -> str:
    """Return why a backend has no kernel for a layer on an architecture; "" if it has."""
    backend = backend_named(name)
    assert backend is not None
    capability = arch_from_name(device_name(arch)).capability
    assert capability is not None
    major = capability[0]
    needs = backend.needs
    features = needs.features - needs.features_missing.get(major, frozenset())
    reasons = layer_reasons(group, needs.head_dims, major, features)
    return "; ".join(reason.text.removeprefix("1 layers ") for reason in reasons)


def _shape(group: LayerGroup) -> dict[str, Any]:
    """Return what a layer's kernel depends on; docker/precompiled/fa4/kernel_set.py explains it.

    Source: compile_key in flash_attn/cute/interface.py of flash-attn-4 4.0.0b36 (2026-11-26).
    """
    return {
        "head_dim": group.head_dim_qk,
        "head_dim_v": group.head_dim_v,
        "heads_per_kv": group.heads // group.kv_heads,
        "window": group.window is not None,
        "softcap": group.softcap or 0.0,
        "sinks": group.sinks,
    }


def _text(step: Step, asked: AheadOfTime) -> str:
    content: dict[str, Any] = {"//": NOTICE, "method": "precompiled.fa4.method"}
    content |= {axis: list(getattr(asked, axis)) for axis in ("dtypes", "varlen", "gradient")}
    content["targets"] = {device_name(arch): _target(step, asked, arch) for arch in step.archs}
    return json.dumps(content, indent=1) + "\n"


def _target(step: Step, asked: AheadOfTime, arch: str) -> dict[str, Any]:
    """Return what is compiled for one architecture: each distinct shape once."""
    shapes: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for model in asked.models:
        for group in _groups(model):
            if against := _against(step.kernel.backends[0], group, arch):
                kind = "sliding layers" if group.window else "full layers"
                left_out[f"{model.model}, {kind}"] = against
            elif _shape(group) not in shapes:
                shapes.append(_shape(group))
    target = asked.targets[arch]
    return {
        "code": target.code,
        "multiprocessors": target.multiprocessors,
        "shapes": shapes,
        "left_out": left_out,
    }


def _triton_text(step: Step, asked: TritonSet) -> str:
    content: dict[str, Any] = {"//": NOTICE, "method": "precompiled.triton.method"}
    content["calls"] = asked.calls
    content |= {axis: list(getattr(asked, axis)) for axis in ("dtypes", "causal", "varlen")}
    content["heads"] = {str(head_dim): list(pairs) for head_dim, pairs in asked.heads.items()}
    content["targets"] = {
        device_name(arch): {"code": step.kernel.archs[arch].code} for arch in step.archs
    }
    return json.dumps(content, indent=1) + "\n"
