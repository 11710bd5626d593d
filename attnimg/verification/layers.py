"""Prove the layers that Liger or a hub kernel replaces in a model, against its own in float64.

The model is built twice on the meta device, and the layers of one of them are replaced. Each kind
of replaced layer is called with weights and inputs of the model's sizes, forward and backward.
The reference is the same layer of the other model, in float64. So a wrong kernel is refused, and a
right kernel with a wrong setting too: epsilon, offset, activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnimg import hub_layers, liger
from attnimg.facts import Figure, LayersTask, Reason
from attnimg.verification.layer_subjects import Call, Draw, Subject, build_model, list_subjects

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

# Rows of a call: up to those of the run's batch. Liger has another kernel for norms of up to 256
# columns with 32,768 rows and more, which the heads of q and k have.
# Source: liger-kernel 0.8.5, ops/rms_norm.py, rms_norm_forward (2026-11-27)
CPU_ROWS, NUMBERS = 512, 1 << 24
NARROW, MANY_ROWS = 256, 32768 + 37


class TaskResult(NamedTuple):
    """The figures nearest to their bounds, the broken rules, and the number of cases."""

    figures: list[Figure]
    reasons: list[Reason]
    cases: int


class LayerCall(NamedTuple):
    """Outputs and gradients of a call, by name; and inputs that the model uses and it changed."""

    values: dict[str, Tensor | None]
    changed: tuple[str, ...]


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
    figures: dict[str, Figure] = {}
    reasons: list[Reason] = []
    cases = 0
    for subject in subjects:
        for name, check in _list_cases(subject, task, device=device):
            on_case(name)
            found, reasons = check()
            cases += 1
            for figure in found:
                known = figures.get(figure.quantity)
                if known is None or _share(figure) > _share(known):
                    figures[figure.quantity] = figure
            if reasons:
                break
        if reasons:
            break
    return TaskResult(list(figures.values()), reasons, cases)


def _share(figure: Figure) -> float:
    return figure.error / figure.allowed if math.isfinite(figure.error) else math.inf


def _list_cases(
    subject: Subject, task: LayersTask, *, device: str
) -> Iterator[tuple[str, Callable[[], tuple[list[Figure], list[Reason]]]]]:
    """Yield the name of each case of a layer, and the function that runs it."""
    rows = max(8, min(task.tokens, CPU_ROWS if device == "cpu" else NUMBERS // subject.width))
    sizes: dict[int, tuple[str, ...]] = {rows: ("contiguous", "strided", "frozen", "no_grad")}
    if device != "cpu" and subject.width <= NARROW and rows < MANY_ROWS:
        sizes[MANY_ROWS] = ("contiguous",)
    for dtype, weight_dtype in subject.dtypes:
        for count, layouts in sizes.items():
            for layout in layouts:
                precision = dtype if dtype == weight_dtype else f"{dtype} and {weight_dtype}"
                name = f"{task.op}: {subject.name}, {count} rows, {precision}, {layout}"

                def check(
                    count: int = count,
                    layout: str = layout,
                    dtype: str = dtype,
                    weight_dtype: str = weight_dtype,
                    name: str = name,
                ) -> tuple[list[Figure], list[Reason]]:
                    generator = torch.Generator().manual_seed(count)
                    drawn = subject.draw(
                        count, getattr(torch, dtype), getattr(torch, weight_dtype), generator
                    )
                    autocast = getattr(torch, task.dtype) if task.autocast else None
                    return _check_case(
                        subject, drawn, name=name, layout=layout, device=device,
                        autocast=autocast,
                    )  # fmt: skip

                yield name, check


def _check_case(
    subject: Subject,
    drawn: Draw,
    *,
    name: str,
    layout: str,
    device: str,
    autocast: torch.dtype | None,
) -> tuple[list[Figure], list[Reason]]:
    """Run a case: the reference, the model's own layer, and the replaced one twice."""
    frozen = layout == "frozen"
    if frozen and not drawn.weights:
        return [], []
    if layout == "strided":
        drawn = drawn._replace(d_out=tuple(x.flatten(0, -2)[:1] for x in drawn.d_out))
    drawn = _moved(drawn, device)

    def run(call: Call, *, in_float64: bool) -> LayerCall:
        casting = torch.autocast(device, autocast) if autocast and not in_float64 else nullcontext()
        with _InFloat64() if in_float64 else casting:
            return _run(call, drawn, in_float64=in_float64, layout=layout)

    exact = run(subject.exact, in_float64=True)
    plain = run(subject.exact, in_float64=False)
    lowest = _lowest(drawn.dtypes.values())
    figures: list[Figure] = []
    reasons: list[Reason] = []
    for number in range(2):
        found = run(subject.found, in_float64=False)
        case = name if number == 0 else f"{name}, repeated"
        reasons += [
            Reason(
                code="numerics-fwd", text=f"{case}: the call changed {key}, which the model uses"
            )
            for key in found.changed
        ]
        for key, wanted in exact.values.items():
            quantity = f"{subject.name} {key}"
            if wanted is None:
                continue
            judged = _judge(found.values[key], plain.values[key], wanted, lowest=lowest,
                            multiplies=subject.multiplies)  # fmt: skip
            if isinstance(judged, str):
                code = "numerics-fwd" if key.startswith("out") else "grad-detached"
                code = "nan" if "NaN" in judged else code
                reasons.append(Reason(code=code, text=f"{case}: {key} {judged}"))
                continue
            error, allowed, text = judged
            figures.append(Figure(quantity=quantity, error=error, allowed=allowed, case=case))
            if text:
                code = "numerics-fwd" if key.startswith("out") else "numerics-bwd"
                reasons.append(Reason(code=code, text=f"{case}: {key} {text}"))
    return figures, reasons


def _moved(drawn: Draw, device: str) -> Draw:
    return drawn._replace(
        leaves={key: value.to(device) for key, value in drawn.leaves.items()},
        others={key: value.to(device) for key, value in drawn.others.items()},
        d_out=tuple(value.to(device) for value in drawn.d_out),
    )


def _run(call: Call, drawn: Draw, *, in_float64: bool, layout: str) -> LayerCall:
    """Call a layer forward and backward; only forward in the layout "no_grad", as in evaluations.

    The activations are copies of the leaves: in a model they are results of other layers, whose
    memory a kernel may reuse.
    """

    def cast(key: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.clone() if in_float64 else value.to(drawn.dtypes[key])

    given = {key: cast(key, value) for key, value in drawn.others.items()}
    leaves: dict[str, Tensor] = {}
    for key, value in drawn.leaves.items():
        frozen = key in drawn.weights and layout == "frozen"
        leaf = leaves[key] = cast(key, value).requires_grad_(not frozen)
        given[key] = leaf if key in drawn.weights else _copy(leaf, strided=layout == "strided")
    watched = [key for key in given if key in drawn.kept or key in drawn.weights]
    before = {key: given[key].detach().clone() for key in watched}
    with torch.set_grad_enabled(layout != "no_grad"):
        outputs = call(given)
    values: dict[str, Tensor | None] = {}
    for number, out in enumerate(outputs):
        values["out" if len(outputs) == 1 else f"out {number}"] = out.detach().clone()
    values |= {f"d{key}": None for key in leaves}
    # Without gradients, a kernel that overwrites its input returns a tensor that requires them.
    if layout != "no_grad" and any(out.requires_grad for out in outputs):
        _run_backward(outputs, drawn, layout=layout)
        values |= {f"d{key}": leaf.grad for key, leaf in leaves.items() if leaf.requires_grad}
    changed = tuple(key for key in watched if not torch.equal(given[key].detach(), before[key]))
    return LayerCall(values, changed)


def _run_backward(outputs: tuple[Tensor, ...], drawn: Draw, *, layout: str) -> None:
    """Run the backward pass with copies of the drawn gradients, which a kernel may overwrite."""
    # The gradient of a sum over rows is one row, with strides of 0.
    gradients = [
        d_out.to(out.dtype)[0].expand(out.shape)
        if layout == "strided"
        else d_out.to(out.dtype).clone()
        for d_out, out in zip(drawn.d_out, outputs, strict=True)
    ]
    torch.autograd.backward(outputs, gradients)


def _copy(leaf: Tensor, *, strided: bool) -> Tensor:
    """Return a copy, as a view of every other number of a larger tensor if `strided`."""
    if not strided:
        return leaf.clone()
    return torch.stack((leaf, leaf), -1)[..., 0]


def _lowest(dtypes: Any) -> str:
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    return next(name for name in ("bfloat16", "float16", "float32") if name in names)


def _judge(
    found: Tensor | None,
    plain: Tensor | None,
    exact: Tensor,
    *,
    lowest: str,
    multiplies: bool,
) -> tuple[float, float, str] | str:
    """Compare a value with the exact one.

    Returns:
        The largest error of a row, the allowed one, and the broken rule in words or ""; or why the
        value can't be compared.
    """
    if found is None:
        return "has no gradient, so that it would not be trained"
    if found.shape != exact.shape:
        return f"is {tuple(found.shape)}, needed {tuple(exact.shape)}"
    if not torch.isfinite(found).all():
        return "is NaN or inf"
    assert plain is not None
    base = TF32 if multiplies and lowest == "float32" else 0.0
    errors = _errors(found, exact)
    own = _errors(plain, exact)
    # The mean of n roundings is sqrt(n) smaller than one; 4 of its deviations.
    chance = 4 * MEAN[lowest] / math.sqrt(exact.numel())
    limits = _Errors(
        FACTOR * own.largest + max(LARGEST[lowest], base),
        FACTOR * own.mean + max(MEAN[lowest], base),
        FACTOR * own.gain + max(GAIN[lowest], base) + chance,
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


def _errors(found: Tensor, exact: Tensor) -> _Errors:
    """Return the errors of a value; rows that are 0 everywhere are compared with the largest."""
    wanted = exact.reshape(-1, exact.shape[-1])
    off = found.double().reshape(wanted.shape) - wanted
    size = wanted.abs().amax(-1)
    size = torch.where(size == 0, size.max().clamp_min(1e-30), size)
    largest = (off.abs().amax(-1) / size).max().item()
    scaled, wanted = off / size[:, None], wanted / size[:, None]
    total = wanted.square().sum().clamp_min(1e-30)
    mean = (scaled.square().sum() / total).sqrt().item()
    return _Errors(largest, mean, abs(((scaled * wanted).sum() / total).item()))


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
