"""Write docker/*_cache/IMAGE.json: the kernels that are compiled when an image is built."""

from __future__ import annotations

import json
from typing import Any

from recipes.facts import AheadOfTime, Plan, Step, TritonSet
from recipes.files import NOTICE
from recipes.kernel_rules import device

# docker/fa4_cache knows how to compile these, and no others.
_KERNEL = "flash-attn-4"
# The module of docker/triton_cache that calls a kernel package.
_TRITON_CALLS = {"sageattention": "sage_calls"}


def kernel_sets(plans: tuple[Plan, ...]) -> dict[str, str]:
    """Write the set of each image that has one: path -> text."""
    return {
        f"docker/fa4_cache/{plan.image.name}.json": _text(step, step.kernel.ahead_of_time)
        for plan in plans
        for step in plan.steps
        if step.kernel.name == _KERNEL and step.kernel.ahead_of_time
    } | {
        f"docker/triton_cache/{plan.image.name}.json": _triton_text(step, step.kernel.triton)
        for plan in plans
        for step in plan.steps
        if step.kernel.name in _TRITON_CALLS and step.kernel.triton
    }


def _text(step: Step, asked: AheadOfTime) -> str:
    axes = ("dtypes", "head_dims", "heads_per_kv", "causal", "varlen", "gradient")
    content: dict[str, Any] = {"//": NOTICE}
    content |= {axis: list(getattr(asked, axis)) for axis in axes}
    content["targets"] = {
        device(arch): {
            "code": asked.targets[arch].code,
            "multiprocessors": asked.targets[arch].multiprocessors,
            "left_out": {str(dim): why for dim, why in asked.targets[arch].left_out.items()},
        }
        for arch in step.archs
    }
    return json.dumps(content, indent=1) + "\n"


def _triton_text(step: Step, asked: TritonSet) -> str:
    content: dict[str, Any] = {"//": NOTICE, "calls": _TRITON_CALLS[step.kernel.name]}
    content |= {axis: list(getattr(asked, axis)) for axis in ("dtypes", "causal", "varlen")}
    content["heads"] = {str(head_dim): list(pairs) for head_dim, pairs in asked.heads.items()}
    content["targets"] = {
        device(arch): {"code": step.kernel.archs[arch].code} for arch in step.archs
    }
    return json.dumps(content, indent=1) + "\n"
