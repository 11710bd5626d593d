"""Write docker/images/IMAGE/*_kernels.json: which kernels docker/precompiled compiles."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from attnimg.backends import find_backend
from attnimg.run_facts import LayerGroup
from attnimg.selection.gpus_and_images import arch_from_name
from attnimg.selection.judge import layer_reasons
from recipes.archs import device_name
from recipes.facts import (
    AheadOfTime,
    ImagePlan,
    Step,
    TrainedModel,
    TritonSet,
    on_all_platforms,
)
from recipes.files import generated_json


def kernel_sets(plans: tuple[ImagePlan, ...]) -> dict[str, str]:
    """Write the set of each image that has one: path -> text."""
    texts = {}
    for plan in on_all_platforms(plans):
        folder = f"docker/images/{plan.name}"
        for step in plan.steps:
            if step.kernel.ahead_of_time:
                texts[f"{folder}/fa4_kernels.json"] = _fa4_set(step, step.kernel.ahead_of_time)
            if step.kernel.triton:
                texts[f"{folder}/triton_kernels.json"] = _triton_set(step, step.kernel.triton)
    return texts


def coverage(model: TrainedModel, arch: str, *, backend: str) -> str:
    """Return whether all ("yes"), no ("-") or which layers of a model have kernels."""
    fits = {group.window: not _reasons_against(backend, group, arch) for group in _groups(model)}
    if len(set(fits.values())) == 1:
        return "yes" if all(fits.values()) else "-"
    return "full layers" if fits[None] else "sliding layers"


def _groups(model: TrainedModel) -> tuple[LayerGroup, ...]:
    """Return the kinds of attention layers of a model; their counts do not matter here."""
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


def _reasons_against(name: str, group: LayerGroup, arch: str) -> str:
    """Return why a backend has no kernel for a layer on an architecture; "" if it has."""
    backend = find_backend(name)
    assert backend is not None
    capability = arch_from_name(device_name(arch)).capability
    assert capability is not None
    major = capability[0]
    needs = backend.needs
    features = needs.features - needs.features_missing.get(major, frozenset())
    reasons = layer_reasons(group, needs.head_dims, major, features)
    # A reason is about one layer of each kind; the text, about all of them.
    texts = (reason.text.replace("1 layer has ", "have ", 1) for reason in reasons)
    return "; ".join(text.replace("1 layer uses ", "use ", 1) for text in texts)


def _shape(group: LayerGroup) -> dict[str, Any]:
    """Return the values that determine a layer's kernel: see docker/precompiled/fa4/kernel_set.py.

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


def _fa4_set(step: Step, kernel_set: AheadOfTime) -> str:
    """Return the shapes and the ways in which FlashAttention-4 is called."""
    axes = {axis: list(getattr(kernel_set, axis)) for axis in ("dtypes", "varlen", "gradient")}
    targets = {device_name(arch): _fa4_target(step, kernel_set, arch) for arch in step.archs}
    return generated_json({"method": "precompiled.fa4.method", **axes, "targets": targets})


def _fa4_target(step: Step, kernel_set: AheadOfTime, arch: str) -> dict[str, Any]:
    """Return what is compiled for one architecture: each distinct shape once."""
    shapes: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for model in kernel_set.models:
        for group in _groups(model):
            if reasons := _reasons_against(step.kernel.backends[0], group, arch):
                kind = "sliding layers" if group.window else "full layers"
                left_out[f"{model.model}, {kind}"] = reasons
            elif _shape(group) not in shapes:
                shapes.append(_shape(group))
    return {**asdict(kernel_set.targets[arch]), "shapes": shapes, "left_out": left_out}


def _triton_set(step: Step, kernel_set: TritonSet) -> str:
    """Return the ways in which SageAttention is called."""
    axes = {axis: list(getattr(kernel_set, axis)) for axis in ("dtypes", "causal", "varlen")}
    targets = {device_name(arch): {"code": step.kernel.archs[arch].code} for arch in step.archs}
    return generated_json(
        {
            "method": "precompiled.triton.method",
            "calls": kernel_set.calls,
            **axes,
            "heads": {str(head_dim): list(pairs) for head_dim, pairs in kernel_set.heads.items()},
            "targets": targets,
        }
    )
