"""Every call that a GPU run makes of attnimg's own steps: machine, problem, choice, proof."""

from __future__ import annotations

import os
from typing import Any

from attnimg.backends import all_backends, find_backend
from attnimg.context import build_context
from attnimg.context import is_padding_free as is_padding_free
from attnimg.facts import Backend, Machine
from attnimg.machine import probe
from attnimg.machine.kernel_cache import shipped_kernels, use_shipped_kernels
from attnimg.run_facts import LayerGroup, Model, Problem, Proof
from attnimg.selection import plan
from attnimg.task import distributions
from attnimg.verification import proofs
from attnimg.verification.runner import run

# Query heads to a key head in every unit, as in Llama 3.
GROUP = 4


def this_machine() -> Machine:
    """Return this machine with the packages that backends need."""
    machine = probe.this_machine(distributions())
    use_shipped_kernels(machine)
    return machine


def backend(name: str) -> Backend:
    """Return a backend by its name."""
    found = find_backend(name)
    assert found is not None, name
    return found


def native_backends() -> list[str]:
    """Return the backends that need no package besides torch, by rank."""
    return [one.name for one in all_backends() if one.applied_as and not one.needs.packages]


def kernel_backends() -> dict[str, str]:
    """Return the backends of kernel packages, by rank: name -> distribution."""
    # fp8 attention has no backward pass and needs FlashAttention-3 beside torchao.
    return {
        one.name: one.needs.packages[0][0]
        for one in all_backends()
        if one.applied_as and one.needs.packages and one.name != "fp8"
    }


def layers(head_dims: list[int], *, heads: int, count: int) -> tuple[LayerGroup, ...]:
    """Return one group of equal layers for each head size."""
    return tuple(
        LayerGroup(
            count=count,
            heads=heads,
            kv_heads=heads // GROUP,
            head_dim_qk=size,
            head_dim_v=size,
            window=None,
            softcap=None,
            sinks=False,
        )
        for size in head_dims
    )


def problem(unit: dict[str, Any]) -> Problem:
    """Return the attention problem of a unit: training in its dtype, without autocast."""
    return Problem(
        model=Model(type="llama", layers=layers(unit["head_dims"], heads=8, count=1)),
        model_class=None,
        dtype=unit["dtype"],
        training=True,
        packing=unit["packing"],
        dropout=0.0,
        compiled=False,
        checkpointing=False,
        # SageAttention has no backward pass: its gradients are those of exact attention.
        forward_only_ok=True,
        trusted=False,
        sequence_len=unit["sequence_len"],
        rows=1,
        autocast=False,
        known_bad=(),
    )


def reasons_against(name: str, machine: Machine, task: Problem) -> list[tuple[str, str]]:
    """Return the plan's reasons why a backend cannot run here; none means it can."""
    found = plan.choose(name, machine, task, strict=True)
    verdict = next(verdict for verdict in found.verdicts if verdict.backend.name == name)
    return [(reason.code, reason.text) for reason in verdict.reasons]


def lacking_in_small_build(name: str, unit: dict[str, Any], machine: Machine) -> str:
    """Return why the kit's small build of a kernel can't run a unit; "" if it can."""
    version = (machine.packages or {}).get(kernel_backends().get(name, ""), "")
    lacks = "trim" in version and unit["dtype"] != "bfloat16"
    return f"the small build {version} has bfloat16 alone" if lacks else ""


def prove_once(name: str, machine: Machine, task: Problem, *, timeout_s: float) -> Proof:
    """Prove a backend as a run does; nothing is read from the cache and nothing written to it."""
    setting = _setting(machine)
    (made,) = proofs.prove(
        [backend(name)], task, setting=setting, log=lambda text: None,
        routed=False, timeout_s=timeout_s,
    )  # fmt: skip
    return made


def prove_repeatedly(
    name: str, machine: Machine, task: Problem, *, times: int, timeout_s: float
) -> list[Proof]:
    """Make the same proof several times in one child process, which imports torch once."""
    candidate = proofs._candidate(backend(name), task, _setting(machine), routed=False)
    device = "cpu" if machine.arch.vendor == "cpu" else "cuda"
    return run([candidate] * times, device=device, timeout_s=timeout_s)


def _setting(machine: Machine) -> proofs.Setting:
    return proofs.Setting(machine=machine, environment=os.environ, folder=None)


def isolation(model: Any, unit: dict[str, Any]) -> tuple[bool, str]:
    """Return whether a model keeps packed documents apart on a unit's backend, and the figures."""
    from attnimg.verification.isolation import check_isolation

    task = problem({**unit, "head_dims": [], "packing": True, "sequence_len": unit["tokens"]})
    context = build_context(task, backend(unit["backend"]))
    found = check_isolation(model, implementation=unit["backend"], context=context)
    return found.isolated, found.why


def packed_collator(name: str) -> Any:
    """Return the collator of packed rows, as train makes it for a backend."""
    from attnimg.train.rows import PackedCollator

    return PackedCollator(
        pad_token_id=0, padding_free=is_padding_free(backend(name)), seq_idx=False
    )


def packing() -> dict[str, str]:
    """Return how each backend that can be applied keeps documents apart, by its name."""
    return {one.name: one.packing for one in all_backends() if one.applied_as}


def note_of(name: str) -> str:
    """Return a note on the kernel for the reader of a proof."""
    if name == "flash_attention_4" and shipped_kernels() is None:
        return (
            "flash_attention_4 compiled its kernels at their first calls: those that an image has"
            " are for the image's Python, and none came with this installation"
        )
    return ""
