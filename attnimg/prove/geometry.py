"""What a run's attention calls look like: one geometry for each kind of layer it has."""

from __future__ import annotations

from collections.abc import Sequence

from attnimg.facts import Backend, Geometry, LayerGroup, LocalKernel, Machine, Problem
from attnimg.windows import with_windows_that_hide

# What is proven when the model's config is not at hand: grouped heads of the most frequent size.
UNKNOWN_MODEL = (LayerGroup(count=1, heads=8, kv_heads=2, head_dim_qk=64, head_dim_v=64),)


def geometries_of(
    problem: Problem,
    *,
    sequence_len: int,
    dense: bool = True,
    deterministic: bool = False,
    every_length: bool = False,
) -> tuple[Geometry, ...]:
    """List the distinct geometries of a problem.

    Args:
        problem: what the run has to do.
        sequence_len: tokens of its longest row.
        dense: whether rows of one document are to be proven as well.
        deterministic: whether gradients must repeat bit for bit.
        every_length: whether documents of each length are to be shown.
    """
    model = with_windows_that_hide(problem).model
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
            dtype=problem.dtype,
            packing=problem.packing,
            dropout=problem.dropout,
            sequence_len=sequence_len,
            dense=dense,
            deterministic=deterministic,
            rows=problem.rows,
            autocast=problem.autocast,
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
