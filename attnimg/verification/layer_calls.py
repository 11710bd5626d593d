"""Call a layer with drawn inputs, forward and backward, for the proof of replaced layers.

As in a model, several calls run forward before the first one runs backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnimg.verification.layer_subjects import Call, Draw


class Layout(NamedTuple):
    """How the tensors of a call lie in memory, and which of its inputs are trained.

    Attributes:
        inputs: of activations: "contiguous", "transposed" as (B, T, H, D) views of (B, H, T, D), or
            "strided", every other number of a larger tensor.
        gradients: of the outputs: "contiguous", "transposed", or "expanded": one row with strides
            of 0, as the gradient of a sum over rows is.
        frozen: inputs that get no gradients.
        evaluates: whether the call runs without gradients, as in an evaluation.
    """

    inputs: str = "contiguous"
    gradients: str = "contiguous"
    frozen: frozenset[str] = frozenset()
    evaluates: bool = False


class Tiling(NamedTuple):
    """The tokens of a large call, each of which repeats one of a small call.

    Attributes:
        index: the places in the small call, along the dimension of tokens.
        factors: of each token's gradient: a power of two, or 0.
        total: the factor of the sum of all gradients, which weights get.
        dim: the dimension of tokens.
    """

    index: Tensor
    factors: Tensor
    total: float
    dim: int

    def repeat(self, value: Tensor) -> Tensor:
        """Return a tensor of the large call, from one of the small call."""
        return value.index_select(self.dim, self.index.to(value.device))

    def scale(self, gradient: Tensor) -> Tensor:
        """Multiply the gradients of some tokens of the large call by their factors, in place."""
        shape = [-1 if place == self.dim else 1 for place in range(gradient.dim())]
        return gradient.mul_(self.factors.to(gradient.device, gradient.dtype).view(shape))

    def part(self, start: int, stop: int) -> Tiling:
        """Return some of the tokens."""
        return self._replace(index=self.index[start:stop], factors=self.factors[start:stop])


def tile(drawn: Draw, length: int, generator: torch.Generator) -> Tiling | None:
    """Return how to repeat the tokens of a draw, so that a large call has a small reference.

    Args:
        drawn: the inputs of the small call.
        length: tokens of the large call, along the dimension of tokens.
        generator: chooses the order.

    Returns:
        None where the small call is as large.
    """
    distinct = drawn.d_out[0].shape[drawn.dim]
    copies = length // distinct
    if length <= distinct:
        return None
    order = torch.randperm(length, generator=generator)
    # All tokens have the same number of gradients, so that sums are those of the small call.
    # The factor keeps sums over many tokens within the range of float16.
    factor = 2.0 ** -(length >> 13).bit_length()
    factors = factor * (order < copies * distinct).double()
    return Tiling(order % distinct, factors, factor * copies, drawn.dim)


class LayerInputs(NamedTuple):
    """The inputs of a call.

    Attributes:
        drawn: their values.
        layout: their places in memory.
        tiling: how to repeat their tokens; None for once.
    """

    drawn: Draw
    layout: Layout
    tiling: Tiling | None = None


class LayerCall(NamedTuple):
    """Outputs and gradients of a call, by name; and inputs that the model uses and it changed."""

    values: dict[str, Tensor | None]
    changed: tuple[str, ...]


class _Forward(NamedTuple):
    """A call that ran forward."""

    inputs: LayerInputs
    outputs: tuple[Tensor, ...]
    leaves: Mapping[str, Tensor]
    given: Mapping[str, Tensor]
    before: Mapping[str, Tensor]


def run_calls(
    call: Call,
    inputs: Sequence[LayerInputs],
    *,
    device: str,
    autocast: torch.dtype | None = None,
    in_float64: bool = False,
    in_reverse: bool = False,
) -> list[LayerCall]:
    """Run calls forward, and then backward.

    Args:
        call: calls the layer.
        inputs: of each call.
        device: "cpu" or "cuda".
        autocast: the precision of torch.autocast in the forward pass; None for none.
        in_float64: whether to compute the reference.
        in_reverse: whether the backward passes begin with the last call, as those of the layers of
            a model; else with the first one.
    """

    def context() -> AbstractContextManager[Any]:
        if in_float64:
            return _InFloat64()
        return torch.autocast(device, autocast) if autocast else nullcontext()

    started = []
    for one in inputs:
        with context():
            started.append(_forward(call, one, device=device, in_float64=in_float64))
    # After all forward passes, which must not change earlier results.
    outputs = [[out.detach().clone() for out in one.outputs] for one in started]
    for forward in reversed(started) if in_reverse else started:
        _backward(forward)
    return [_results(one, found) for one, found in zip(started, outputs, strict=True)]


def _forward(call: Call, inputs: LayerInputs, *, device: str, in_float64: bool) -> _Forward:
    """Call a layer with activations that are copies of the leaves.

    In a model they are results of other layers, whose memory a kernel may reuse.
    """
    drawn, layout, tiling = inputs

    def make(key: str, value: Tensor) -> Tensor:
        value = value.to(device, drawn.dtypes.get(key) if not in_float64 else None, copy=True)
        return tiling.repeat(value) if tiling and key not in drawn.weights else value

    given = {key: make(key, value) for key, value in drawn.others.items()}
    leaves: dict[str, Tensor] = {}
    for key, value in drawn.leaves.items():
        leaf = leaves[key] = make(key, value).requires_grad_(key not in layout.frozen)
        given[key] = leaf if key in drawn.weights else _lay_out(leaf, layout.inputs)
    watched = [key for key in given if key in drawn.kept or key in drawn.weights]
    before = {key: given[key].detach().clone() for key in watched}
    with torch.set_grad_enabled(not layout.evaluates):
        outputs = call(given)
    return _Forward(inputs, outputs, leaves, given, before)


def _backward(one: _Forward) -> None:
    """Run a backward pass with copies of the drawn gradients, which a kernel may overwrite."""
    drawn, layout, tiling = one.inputs
    if layout.evaluates:
        # A kernel that overwrites its input returns a tensor that requires gradients.
        return
    trained = [
        (out, d_out.to(out.device, out.dtype, copy=True))
        for out, d_out in zip(one.outputs, drawn.d_out, strict=True)
        if out.requires_grad
    ]
    if tiling:
        trained = [(out, tiling.scale(tiling.repeat(d_out))) for out, d_out in trained]
    if trained:
        gradients = [_gradient(d_out, out, layout.gradients) for out, d_out in trained]
        torch.autograd.backward([out for out, _ in trained], gradients)


def _gradient(d_out: Tensor, out: Tensor, layout: str) -> Tensor:
    if layout == "expanded":
        return d_out.flatten(0, -2)[0].expand(out.shape)
    return _lay_out(d_out, layout)


def _lay_out(value: Tensor, layout: str) -> Tensor:
    """Return a copy with a layout."""
    if layout == "contiguous":
        return value.clone(memory_format=torch.contiguous_format)
    if layout == "strided":
        return torch.stack((value, value), -1)[..., 0]
    if value.dim() < 3:
        return torch.cat((value, value), -1)[..., : value.shape[-1]]
    turned = value.transpose(-3, -2).clone(memory_format=torch.contiguous_format)
    return turned.transpose(-3, -2)


def _results(one: _Forward, outputs: Sequence[Tensor]) -> LayerCall:
    values: dict[str, Tensor | None] = {}
    for number, out in enumerate(outputs):
        values["out" if len(outputs) == 1 else f"out {number}"] = out
    values |= {f"d{key}": leaf.grad for key, leaf in one.leaves.items()}
    changed = tuple(
        key for key, value in one.before.items() if not torch.equal(one.given[key].detach(), value)
    )
    return LayerCall(values, changed)


class _InFloat64(TorchFunctionMode):  # type: ignore[misc]  # torch is Any here
    """Compute in float64 where a model's code casts to float32, as norms and RoPE do."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace float32 in the arguments, and Tensor.float by Tensor.double."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)
