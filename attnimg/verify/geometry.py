"""What a run's attention calls look like: one geometry for each kind of layer it has."""

from __future__ import annotations

from collections.abc import Sequence

from attnimg.facts import (
    Backend,
    Geometry,
    LayerGroup,
    LocalKernel,
    Machine,
    Problem,
    RunContext,
)
from attnimg.select.judge import with_effective_windows

# What is proven when the model's config is not at hand: grouped heads of the most frequent size.
UNKNOWN_MODEL = (LayerGroup(count=1, heads=8, kv_heads=2, head_dim_qk=64, head_dim_v=64),)
# Short runs on a CPU are no reason to prove on less than a few tiles.
SHORTEST_ROW = 64


def geometries_of(
    problem: Problem, context: RunContext, *, dense: bool, deterministic: bool, every_length: bool
) -> tuple[Geometry, ...]:
    """List the distinct geometries of a run.

    Args:
        problem: what the run has to do; its layers and its dropout count.
        context: how the run calls its model.
        dense: whether rows of one document are to be proven as well.
        deterministic: whether gradients must repeat bit for bit.
        every_length: whether documents of each length are to be shown.
    """
    model = with_effective_windows(problem).model
    layers: Sequence[LayerGroup] = model.layers if model else ()
    found = (
        Geometry(
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            head_dim_qk=layer.head_dim_qk,
            head_dim_v=layer.head_dim_v,
            window=layer.window,
            softcap=layer.softcap,
            sinks=layer.sinks,
            dtype=context.dtype,
            packing=context.packing,
            dropout=problem.dropout,
            sequence_len=max(context.sequence_len or 0, SHORTEST_ROW),
            dense=dense,
            deterministic=deterministic,
            rows=context.rows,
            autocast=context.autocast is not None,
            every_length=every_length,
        )
        for layer in layers or UNKNOWN_MODEL
    )
    return tuple(dict.fromkeys(found))


def local_kernel_of(backend: Backend, machine: Machine) -> LocalKernel | None:
    """Find the folder that LOCAL_KERNELS serves for a backend."""
    repo = (backend.hub_repo or "").partition("@")[0].partition(":")[0]
    return next((kernel for kernel in machine.local_kernels if kernel.repo == repo), None)


def has_dense_entry(backend: Backend, machine: Machine) -> bool:
    """Tell whether a backend takes rows of one document: some kernels have a varlen entry alone."""
    local = local_kernel_of(backend, machine)
    return local is None or local.exports is None or "flash_attn_func" in local.exports
