"""Capture one attention call of a training step: its inputs, its output and its gradients.

Models of transformers ask AttentionInterface.get_interface for the function of each call, eager
attention included. It returns a function that records calls only while a Capture is installed, so
other steps run unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnimg.facts import AttentionFunction

NAMES = ("dq", "dk", "dv")


class CallKind(NamedTuple):
    """The properties of a call that decide which kernel its layer runs."""

    heads: int
    kv_heads: int
    head_dim_qk: int
    head_dim_v: int
    window: int | None
    softcap: float | None
    sinks: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedCall:
    """One call of attention, as a model made it.

    Attributes:
        function: what the model called.
        module: its attention layer.
        layer: the layer's number in the model.
        kind: its heads, head sizes, window, soft cap and sinks.
        q: (B, H, T, D).
        k: (B, G, S, D).
        v: (B, G, S, E).
        mask: the attention_mask.
        arguments: all others, by name.
        autocast: the dtype that torch.autocast cast to; None where it was off.
        learning: the gradients that the model needs, of dq, dk and dv.
        out: (B, T, H, E).
        d_out: gradient of out; None where none arrived.
        gradients: those of `learning` that arrived.
        written: whether the model overwrote a tensor of the call before its backward pass.
    """

    function: AttentionFunction
    module: Any
    layer: int
    kind: CallKind
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    arguments: Mapping[str, Any]
    autocast: torch.dtype | None
    learning: tuple[str, ...]
    out: Tensor
    d_out: Tensor | None
    gradients: Mapping[str, Tensor]
    written: bool = False


class Capture:
    """Capture the first call of one layer that records gradients.

    Args:
        layer: which of the model's attention layers, counted in the order of their calls.
        done: called with the captured call in the backward pass, as soon as all of its gradients
            exist, while its tensors are still in memory.

    Attributes:
        kinds: the kind of each layer, in the order of their calls.
    """

    def __init__(self, layer: int, done: Callable[[CapturedCall], None]) -> None:
        self.layer, self._done = layer, done
        self.kinds: list[CallKind] = []
        self._order: dict[int, int] = {}
        self._call: CapturedCall | None = None
        self._versions: list[int] = []
        self._gradients: dict[str, Tensor] = {}
        self._started = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Record a call inside the block, which runs a forward and a backward pass."""
        from transformers import AttentionInterface

        original = AttentionInterface.get_interface

        def get_interface(interface: Any, *arguments: Any, **named: Any) -> AttentionFunction:
            function = original(interface, *arguments, **named)

            return partial(self._called, function)

        AttentionInterface.get_interface = get_interface
        try:
            yield
        finally:
            AttentionInterface.get_interface = original
        # The kernel did not return the gradients that are missing here.
        if self._call is not None:
            self._finish()

    def _called(
        self,
        function: AttentionFunction,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **arguments: Any,
    ) -> Any:
        """Call the function; record the call if it is the one to capture."""
        place = self._order.setdefault(id(module), len(self._order))
        kind = _kind_of(query, key, value, arguments)
        if place == len(self.kinds):
            self.kinds.append(kind)
        # Checkpointed activations are computed twice, the first time perhaps without gradients.
        if place != self.layer or self._started or not torch.is_grad_enabled():
            return function(module, query, key, value, attention_mask, **arguments)
        self._started = True
        # Views, since other calls may share k and v, whose gradients are then added up.
        tensors = [x.view_as(x) for x in (query, key, value)]
        out, *rest = function(module, *tensors, attention_mask, **arguments)
        taken = out.view_as(out)
        pairs = list(zip(NAMES, tensors, strict=True))
        index = getattr(module, "layer_idx", None)
        self._call = CapturedCall(
            function=function,
            module=module,
            layer=index if isinstance(index, int) else place,
            kind=kind,
            q=query.detach(),
            k=key.detach(),
            v=value.detach(),
            mask=attention_mask,
            arguments=arguments,
            autocast=_autocast(query.device.type),
            learning=tuple(name for name, x in pairs if x.requires_grad),
            out=out.detach(),
            d_out=None,
            gradients={},
        )
        self._versions = _versions(self._call)
        if not taken.requires_grad:
            self._finish()
            return taken, *rest
        for name, x in (("d_out", taken), *pairs):
            if x.requires_grad:
                x.register_hook(partial(self._record, name))
        return taken, *rest

    def _record(self, name: str, gradient: Tensor) -> None:
        assert self._call is not None
        self._gradients[name] = gradient.detach()
        if self._gradients.keys() >= {"d_out", *self._call.learning}:
            self._finish()

    def _finish(self) -> None:
        """Pass the call to `done`, and free its tensors."""
        assert self._call is not None
        call, self._call = self._call, None
        gradients, self._gradients = self._gradients, {}
        written = _versions(call) != self._versions
        d_out = gradients.pop("d_out", None)
        self._done(replace(call, d_out=d_out, gradients=gradients, written=written))


def call_again(call: CapturedCall) -> CapturedCall:
    """Call the function once more with the inputs of a captured call, forward and backward.

    Raises:
        Exception: whatever the kernel raises.
    """
    leaves = {
        name: x.detach().requires_grad_(name in call.learning)
        for name, x in zip(NAMES, (call.q, call.k, call.v), strict=True)
    }
    device = call.q.device.type
    cast = torch.autocast(device, call.autocast, enabled=call.autocast is not None)
    with torch.enable_grad(), cast:
        out = call.function(call.module, *leaves.values(), call.mask, **call.arguments)[0]
    gradients: dict[str, Tensor] = {}
    if call.d_out is not None and out.requires_grad:
        learning = [leaves[name] for name in call.learning]
        found = torch.autograd.grad(out, learning, call.d_out, allow_unused=True)
        pairs = zip(call.learning, found, strict=True)
        gradients = {name: x for name, x in pairs if x is not None}
    return replace(call, out=out.detach(), gradients=gradients)


def _versions(call: CapturedCall) -> list[int]:
    return [x._version for x in (call.q, call.k, call.v, call.out)]


def _kind_of(query: Tensor, key: Tensor, value: Tensor, arguments: Mapping[str, Any]) -> CallKind:
    return CallKind(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim_qk=query.shape[-1],
        head_dim_v=value.shape[-1],
        window=arguments.get("sliding_window"),
        softcap=arguments.get("softcap"),
        sinks=arguments.get("s_aux") is not None,
    )


def _autocast(device: str) -> torch.dtype | None:
    if not torch.is_autocast_enabled(device):
        return None
    found: torch.dtype = torch.get_autocast_dtype(device)
    return found
