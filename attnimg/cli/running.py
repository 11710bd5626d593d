"""Set up the running check: find the backend of a call, and compare the call by its bounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from attnimg.apply.router import shape_of
from attnimg.facts import Backend, CallCheck, LayerGroup, Plan, RunContext
from attnimg.train.attention_check import AttentionCheck

if TYPE_CHECKING:
    from attnimg.backends._capture import CapturedCall

# Backends that the error on a wrong one suggests: torch's own, then plain attention.
_OTHERS = ("sdpa", "eager")


def attention_check_of(
    every: int,
    found: Plan,
    context: RunContext,
    *,
    dropout: float,
    say: Callable[[str], None],
) -> AttentionCheck:
    """Return the check of a run's attention calls.

    Args:
        every: attn_check_steps.
        found: the plan of the run.
        context: how the run calls its model.
        dropout: of the attention weights.
        say: prints a line for the user.
    """
    from attnimg.verify.running import why_unchecked

    assert found.chosen is not None
    verdicts = [choice.verdict for choice in found.groups] or [found.chosen]
    used = {verdict.backend.name: verdict.backend for verdict in verdicts}
    # Plain attention supports every model.
    fitting = {"eager", *(verdict.backend.name for verdict in found.verdicts if verdict.fits)}
    return AttentionCheck(
        every,
        partial(_judged, found, context),
        why_not=why_unchecked([*used.values()], context, dropout=dropout),
        others=[name for name in _OTHERS if name in fitting - used.keys()],
        say=say,
    )


def _judged(found: Plan, context: RunContext, call: CapturedCall, seed: str) -> CallCheck:
    from attnimg.verify.running import check_call

    return check_call(
        call,
        backend=_backend_of(found, call),
        dtype=context.dtype,
        longest=context.sequence_len,
        seed=seed,
    )


def _backend_of(found: Plan, call: CapturedCall) -> Backend:
    """Return the backend of the layer group most similar to a call.

    The call may lack the window or the soft cap of its layer.
    """
    assert found.chosen is not None
    kind = call.kind
    shape = (kind.head_dim_qk, kind.head_dim_v, kind.window, kind.softcap, kind.sinks)

    def similarity(layers: LayerGroup) -> int:
        return sum(a == b for a, b in zip(shape_of(layers), shape, strict=True))

    closest = max(found.groups, key=lambda choice: similarity(choice.layers), default=None)
    return (closest.verdict if closest else found.chosen).backend
