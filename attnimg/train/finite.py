"""Refuse weights that are NaN or infinite, before their effects look like another error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnimg.errors import AttnimgError
from attnimg.train.distributed import rank

if TYPE_CHECKING:
    import torch


def require_finite(model: Any, *, name: str, files: Iterable[Path]) -> None:
    """Raise when a weight is NaN or infinite; the first process looks for all.

    Args:
        model: as it was loaded, without an adapter.
        name: what it was loaded from.
        files: safetensors to read as well. Those of a model that was quantized while it was
            loaded: bitsandbytes makes a finite number of a NaN.

    Raises:
        AttnimgError: code weights-not-finite, with the first such tensor and how many there are.
    """
    # Where weights are sharded, other processes may hold memory that is not filled yet.
    if rank() != 0:
        return
    bad = [label for label, tensor in model.named_parameters() if not _is_finite(tensor.detach())]
    bad += [label for label, tensor in _stored(files) if not _is_finite(tensor)]
    if not bad:
        return
    others = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    raise AttnimgError(
        f"{name} has weights that are NaN or infinite",
        why=f"found {bad[0]}{others}; needed finite numbers",
        do="use an earlier checkpoint, or download the model again; with fp16: true set bf16: true "
        "instead, since weights above 65504 are infinite in float16",
        code="weights-not-finite",
        key="base_model",
    )


def _stored(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors of safetensors files, one at a time."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for label in tensors.keys():  # noqa: SIM118  it has no __iter__
                yield label, tensors.get_tensor(label)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are finite, without a copy as large as the tensor."""
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # float8 has no comparisons
        return bool(tensor.float().isfinite().all())
    low, high = tensor.aminmax()
    return bool((low.isfinite() & high.isfinite()).item())
