"""What a loaded model runs, and how to change that."""

from __future__ import annotations

from typing import Any

from attnimg.apply.registry import prepare
from attnimg.backends import repo_of
from attnimg.backends._transformers import DIRECT
from attnimg.errors import AttnimgError
from attnimg.facts import Backend, LayerGroup


def running(model: Any) -> str:
    """Name the attention implementation that a loaded model has, as transformers calls it."""
    return str(model.config._attn_implementation)


def require_applied(model: Any, backend: Backend) -> None:
    """Stop when a model runs something other than the plan says.

    transformers may fall back to a hub kernel or replace a name; neither is silent here.

    Raises:
        AttnimgError: the model's implementation is not the backend's.
    """
    found = running(model)
    if found == backend.applied_as or repo_of(found) == backend.hub_repo:
        return
    if backend.unpadded_v and found.startswith(DIRECT):
        return
    raise AttnimgError(
        f"{backend.name} was not applied",
        why=f"found {found} in the model, needed {backend.applied_as}; transformers replaced it",
        do="set attn_implementation to a backend that `attnimg explain` says fits",
        code="not-applied",
        key="attn_implementation",
        exit_code=1,
    )


def switch(
    model: Any, backend: Backend, *, layers: tuple[LayerGroup, ...] = (), trusted: bool = False
) -> None:
    """Change the attention of a loaded model, and make sure that it changed.

    Args:
        model: a transformers model, PEFT-wrapped ones included.
        backend: what to run from now on.
        layers: the model's attention.
        trusted: whether hub kernels of publishers the hub does not vouch for may run.

    Raises:
        AttnimgError: the model does not take it.
    """
    try:
        model.set_attn_implementation(prepare(backend, layers=layers, trusted=trusted))
    except (ValueError, ImportError, KeyError) as error:
        raise AttnimgError(
            f"{backend.name} could not be applied",
            why=str(error),
            do="set attn_implementation: eager, which every model takes",
            code="not-applied",
            key="attn_implementation",
            exit_code=1,
        ) from error
    require_applied(model, backend)
