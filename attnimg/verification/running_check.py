"""Compare an attention call of a training step with the reference: the running check.

A kernel may fail only from its 3000th call on, or at a single length, which no finite proof finds.
One row of one layer's call is computed again block by block (blocks.py), in float64 and as plain
attention in the run's precision, for as many heads as the budgets below allow. The bounds are those
of the proofs (checks.py).
Letters: B batch, T query and key tokens, H query heads, G key heads, D and E head sizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnimg.backends._varlen import AttentionCall, read_call
from attnimg.errors import AttnimgError
from attnimg.facts import AttentionFunction, Backend, DType
from attnimg.run_facts import CallCheck, Figure, Reason, RunContext
from attnimg.verification.blocks import (
    NotComparable,
    RowAttention,
    Span,
    block_reference,
    choose_documents,
    read_argument_spans,
    read_mask_spans,
)
from attnimg.verification.cases import Scores
from attnimg.verification.checks import (
    GAIN,
    GAIN_VALUES,
    SHORT,
    Fault,
    allowed_error,
    allowed_gain,
    fit_factor,
    largest,
    numerics_fault,
    with_device_bounds,
)
from attnimg.verification.rounding import UNIT, rounding_bounds

NAMES = ("dq", "dk", "dv")


class CallKind(NamedTuple):
    """The properties of a call that determine which kernel its layer runs."""

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
        needs_grad: the gradients that the model needs, of dq, dk and dv.
        out: (B, T, H, E).
        d_out: gradient of out; None where none arrived.
        gradients: those of `needs_grad` that arrived.
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
    needs_grad: tuple[str, ...]
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
            return partial(self._called, original(interface, *arguments, **named))

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
        kind = _read_kind(query, key, value, arguments)
        if place == len(self.kinds):
            self.kinds.append(kind)
        # Checkpointed activations are computed twice, the first time perhaps without gradients.
        if place != self.layer or self._started or not torch.is_grad_enabled():
            return function(module, query, key, value, attention_mask, **arguments)
        self._started = True
        # Views, since other calls may share k and v, whose gradients are then added up.
        tensors = [x.view_as(x) for x in (query, key, value)]
        out, *rest = function(module, *tensors, attention_mask, **arguments)
        output = out.view_as(out)
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
            autocast=_autocast_dtype(query.device.type),
            needs_grad=tuple(name for name, x in pairs if x.requires_grad),
            out=out.detach(),
            d_out=None,
            gradients={},
        )
        self._versions = _versions(self._call)
        if not output.requires_grad:
            self._finish()
            return output, *rest
        for name, x in (("d_out", output), *pairs):
            if x.requires_grad:
                x.register_hook(partial(self._record, name))
        return output, *rest

    def _record(self, name: str, gradient: Tensor) -> None:
        assert self._call is not None
        self._gradients[name] = gradient.detach()
        if self._gradients.keys() >= {"d_out", *self._call.needs_grad}:
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
        name: x.detach().requires_grad_(name in call.needs_grad)
        for name, x in zip(NAMES, (call.q, call.k, call.v), strict=True)
    }
    device = call.q.device.type
    cast = torch.autocast(device, call.autocast, enabled=call.autocast is not None)
    with torch.enable_grad(), cast:
        out = call.function(call.module, *leaves.values(), call.mask, **call.arguments)[0]
    gradients: dict[str, Tensor] = {}
    if call.d_out is not None and out.requires_grad:
        needs_grad = [leaves[name] for name in call.needs_grad]
        found = torch.autograd.grad(out, needs_grad, call.d_out, allow_unused=True)
        pairs = zip(call.needs_grad, found, strict=True)
        gradients = {name: x for name, x in pairs if x is not None}
    return replace(call, out=out.detach(), gradients=gradients)


def _versions(call: CapturedCall) -> list[int]:
    return [x._version for x in (call.q, call.k, call.v, call.out)]


def _read_kind(query: Tensor, key: Tensor, value: Tensor, arguments: Mapping[str, Any]) -> CallKind:
    return CallKind(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim_qk=query.shape[-1],
        head_dim_v=value.shape[-1],
        window=arguments.get("sliding_window"),
        softcap=arguments.get("softcap"),
        sinks=arguments.get("s_aux") is not None,
    )


def _autocast_dtype(device: str) -> torch.dtype | None:
    if not torch.is_autocast_enabled(device):
        return None
    found: torch.dtype = torch.get_autocast_dtype(device)
    return found


# Bytes for the results of both references and their differences, and for the tiles of scores.
RESULT_BYTES, TILE_BYTES = 128 << 20, 96 << 20
# Query-key pairs, over all query heads, that a check computes. Where a single key head has more
# than LONG times as many, only a part of its tokens is compared.
PAIRS, LONG = {"cpu": 2**18, "cuda": 2**27}, 4
# Calls with larger scores have the bounds of the proofs' probes with large scores.
LARGE_SCORE = 32.0
# The factor of a quantity is compared only where rounding is below this share of the quantity.
MAX_ROUNDING_SHARE = 0.1
# The last tokens of a long row, which are always compared.
ENDS = 64
# Rows of at most this many tokens, whose queries see at most SHORT keys, have at least the bounds
# of rounding.py.
FEW_TOKENS = 256
_FEATURES = frozenset({"window", "softcap", "sinks", "dropout"})


def reason_not_checked(backends: list[Backend], context: RunContext, *, dropout: float) -> str:
    """Return why the calls of a run can't be compared with the reference; "" if they can."""
    if context.compiled:
        return "torch.compile fuses attention into the model's graph, which has no call to capture"
    if dropout:
        return f"attention_dropout: {dropout:g} drops other weights in each call"
    for backend in backends:
        if backend.k_forward is None:
            return f"{backend.name} quantizes q, k and v, and has no bound for real values"
        if backend.pattern != "full":
            return f"{backend.name} attends within groups of tokens"
    return ""


def check_call(
    call: CapturedCall, *, backend: Backend, dtype: DType, longest: int | None, seed: str
) -> CallCheck:
    """Compare a call with the reference; a wrong call is repeated and compared again.

    Args:
        call: with its gradients.
        backend: the backend that computed it, whose bounds are used.
        dtype: the run's precision.
        longest: the most tokens of a row to compare, in whole documents; None for all.
        seed: decides which row and heads are compared.
    """
    no_autocast = torch.autocast(call.q.device.type, enabled=False)
    backend = with_device_bounds(backend)
    unchecked = CallCheck(backend=backend.name, layer=call.layer)
    try:
        with torch.no_grad(), no_autocast:
            part = _choose_part(call, longest=longest, rng=random.Random(seed))
            figures, faults = _compare_part(call, part, backend=backend, dtype=dtype)
    except (NotComparable, AttnimgError) as error:
        why = error.why if isinstance(error, AttnimgError) else str(error)
        return replace(unchecked, skipped=why.splitlines()[0])
    except torch.OutOfMemoryError:
        return replace(unchecked, skipped="the GPU's memory is too full for the reference")
    check = replace(
        unchecked,
        figures=figures,
        faults=tuple(fault.reason for fault in faults),
        close_to_bound=bool(faults) and all(fault.noise_sensitive for fault in faults),
    )
    if not check.faults:
        return check
    try:
        again = call_again(call)
        with torch.no_grad(), no_autocast:
            _, repeated = _compare_part(again, part, backend=backend, dtype=dtype)
    except torch.OutOfMemoryError:
        return replace(check, repeated=False)
    # Foreign kernels may raise anything.
    except Exception as error:
        text = f"called again, it raised {type(error).__name__}: {error}"
        reasons = (*check.faults, Reason(code="crash", text=text))
        return replace(check, faults=reasons, close_to_bound=False, repeated=True)
    return replace(check, repeated=bool(repeated))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """The part of a call that is compared.

    Attributes:
        row: the index of the row in the batch.
        tokens: a range of the row; these and the other tokens do not see one another.
        heads: a range of key heads.
        first: the first key that each query sees, counted within `tokens`.
        last: the key after the last one that it sees.
        spans: the parts of `tokens` whose results are compared.
        call: scale, soft cap and sinks.
    """

    row: int
    tokens: slice
    heads: slice
    first: Tensor
    last: Tensor
    spans: list[Span]
    call: AttentionCall

    @property
    def query_heads(self) -> slice:
        """Return the query heads of the key heads."""
        group = self.call.q.shape[1] // self.call.k.shape[1]
        return slice(self.heads.start * group, self.heads.stop * group)


def _choose_part(call: CapturedCall, *, longest: int | None, rng: random.Random) -> _Part:
    """Choose a row, documents and heads to compare, at random within the budgets.

    Raises:
        NotComparable: the reference can't compute the call.
        AttnimgError: the model passes an argument that the reference does not support.
    """
    if call.written:
        raise NotComparable("the model overwrote a tensor of the call before its backward pass")
    if call.q.shape[2] != call.k.shape[2]:
        raise NotComparable(f"the call has {call.q.shape[2]} queries and {call.k.shape[2]} keys")
    masked = call.mask is not None and getattr(call.mask, "ndim", 0) != 2
    read = read_call(
        "the reference",
        call.module,
        call.q,
        call.k,
        call.v,
        None if masked else call.mask,
        features=_FEATURES,
        **call.arguments,
    )
    if read.dropout:
        raise NotComparable(f"the call has dropout {read.dropout:g}")
    row = rng.randrange(len(call.q))
    if masked:
        first, last = read_mask_spans(call.mask, row, n_tokens=call.q.shape[2])
    else:
        first, last = read_argument_spans(read, row)
    tokens = choose_documents(first, last, longest=longest, rng=rng)
    first, last = first[tokens] - tokens.start, last[tokens] - tokens.start
    group = call.q.shape[1] // call.k.shape[1]
    n_tokens = tokens.stop - tokens.start
    sizes = call.q.shape[-1] + call.v.shape[-1]
    per_head = int((last - first).sum()) * group
    budget = PAIRS.get(call.q.device.type, PAIRS["cuda"])
    bytes_per_token = 8 * 3 * sizes * (group + 1)
    tokens_in_memory = RESULT_BYTES // bytes_per_token
    heads = min(call.k.shape[1], budget // max(per_head, 1), tokens_in_memory // n_tokens)
    heads = max(1, heads)
    begin = rng.randrange(call.k.shape[1] - heads + 1)
    spans = [(0, n_tokens)]
    wanted = min(tokens_in_memory, n_tokens * LONG * budget // max(per_head, 1))
    if heads == 1 and wanted < n_tokens:
        spans = _choose_tokens(n_tokens, wanted, rng)
    return _Part(
        row=row,
        tokens=tokens,
        heads=slice(begin, begin + heads),
        first=first,
        last=last,
        spans=spans,
        call=read,
    )


def _choose_tokens(n_tokens: int, wanted: int, rng: random.Random) -> list[Span]:
    """Choose about `wanted` tokens: the last ones, and a random span before them."""
    ends = min(ENDS, n_tokens // 2)
    before = min(max(wanted - ends, ends), n_tokens - ends)
    begin = rng.randrange(n_tokens - ends - before + 1)
    return [(begin, begin + before), (n_tokens - ends, n_tokens)]


def _compare_part(
    call: CapturedCall, part: _Part, *, backend: Backend, dtype: DType
) -> tuple[tuple[Figure, ...], tuple[Fault, ...]]:
    """Compare a part of a call; return figures and faults.

    Values that overflow or underflow in the run's precision are not compared.
    """
    read, q_heads = part.call, part.query_heads
    q, k, v = (
        x[part.row, heads, part.tokens]
        for x, heads in ((call.q, q_heads), (call.k, part.heads), (call.v, part.heads))
    )
    out = call.out[part.row, part.tokens, q_heads].transpose(0, 1)
    sees = part.last > part.first
    d_out = None
    if call.d_out is not None and call.needs_grad:
        # Queries without a key are left out: their output is not defined by attention.
        d_out = call.d_out[part.row, part.tokens, q_heads].transpose(0, 1) * sees[:, None]
        # It is not finite after a NaN, or where float16's loss scale is too large.
        d_out = d_out if d_out.isfinite().all() else None
    if not all(x.isfinite().all() for x in (q, k, v)):
        raise NotComparable("q, k or v is NaN or inf")
    row = RowAttention(
        q=q,
        k=k,
        v=v,
        d_out=d_out,
        sinks=None if read.sinks is None else read.sinks.detach()[q_heads],
        first_T=part.first,
        last_T=part.last,
        scale=read.scale,
        softcap=read.softcap,
    )
    exact, plain = (
        block_reference(x, queries=part.spans, keys=part.spans, at_most_bytes=TILE_BYTES)
        for x in (row, _as_plain_attention(row, dtype))
    )
    heads = f"key heads {part.heads.start} to {part.heads.stop - 1}"
    compare = partial(
        _compare,
        backend=backend,
        dtype=dtype,
        case=f"row {part.row}, tokens {part.tokens.start} to {part.tokens.stop - 1}, {heads}",
        scores=_classify_scores(row),
    )
    seeing = torch.cat([sees[slice(*span)] for span in part.spans])
    found = _select(out, part.spans)[:, seeing]
    results = [*compare("out", found, exact.out[:, seeing], plain.out[:, seeing])]
    if d_out is not None:
        size, floors = _size_and_floors(row, d_out, dtype=dtype)
        for name in call.needs_grad:
            gradient = call.gradients.get(name)
            if gradient is not None:
                heads_of_name = q_heads if name == "dq" else part.heads
                gradient = _select(gradient[part.row, heads_of_name, part.tokens], part.spans)
            pair = getattr(exact, name), getattr(plain, name)
            results += compare(name, gradient, *pair, size=size, floor=floors.get(name, 0.0))
    figures = tuple(result for result in results if isinstance(result, Figure))
    return figures, tuple(result for result in results if isinstance(result, Fault))


def _as_plain_attention(row: RowAttention, dtype: DType) -> RowAttention:
    """Return a row that is computed as plain attention in the run's precision."""
    if dtype == "float32":
        return replace(row, dtype=torch.float32)
    kind = getattr(torch, dtype)
    q, k, v = (x.to(kind) for x in (row.q, row.k, row.v))
    d_out = None if row.d_out is None else row.d_out.to(kind)
    return replace(row, q=q, k=k, v=v, d_out=d_out, dtype=torch.float32, rounded_to=kind)


def _compare(
    name: str,
    found: Tensor | None,
    exact: Tensor,
    plain: Tensor,
    *,
    backend: Backend,
    dtype: DType,
    case: str,
    scores: Scores,
    size: float = 0.0,
    floor: float = 0.0,
) -> Iterator[Figure | Fault]:
    """Compare one quantity with both references; yield its figure, and a fault per broken rule.

    Args:
        name: "out", or the gradient.
        found: the result of the call; None for no gradient.
        exact: the reference in float64.
        plain: plain attention in the run's precision.
        backend: its bounds apply.
        dtype: the run's precision.
        case: the row, tokens and heads, for messages.
        scores: the distribution of the scores.
        size: size of the terms whose sum is the quantity; used where they cancel up to rounding.
        floor: the smallest allowed error.
    """
    if found is None:
        text = f"no gradient reaches {name[1:]} ({case})"
        yield Fault("grad-detached", text, noise_sensitive=False)
        return
    # The reference overflows or underflows in float16.
    if not plain.isfinite().all() or (exact.any() and not plain.any()):
        return
    if not found.isfinite().all():
        share = (~found.isfinite()).double().mean().item()
        text = f"{share:.0%} of {name} is NaN or infinite ({case})"
        yield Fault("nan", text, noise_sensitive=False)
        return
    rounding = plain.double() - exact
    allowed = allowed_error(
        backend,
        name,
        dtype=dtype,
        scores=scores,
        rounding=largest(rounding),
        size=largest(exact) if largest(exact) > UNIT * size else size,
    )
    # Values below the smallest normal number of the precision are rounded to denormal numbers.
    kind = torch.finfo(getattr(torch, dtype))
    allowed = max(allowed, floor, 4 * kind.eps * kind.smallest_normal)
    error = largest(found.double() - exact)
    yield Figure(quantity=name, error=error, allowed=allowed, case=case)
    if error > allowed:
        text = f"{name} is {error:.1e} off the reference, allowed {allowed:.1e} ({case})"
        yield numerics_fault(name, text, error=error, allowed=allowed)
    clear = rounding.square().sum() <= MAX_ROUNDING_SHARE**2 * exact.square().sum()
    if exact.numel() >= GAIN_VALUES and clear:
        off = fit_factor(found, exact) - 1
        gain = abs(fit_factor(plain, exact) - 1)
        limit = allowed_gain(backend, name, atol=GAIN[dtype], gain=gain)
        if abs(off) > limit:
            text = f"{name} is {1 + off:.4f} times the reference, allowed 1 +- {limit:.1e} ({case})"
            yield numerics_fault(name, text, error=abs(off), allowed=limit)


def _select(x: Tensor, spans: list[Span]) -> Tensor:
    """Return the tokens of some spans; x (heads, T, size)."""
    if len(spans) == 1:
        return x[:, slice(*spans[0])]
    return torch.cat([x[:, slice(*span)] for span in spans], 1)


def _classify_scores(row: RowAttention) -> Scores:
    """Return "large" if a score may exceed LARGE_SCORE: scores are at most |q| |k| scale."""
    longest_q, longest_k = (x.float().norm(dim=-1).max() for x in (row.q, row.k))
    return "large" if (longest_q * longest_k).item() * abs(row.scale) > LARGE_SCORE else "spread"


def _size_and_floors(
    row: RowAttention, d_out: Tensor, *, dtype: DType
) -> tuple[float, dict[str, float]]:
    """Return the size of terms that may cancel, and the smallest allowed errors in short rows.

    See checks.py, and rounding.py.
    """
    size = largest(d_out) * largest(row.v) * row.v.shape[-1] * row.scale
    size *= max(largest(row.q), largest(row.k))
    few = row.q.shape[1] <= FEW_TOKENS and int((row.last_T - row.first_T).max()) <= SHORT
    if not few:
        return size, {}
    unit = torch.finfo(getattr(torch, dtype)).eps / 2
    bounds = rounding_bounds(replace(row, d_out=d_out), unit=unit)
    return size, {name: largest(bound) for name, bound in bounds.items()}
