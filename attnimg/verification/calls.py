"""Run the attention call of a case: with a backend, as a model calls it, or with the reference.

Letters: B batch, T query tokens, S key tokens, H query heads, E head size of v.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnimg.facts import AttentionFunction, Backend, Pattern
from attnimg.verification.cases import Case
from attnimg.verification.inputs import Inputs
from attnimg.verification.process_state import is_rewound, states_after_draw
from attnimg.verification.reference import attend, shifted_keys, visible_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a call.

    Attributes:
        out: (B, T, H, E); from the reference, only the compared rows.
        gradients: "dq", "dk", "dv" and "dsinks" -> tensor; None where a gradient is missing.
        attached: whether the output is attached to the autograd graph.
        overwritten: names of the inputs that the call changed in place.
        dsinks_terms: each query's contribution to dsinks, (B, H, T); from the reference only.
    """

    out: Tensor
    gradients: dict[str, Tensor | None]
    attached: bool = True
    overwritten: tuple[str, ...] = ()
    dsinks_terms: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A call between its forward and its backward pass.

    Attributes:
        out: (B, T, H, E), with its graph.
        leaves: "dq" and so on -> the leaf tensor whose gradient it is.
        d_out: gradient of the output, in the memory layout in which it arrives.
        handed: name of an input -> the input, and a copy of it from before the call.
        overwritten: names of the inputs that the forward pass changed.
        reseeded: whether the forward pass seeded or rewound torch's random number generators.
        dropout: the rate of the call; at 0, neither pass needs random numbers.
    """

    out: Tensor
    leaves: dict[str, Tensor]
    d_out: Tensor
    handed: dict[str, tuple[Tensor, Tensor]]
    overwritten: tuple[str, ...]
    reseeded: bool
    dropout: float


class _Layer(nn.Module):  # type: ignore[misc]  # mypy does not follow torch
    """A stand-in for a model's attention layer, with the attributes that backends read."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_causal = True
        self.layer_idx = 0
        self.projection = nn.Linear(1, 1, dtype=dtype)


ALL = ("dq", "dk", "dv", "dsinks")


def call(function: AttentionFunction, backend: Backend, case: Case, inputs: Inputs) -> Result:
    """Run a backend's forward and backward pass, with the arguments that a model would pass.

    Raises:
        Exception: whatever the kernel raises.
    """
    return backward(forward(function, backend, case, inputs))


def forward(
    function: AttentionFunction,
    backend: Backend,
    case: Case,
    inputs: Inputs,
    *,
    dropout: float = 0.0,
    learning: tuple[str, ...] = ALL,
) -> Started:
    """Run a backend's forward pass; `learning` names the gradients that will be requested."""
    named = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
    if inputs.sinks is not None:
        named["dsinks"] = inputs.sinks
    # detach() keeps the strides, which the probe tests as well.
    leaves = {name: leaf.detach().requires_grad_(name in learning) for name, leaf in named.items()}
    arguments = _arguments(backend, case, inputs, sinks=leaves.get("dsinks"))
    d_out = _d_out(case, inputs)
    given = {name[1:]: leaf.detach() for name, leaf in leaves.items()} | {"d_out": d_out}
    given |= {name: value for name, value in arguments.items() if name.startswith("cu_seq_lens")}
    handed = {name: (value, value.clone()) for name, value in given.items()}
    dtype = getattr(torch, case.geometry.dtype)
    autocast = case.geometry.autocast
    # Built before the generators' states are read, since initializing a layer draws numbers.
    layer, mask = _Layer(inputs.q.dtype).to(inputs.q.device), _mask(backend, case, inputs)
    random = states_after_draw(inputs.q.device)
    with torch.autocast(inputs.q.device.type, dtype if autocast else None, enabled=autocast):
        out, _ = function(
            layer,
            leaves["dq"],
            leaves["dk"],
            leaves["dv"],
            mask,
            dropout=dropout,
            **arguments,
        )
    reseeded = not dropout and is_rewound(random, inputs.q.device)
    return Started(
        out=out,
        leaves=leaves,
        d_out=d_out,
        handed=handed,
        overwritten=_changed(handed),
        reseeded=reseeded,
        dropout=dropout,
    )


def forward_only(started: Started) -> Result:
    """Return the result of a call without a backward pass."""
    return Result(out=started.out.detach(), gradients={}, overwritten=_overwritten(started))


def backward(started: Started) -> Result:
    """Run the backward pass of a call, and return its result."""
    out, d_out = started.out, started.d_out
    learning = {name: leaf for name, leaf in started.leaves.items() if leaf.requires_grad}
    gradients: dict[str, Tensor | None] = dict.fromkeys(learning)
    random = states_after_draw(d_out.device)
    if out.shape == d_out.shape and out.requires_grad:
        leaves = list(learning.values())
        found = torch.autograd.grad(out, leaves, d_out.to(out.dtype), allow_unused=True)
        gradients = dict(zip(learning, found, strict=True))
    reseeded = not started.dropout and is_rewound(random, d_out.device)
    return Result(
        out=out.detach(),
        gradients=gradients,
        attached=out.requires_grad,
        overwritten=_overwritten(started, reseeded=reseeded),
    )


def _overwritten(started: Started, *, reseeded: bool = False) -> tuple[str, ...]:
    """Return the names of the inputs that a call wrote to, in its forward pass or later."""
    names = started.overwritten or _changed(started.handed)
    if started.reseeded or reseeded:
        names = (*names, "torch's random numbers")
    return names


def _changed(handed: dict[str, tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    return tuple(name for name, (value, copy) in handed.items() if not torch.equal(value, copy))


def _d_out(case: Case, inputs: Inputs) -> Tensor:
    """Return d_out stored by tokens, or by heads, as it arrives where the next layer transposes."""
    d_out = inputs.d_out
    if 0 in d_out.stride() or case.layout == "fused":
        return d_out
    return d_out.transpose(1, 2).contiguous().transpose(1, 2)


def reference(
    case: Case,
    inputs: Inputs,
    *,
    dtype: torch.dtype,
    pattern: Pattern = "full",
    keep: Tensor | None = None,
) -> Result:
    """Compute plain attention in a given precision, at the compared rows only.

    Args:
        case: the probe.
        inputs: its tensors.
        dtype: float64 for the exact result, the run's own dtype to measure its rounding.
        pattern: which keys queries see; "shifted" needs equally many queries and keys, not packed.
        keep: factors on the attention weights, (B, H, T, S).
    """
    leaves = {name: x.requires_grad_() for name, x in _leaves(inputs, dtype=dtype).items()}
    out = _plain_output(case, inputs, leaves, pattern=pattern, keep=keep)
    d_out = inputs.d_out[:, inputs.rows].to(dtype)
    found = torch.autograd.grad(out, list(leaves.values()), d_out)
    gradients: dict[str, Tensor | None] = dict(zip(leaves, found, strict=True))
    terms = None
    if inputs.sinks is not None:
        terms = found[-1].squeeze(-1)
        gradients["dsinks"] = terms.sum((0, 2))
    return Result(out=out.detach(), gradients=gradients, dsinks_terms=terms)


def _leaves(inputs: Inputs, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return gradient name -> q, k, v or the sinks of each query, in a given precision."""
    leaves = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
    if inputs.sinks is not None:
        shape = (len(inputs.q), -1, len(inputs.rows), 1)
        leaves["dsinks"] = inputs.sinks[:, None, None].expand(shape)
    return {name: leaf.detach().to(dtype) for name, leaf in leaves.items()}


def _plain_output(
    case: Case,
    inputs: Inputs,
    leaves: dict[str, Tensor],
    *,
    pattern: Pattern,
    keep: Tensor | None = None,
) -> Tensor:
    """Return the output of plain attention at the compared rows; see `reference`."""
    places = inputs.rows + (inputs.k.shape[2] - inputs.q.shape[2])
    if pattern == "shifted":
        visible = shifted_keys(inputs.documents, heads=inputs.q.shape[1])[:, :, inputs.rows]
    else:
        visible = visible_keys(inputs.documents, places=places, window=case.geometry.window)
    return attend(
        leaves["dq"].index_select(2, inputs.rows),
        leaves["dk"],
        leaves["dv"],
        visible=visible,
        scale=inputs.scale,
        softcap=case.geometry.softcap,
        sinks=leaves.get("dsinks"),
        keep=keep,
    )


def slope_of_scale(case: Case, inputs: Inputs, *, pattern: Pattern, exact: Result) -> Tensor:
    """Return d(output) / d(log scale) at the compared rows."""
    step = 1e-4
    steeper = replace(inputs, scale=inputs.scale * (1 + step))
    leaves = _leaves(inputs, dtype=torch.float64)
    return (_plain_output(case, steeper, leaves, pattern=pattern) - exact.out) / step


def _arguments(
    backend: Backend, case: Case, inputs: Inputs, *, sinks: Tensor | None
) -> dict[str, Any]:
    arguments: dict[str, Any] = {"scaling": inputs.scale}
    if case.geometry.window is not None:
        arguments["sliding_window"] = case.geometry.window
    if case.geometry.softcap is not None:
        arguments["softcap"] = case.geometry.softcap
    if sinks is not None:
        arguments["s_aux"] = sinks
    if case.queries is None:
        arguments["position_ids"] = _positions(inputs.documents)
    if case.packed and backend.mask == "flash":
        lengths = torch.tensor((0, *case.lengths), device=inputs.q.device)
        ends = lengths.cumsum(0).to(torch.int32)
        longest = max(case.lengths) + case.longest_slack
        for side in "qk":
            # Two tensors, as after moving a batch to a GPU, or the same tensor twice.
            arguments[f"cu_seq_lens_{side}"] = ends if case.layout == "fused" else ends.clone()
            arguments[f"max_length_{side}"] = longest
    return arguments


def _positions(documents: Tensor) -> Tensor:
    """Return the position of each token within its document, (B, S)."""
    place_S = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return place_S - torch.where(begins, place_S, 0).cummax(1).values


def _mask(backend: Backend, case: Case, inputs: Inputs) -> Any:
    """Build the attention_mask that transformers would hand to this backend."""
    padded = bool((inputs.documents < 0).any())
    n_keys, n_queries = inputs.k.shape[2], inputs.q.shape[2]
    if backend.mask == "flash":
        return (inputs.documents >= 0) if padded else None
    window = case.geometry.window
    # For such calls transformers passes no mask to sdpa, which then uses is_causal.
    plain = not padded and not case.packed and n_keys == n_queries
    if backend.mask == "sdpa" and plain and (window is None or window >= n_keys):
        return None
    places = torch.arange(n_keys - n_queries, n_keys, device=inputs.q.device)
    seen = visible_keys(inputs.documents, places=places, window=window)
    if padded:
        # A query on padding sees no key, so its output would be NaN: transformers lets it see
        # itself.
        itself = places[:, None] == torch.arange(n_keys, device=places.device)
        seen |= itself & ~seen.any(-1, True)
    if backend.mask == "eager":
        lowest = torch.finfo(inputs.q.dtype).min
        return torch.zeros_like(seen, dtype=inputs.q.dtype).masked_fill(~seen, lowest)
    if backend.mask == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        def look_up(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del head
            return seen[batch, 0, query, key]

        n_rows = len(inputs.documents)
        return create_block_mask(look_up, n_rows, None, n_queries, n_keys, device=seen.device)
    return seen
