"""Prove that a call is right in the company that it has in training.

There every layer has called before the first of them goes backward, some calls record no gradient,
as with checkpointed activations and in evaluation, and where part of a model is frozen some of q, k
and v need none. What a call saves may be dropped and made again. A kernel that keeps something
between calls is right only when it is alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from attnimg.facts import AttentionFunction, Backend, Reason
from attnimg.verify.cases import Case
from attnimg.verify.checks import Expected, Fault, check_values, expected
from attnimg.verify.inputs import Inputs, draw
from attnimg.verify.one_call import ALL, backward, call, forward, forward_only, reference

# Calls that are under way at once, as many as a common model has layers.
_LAYERS = 32
# The gradients that are needed where an adapter is on some of the first layer's projections.
_SUBSETS = [names for size in (1, 2) for names in itertools.combinations(("dq", "dk", "dv"), size)]
# Calls that no gradient is asked of, and which of their arguments require one: a first pass with
# reentrant checkpointing, evaluation, generation, and layers below the first one that learns.
_WITHOUT = {
    "without gradients": (torch.no_grad, ALL),
    "in evaluation": (torch.no_grad, ()),
    "in inference mode": (torch.inference_mode, ()),
    "below what learns": (nullcontext, ()),
}


def check_company(
    function: AttentionFunction, backend: Backend, case: Case, inputs: Inputs, *, right: Expected
) -> Iterator[Fault]:
    """Call a backend without gradients, with some of them, and while another call is under way.

    Args:
        function: the backend's attention.
        backend: what it is judged by.
        case: the probe, short enough for all its rows to be compared.
        inputs: its tensors.
        right: what it should give.

    Raises:
        Exception: whatever the kernel raises.
    """
    before: torch.Tensor | None = None
    for what, (mode, learning) in _WITHOUT.items():
        with mode():
            found = forward_only(forward(function, backend, case, inputs, learning=learning))
        named = replace(case, name=f"{case.name}, {what}")
        if before is not None and _address(found.out) == _address(before):
            text = f"{named.name}: the output is in the memory of the one before"
            yield Fault(reason=Reason(code="numerics-fwd", text=text), noise_sensitive=False)
        before = found.out
        yield from check_values(backend, named, inputs, found=found, right=right)[1]
    found = call(_checkpointed(function), backend, case, inputs)
    named = replace(case, name=f"{case.name}, checkpointed")
    yield from check_values(backend, named, inputs, found=found, right=right)[1]
    for learning in _SUBSETS:
        found = backward(forward(function, backend, case, inputs, learning=learning))
        what = " and ".join(name[1:] for name in learning)
        named = replace(case, name=f"{case.name}, gradients of {what} alone")
        yield from check_values(backend, named, inputs, found=found, right=right)[1]
    yield from _interleaved(function, backend, case, inputs, right=right)


def _address(value: torch.Tensor) -> int:
    return int(value.untyped_storage().data_ptr())


def _checkpointed(function: AttentionFunction) -> AttentionFunction:
    """Drop what a call saves, and make it again in the backward pass, as with long sequences."""

    def attend(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return attend


def _interleaved(
    function: AttentionFunction, backend: Backend, case: Case, inputs: Inputs, *, right: Expected
) -> Iterator[Fault]:
    """Make calls forward, then the first two backward; the second's gradient comes from a sum."""
    second = replace(case, name=f"{case.name}, a second call")
    others = draw(second, device=str(inputs.q.device))
    others = replace(
        others, d_out=torch.ones_like(others.d_out[:1, :1, :1, :1]).expand(others.d_out.shape)
    )
    started = forward(function, backend, case, inputs)
    first_out = started.out.detach().clone()
    follows = forward(function, backend, second, others)
    if not torch.equal(started.out, first_out):
        text = f"{second.name} wrote into the output of the first"
        reason = Reason(code="numerics-fwd", text=text)
        yield Fault(reason=reason, noise_sensitive=False)
    held = [forward(function, backend, second, others) for _ in range(_LAYERS - 2)]
    found = backward(started)
    del held
    gradients = {name: g.clone() for name, g in found.gradients.items() if g is not None}
    after = backward(follows)
    for name, gradient in gradients.items():
        if not torch.equal(found.gradients[name], gradient):
            text = f"{second.name} wrote into {name} of the first"
            reason = Reason(code="numerics-bwd", text=text)
            yield Fault(reason=reason, noise_sensitive=False)
    first = replace(case, name=f"{case.name}, a second call before the backward pass")
    yield from check_values(backend, first, inputs, found=found, right=right)[1]
    of_second = expected(
        *(
            reference(second, others, dtype=dtype, pattern=backend.pattern)
            for dtype in (torch.float64, inputs.q.dtype)
        )
    )
    yield from check_values(backend, second, others, found=after, right=of_second)[1]
