"""Prove the layers that Liger or a hub kernel replaces in a model, against its own in float64.

The model is built twice on the meta device, and the layers of one of them are replaced. Each kind
of replaced layer is called with weights and inputs of the model's sizes, forward and backward.
The reference is the same layer of the other model, in float64. So a wrong kernel is refused, and a
right kernel with a wrong setting too: epsilon, offset, activation.

The calls have the forms that training has: several forward passes before a backward pass, as many
tokens as a batch of the run, one row or more, transposed and strided tensors, frozen inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnimg import hub_layers, liger
from attnimg.run_facts import Figure, LayersTask, Reason
from attnimg.verification.checks import worst_figures
from attnimg.verification.layer_calls import LayerCall, LayerInputs, Layout, Tiling, run_calls, tile
from attnimg.verification.layer_subjects import Form, Subject, build_model, list_subjects

# The lowest precision of the inputs -> how far the largest error of a row, the root mean square
# error and the factor that fits the result best may be off, beyond FACTOR times the errors of the
# model's own layer. In half precision: two units in the last place, half of one, and a 32nd of one,
# since rounding errors have both signs (more for few values). In float32: errors of a GPU's fast
# exp, rsqrt and tanh. Our choice (2026-11-27).
LARGEST = {"bfloat16": 2.0**-6, "float16": 2.0**-9, "float32": 1e-5}
MEAN = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 3e-6}
GAIN = {"bfloat16": 2.0**-12, "float16": 2.0**-15, "float32": 1e-6}
FACTOR = 2.0

# The same for float32 where a kernel multiplies matrices, in TF32: 10 bits of mantissa.
TF32 = 2.0**-10

# Products of matrices round in proportion to their largest terms, and an activation's slope changes
# most near 0, so that more of a result is lost where they are large.
EXTREME_PRODUCTS = 8.0

# Tokens of a reference, whose inputs a larger call repeats, and numbers of their rows.
TOKENS, FEW_TOKENS, NUMBERS = 128, 16, {"cpu": 1 << 20, "cuda": 1 << 22}

# Numbers of the largest call on a CPU, which takes time. On a GPU, bytes per number of two calls:
# inputs, outputs, gradients and copies of them.
CPU_NUMBERS, BYTES = 1 << 21, 48

# Liger has another kernel for norms of up to 256 columns with 32,768 rows and more, which the heads
# of q and k have.
# Source: liger-kernel 0.8.5, ops/rms_norm.py, rms_norm_forward (2026-11-27)
NARROW, MANY_ROWS = 256, 32768 + 37

# Numbers of a large call that are compared at once.
COMPARED = 1 << 24


class TaskResult(NamedTuple):
    """The figures nearest to their bounds, the broken rules, the number of cases, and limits."""

    figures: list[Figure]
    reasons: list[Reason]
    cases: int
    note: str = ""


class _Case(NamedTuple):
    """Calls that run together: the form, layout and tokens of each."""

    name: str
    calls: tuple[tuple[Form, Layout], ...]
    tokens: int = 0
    in_both_orders: bool = False


def prove_layers(task: LayersTask, *, device: str, on_case: Callable[[str], None]) -> TaskResult:
    """Prove all layers of an op in a run's model.

    Args:
        task: the op and the model.
        device: "cpu" or "cuda".
        on_case: called with the name of each case before it runs.

    Raises:
        Exception: whatever Liger's functions or the kernels raise.
    """
    exact, model = build_model(task), build_model(task)
    if task.hub is not None:
        replaced = hub_layers.replace_layers(model, task.hub, device=device)
    else:
        replaced = liger.replace_layers(model, task.op)
    try:
        subjects = list(list_subjects(task, exact, model, replaced))
        if not subjects:
            text = f"no layer of {type(model).__name__} was replaced"
            return TaskResult([], [Reason(code="not-applied", text=text)], 0)
        return _prove(subjects, task, device=device, on_case=on_case)
    finally:
        replaced.undo()


def _prove(
    subjects: list[Subject], task: LayersTask, *, device: str, on_case: Callable[[str], None]
) -> TaskResult:
    """Run the cases of all layers until one is wrong."""
    figures: list[Figure] = []
    reasons: list[Reason] = []
    cases = 0
    notes = []
    for subject in subjects:
        tokens = _count_tokens(subject, task, device=device)
        if tokens < task.tokens:
            limit = "CPU time" if device == "cpu" else "memory"
            notes.append(
                f"{subject.name} proven with {tokens} of {task.tokens} tokens: limited by {limit}"
            )
        for name, check in _list_checks(subject, task, tokens, device=device):
            on_case(name)
            found, reasons = check()
            cases += 1
            figures += found
            if reasons:
                break
        if reasons:
            break
    return TaskResult(worst_figures(figures), reasons, cases, "; ".join(notes))


def _count_tokens(subject: Subject, task: LayersTask, *, device: str) -> int:
    """Return the tokens of the largest call: those of the run's batch, or what memory allows."""
    numbers = subject.width * subject.rows
    if device == "cpu":
        return max(8, min(task.tokens, CPU_NUMBERS // numbers))
    free: int = torch.cuda.mem_get_info()[0]
    return max(8, min(task.tokens, free // 2 // (BYTES * numbers)))


def _list_checks(
    subject: Subject, task: LayersTask, tokens: int, *, device: str
) -> Iterator[tuple[str, Callable[[], tuple[list[Figure], list[Reason]]]]]:
    """Yield the name of each case of a layer, and the function that runs it."""
    autocast = getattr(torch, task.dtype) if task.autocast else None
    for dtype, weight_dtype in subject.dtypes:
        precision = dtype if dtype == weight_dtype else f"{dtype} and {weight_dtype}"
        for case in _list_cases(subject, tokens, device=device):
            count = case.tokens or sum(form.tokens for form, _ in case.calls[:1])
            name = f"{task.op}: {subject.name}, {count} tokens, {precision}, {case.name}"
            check = partial(_check_case, subject, case, (dtype, weight_dtype))
            yield name, partial(check, name=name, device=device, autocast=autocast)


def _list_cases(subject: Subject, tokens: int, *, device: str) -> Iterator[_Case]:
    """Yield the cases of a layer in one precision."""
    most = max(FEW_TOKENS, NUMBERS[device] // (subject.width * subject.rows))
    some, few = min(tokens, TOKENS, most), min(tokens, FEW_TOKENS)
    pair = ((Form(some), Layout()), (Form(some, shares_angles=True), Layout()))
    yield _Case("contiguous", pair, tokens, in_both_orders=True)
    many = -(-MANY_ROWS // subject.rows)
    if device != "cpu" and subject.width <= NARROW and tokens < many:
        yield _Case("contiguous", pair[:1], many)
    transposed = (
        (Form(some, shares_angles=True), Layout(inputs="transposed")),
        (Form(some), Layout(gradients="transposed")),
    )
    yield _Case("transposed", transposed)
    strided = Layout(inputs="strided", gradients="expanded")
    yield _Case("strided", ((Form(some, batch=1), strided),))
    drawn = subject.draw(Form(2), torch.float32, torch.float32, torch.Generator())
    inputs = [key for key in drawn.leaves if key not in drawn.weights]
    frozen = [frozenset(drawn.weights), *(frozenset({key}) for key in inputs), {*drawn.leaves}]
    yield _Case(
        "frozen",
        tuple((Form(few, batch=1), Layout(frozen=frozenset(keys))) for keys in frozen if keys),
    )
    yield _Case("no_grad", ((Form(some, shares_angles=True), Layout(evaluates=True)),))
    yield _Case("very large and small values", ((Form(few, batch=1, extreme=True), Layout()),))


def _check_case(
    subject: Subject,
    case: _Case,
    dtypes: tuple[str, str],
    *,
    name: str,
    device: str,
    autocast: torch.dtype | None,
) -> tuple[list[Figure], list[Reason]]:
    """Run a case: the reference and the model's own layer with few tokens, and the replaced one."""
    generator = torch.Generator().manual_seed(case.tokens)
    inputs, large = [], []
    for form, layout in case.calls:
        activations, weights = (getattr(torch, dtype) for dtype in dtypes)
        drawn = subject.draw(form, activations, weights, generator)
        length = case.tokens // form.batch if drawn.dim else case.tokens
        inputs.append(LayerInputs(drawn, layout))
        large.append(LayerInputs(drawn, layout, tile(drawn, length, generator)))
    # One by one, so that the reference of one call at most needs memory.
    exact = [run_calls(subject.exact, [one], device=device, in_float64=True)[0] for one in inputs]
    plain = [run_calls(subject.exact, [one], device=device, autocast=autocast)[0] for one in inputs]
    extreme = any(form.extreme for form, _ in case.calls)
    slack = EXTREME_PRODUCTS if extreme and subject.multiplies else 1.0
    figures: list[Figure] = []
    reasons: list[Reason] = []
    for in_reverse in (False, True) if case.in_both_orders else (False,):
        found = run_calls(
            subject.found, large, device=device, autocast=autocast, in_reverse=in_reverse
        )
        for number, one in enumerate(large):
            where = f"{name}, call {number + 1} of {len(large)}" if number else name
            where += ", backward passes in reverse" if in_reverse else ""
            more, broken = _compare(
                subject, one, found[number], plain[number], exact[number], name=where, slack=slack
            )
            figures += more
            reasons += broken
    return figures, reasons


def _compare(
    subject: Subject,
    inputs: LayerInputs,
    found: LayerCall,
    plain: LayerCall,
    exact: LayerCall,
    *,
    name: str,
    slack: float,
) -> tuple[list[Figure], list[Reason]]:
    """Compare the results of a call."""
    figures: list[Figure] = []
    reasons = [
        Reason(code="numerics-fwd", text=f"{name}: the call changed {key}, which the model uses")
        for key in found.changed
    ]
    for key, wanted in exact.values.items():
        if wanted is None:
            continue
        judged = _judge(
            found.values[key], plain.values[key], wanted, key, inputs,
            multiplies=subject.multiplies, slack=slack,
        )  # fmt: skip
        forward = key.startswith("out")
        if isinstance(judged, str):
            code = "numerics-fwd" if forward else "grad-detached"
            code = "nan" if "NaN" in judged else code
            reasons.append(Reason(code=code, text=f"{name}: {key} {judged}"))
            continue
        error, allowed, text = judged
        quantity = f"{subject.name} {key}"
        figures.append(Figure(quantity=quantity, error=error, allowed=allowed, case=name))
        if text:
            code = "numerics-fwd" if forward else "numerics-bwd"
            reasons.append(Reason(code=code, text=f"{name}: {key} {text}"))
    return figures, reasons


def _lowest(dtypes: Any) -> str:
    """Return the name of the dtype with the fewest bits of mantissa."""
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    return next(name for name in ("bfloat16", "float16", "float32") if name in names)


def _judge(
    found: Tensor | None,
    plain: Tensor | None,
    exact: Tensor,
    key: str,
    inputs: LayerInputs,
    *,
    multiplies: bool,
    slack: float,
) -> tuple[float, float, str] | str:
    """Compare a value with the exact one.

    Args:
        found: of the replaced layer.
        plain: of the model's own layer.
        exact: of the reference.
        key: "out", or "d" and the name of an input.
        inputs: of the call.
        multiplies: whether the layer multiplies matrices.
        slack: a factor of the bounds.

    Returns:
        The largest error of a row, the allowed one, and the broken rule in words or ""; or why the
        value can't be compared.
    """
    drawn, _, tiling = inputs
    lowest = _lowest(drawn.dtypes.values())
    forward = key.startswith("out")
    if not forward and key[1:] in drawn.weights:
        exact = exact * (tiling.total if tiling else 1)
        plain = plain * (tiling.total if tiling else 1) if plain is not None else None
        tiling = None
    shape = list(exact.shape)
    if tiling:
        shape[tiling.dim] = len(tiling.index)
    if found is None:
        return "has no gradient, so that it would not be trained"
    if list(found.shape) != shape:
        return f"is {tuple(found.shape)}, needed {tuple(shape)}"
    if not torch.isfinite(found).all():
        return "is NaN or inf"
    assert plain is not None
    base = TF32 if multiplies and lowest == "float32" else 0.0
    errors = _errors(found, exact, tiling, forward=forward)
    own = _errors(plain, exact, None, forward=forward)
    # The mean of n roundings is sqrt(n) smaller than one; 4 of its deviations.
    chance = 4 * MEAN[lowest] / math.sqrt(exact.numel())
    limits = _Errors(
        FACTOR * own.largest + slack * max(LARGEST[lowest], base),
        FACTOR * own.mean + slack * max(MEAN[lowest], base),
        FACTOR * own.gain + slack * max(GAIN[lowest], base) + chance,
    )
    words = (
        "is {:.1e} of a row's largest value off the reference, allowed {:.1e}",
        "is {:.1e} of a row off the reference on average, allowed {:.1e}",
        "is off by a factor of 1 +- {:.1e}, allowed {:.1e}",
    )
    for error, limit, text in zip(errors, limits, words, strict=True):
        if not error <= limit:
            return errors.largest, limits.largest, text.format(error, limit)
    return errors.largest, limits.largest, ""


class _Errors(NamedTuple):
    """The largest error of a row as a share of its largest value, the mean error, the factor."""

    largest: float
    mean: float
    gain: float


def _errors(found: Tensor, exact: Tensor, tiling: Tiling | None, *, forward: bool) -> _Errors:
    """Return the errors of a value; rows that are 0 everywhere are compared with the largest."""
    size = exact.abs().amax(-1, keepdim=True)
    size = torch.where(size == 0, size.max().clamp_min(1e-30), size)
    largest = torch.zeros((), dtype=torch.float64, device=exact.device)
    squares, total, product = largest.clone(), largest.clone(), largest.clone()
    for value, wanted, row in _parts(found, exact, size, tiling, forward=forward):
        scaled, wanted = (value.double() - wanted) / row, wanted / row
        largest = torch.maximum(largest, scaled.abs().max())
        squares += scaled.square().sum()
        total += wanted.square().sum()
        product += (scaled * wanted).sum()
    total = total.clamp_min(1e-30)
    return _Errors(largest.item(), (squares / total).sqrt().item(), (product / total).abs().item())


def _parts(
    found: Tensor, exact: Tensor, size: Tensor, tiling: Tiling | None, *, forward: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield parts of a large call's value, the exact ones, and the sizes of their rows."""
    if tiling is None:
        yield found, exact, size
        return
    step = max(1, COMPARED * exact.shape[tiling.dim] // exact.numel())
    for start in range(0, len(tiling.index), step):
        part = tiling.part(start, start + step)
        wanted, row = part.repeat(exact), part.repeat(size)
        if not forward:
            wanted, row = part.scale(wanted), row * tiling.factors.max().item()
        yield found.narrow(tiling.dim, start, len(part.index)), wanted, row
