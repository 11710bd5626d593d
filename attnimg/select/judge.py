"""Judge one backend on plain values: every reason why it cannot do this work here."""

from __future__ import annotations

import re
from collections.abc import Iterator

from attnimg.backends import arch_code, contrary_settings, local_kernel, runs_on
from attnimg.facts import Backend, LocalKernel, Machine, Problem, Reason, Verdict
from attnimg.select import known_bad
from attnimg.select.classes import reason_against_class, reason_of_own_code
from attnimg.select.layers import layer_reasons
from attnimg.select.windows import with_windows_that_hide

_VARLEN, _DENSE = "flash_attn_varlen_func", "flash_attn_func"
# SageAttention's entry point; packed documents go through it one by one.
_SAGE = "sageattn"
# What FlashAttention's versions call the features that models ask for.
_ARGUMENTS = {
    "window": frozenset({"window_size"}),
    "softcap": frozenset({"softcap"}),
    "sinks": frozenset({"s_aux", "learnable_sink"}),
    "dropout": frozenset({"dropout_p"}),
}


def judge(backend: Backend, machine: Machine, problem: Problem, *, rank: int) -> Verdict:
    """Judge one candidate; see reasons_against."""
    reasons = reasons_against(backend, machine, problem)
    kernel = None if reasons else _kernel(backend, machine)
    return Verdict(backend=backend.name, rank=rank, reasons=reasons, kernel=kernel)


def reasons_against(backend: Backend, machine: Machine, problem: Problem) -> tuple[Reason, ...]:
    """Give every reason why a backend cannot do this work here; none means that it fits."""
    problem = with_windows_that_hide(problem)
    needs = backend.needs
    if (local := local_kernel(backend, machine)) is not None:
        return (
            *_local_reasons(backend, local, machine, problem),
            *_class(backend, problem, served=True),
        )
    found: list[Reason] = []
    if not runs_on(needs, machine.arch):
        text = f"found {machine.arch.name}, needs {needs.arch_text}"
        found.append(Reason(code=arch_code(needs, machine.arch), text=text))
    found += _variant(backend, machine)
    found += _dtype(backend, machine, problem)
    found += _backward(backend, machine, problem)
    found += _packing(backend, problem)
    found += _model(backend, machine, problem)
    found += _class(backend, problem)
    found += _software(backend, machine)
    found += known_bad.reasons_against(backend, machine, problem)
    return tuple(found)


def _variant(backend: Backend, machine: Machine) -> Iterator[Reason]:
    """Refuse kernels that a person chose against those which were judged for this GPU."""
    for setting in contrary_settings(backend, machine.arch, machine.variables):
        kernels = backend.variants[machine.arch.name].name
        text = f"found {setting}, needs it unset: on {machine.arch.name} it runs {kernels} kernels"
        yield Reason(code="variant", text=text)
    for name, value in backend.for_process.items():
        if machine.variables.get(name, value) != value:
            text = f"found {name}={machine.variables[name]}, which disables its kernel"
            yield Reason(code="variant", text=text)


def _dtype(backend: Backend, machine: Machine, problem: Problem) -> Iterator[Reason]:
    capability = machine.arch.capability
    missing = backend.needs.dtypes_missing.get(capability[0], frozenset()) if capability else set()
    dtypes = backend.needs.dtypes - missing
    if problem.dtype not in dtypes:
        takes = " or ".join(sorted(dtypes))
        yield Reason(code="dtype", text=f"found {problem.dtype}, takes {takes} here")
    elif problem.dtype == "bfloat16" and capability is not None and capability < (8, 0):
        yield Reason(
            code="dtype", text=f"found bfloat16 on {machine.arch.name}, needs sm_80 or newer"
        )


def _backward(backend: Backend, machine: Machine, problem: Problem) -> Iterator[Reason]:
    if not problem.training or machine.arch.vendor in backend.needs.backward:
        return
    if backend.forward_only and problem.forward_only_ok:
        return
    if runs_on(backend.needs, machine.arch) or not backend.needs.backward:
        where = "" if not backend.needs.backward else f" on {machine.arch.name}"
        yield Reason(code=backend.needs.backward_code, text=f"forward only{where}: cannot train")


def _packing(backend: Backend, problem: Problem) -> Iterator[Reason]:
    if backend.needs.packed_only and not problem.packing:
        yield Reason(code="not-packed", text="takes packed rows only; sdpa takes the others")
    # A hub kernel that nobody here has read must prove that it isolates, before the first step.
    if backend.unreviewed and problem.trusted:
        return
    if problem.packing and backend.packing == "none":
        code = "s2-with-packing" if backend.name == "s2" else "packing-not-isolated"
        yield Reason(code=code, text="takes no document boundaries: packed documents would mix")


def _model(backend: Backend, machine: Machine, problem: Problem) -> Iterator[Reason]:
    needs, model = backend.needs, problem.model
    capability = machine.arch.capability
    major = capability[0] if capability else None
    place = machine.arch.name if major is None else major
    features = needs.features - needs.features_missing.get(place, frozenset())
    if problem.dropout and "dropout" not in features:
        yield Reason(code="dropout", text=f"found attention dropout {problem.dropout}, has none")
    if model is None:
        return
    if needs.model_types and model.type not in needs.model_types:
        takes = ", ".join(sorted(needs.model_types))
        yield Reason(code=needs.model_code, text=f"found model type {model.type}, takes {takes}")
    for layer in model.layers:
        yield from layer_reasons(layer, needs.head_dims, major, features)
    capped = any(layer.softcap for layer in model.layers)
    if problem.dropout and capped and needs.exclusive >= {"softcap", "dropout"}:
        text = f"found attention dropout {problem.dropout} with a logit soft cap, does one of them"
        yield Reason(code="dropout", text=text)


def _class(backend: Backend, problem: Problem, *, served: bool = False) -> Iterator[Reason]:
    if problem.model_class is None:
        return
    if served and "others" in problem.model_class.lacks:
        # falcon, gpt_neo and gptj look the name up in their own tables.
        yield reason_of_own_code(problem.model_class, backend.name)
    elif (reason := reason_against_class(problem.model_class, backend)) is not None:
        yield reason


def _software(backend: Backend, machine: Machine) -> Iterator[Reason]:
    needs = backend.needs
    if needs.torch_min and machine.torch and _older(machine.torch, needs.torch_min[0]):
        minimum, code = needs.torch_min
        yield Reason(code=code, text=f"found torch {machine.torch}, needs {minimum} or newer")
    if machine.packages is None:
        return
    for package in {package for package, _, _ in needs.packages} & set(machine.shadowed):
        text = f"another package has overwritten files of {package}: reinstall {package} last"
        yield Reason(code="shadowed", text=text)
    for package, lowest, code in needs.packages:
        version = machine.packages.get(package)
        if version is None:
            yield Reason(code=code, text=f"package {package} is not installed")
        elif lowest and _older(version, lowest):
            code = "version-low" if code == "not-installed" else code
            yield Reason(code=code, text=f"found {package} {version}, needs {lowest} or newer")


def _local_reasons(
    backend: Backend, kernel: LocalKernel, machine: Machine, problem: Problem
) -> Iterator[Reason]:
    """Judge a local kernel by its own metadata: what it was built for and what it exports."""
    if kernel.vendor != machine.arch.vendor:
        text = f"LOCAL_KERNELS serves a build for {kernel.vendor}, found {machine.arch.name}"
        yield Reason(code="arch-mismatch", text=text)
    if kernel.exports is None:
        return
    wanted = backend.name.partition(":")[2]
    if wanted:
        if wanted not in kernel.exports:
            text = f"{kernel.path} exports no {wanted}"
            yield Reason(code="not-a-kernel", text=text)
        return
    if problem.packing and not kernel.exports & {_VARLEN, _SAGE}:
        text = f"{kernel.path} exports no {_VARLEN}: packed documents would mix"
        yield Reason(code="packing-not-isolated", text=text)
    yield from _arguments_missing(kernel, problem)
    if not kernel.exports & {_VARLEN, _DENSE, _SAGE}:
        text = f"{kernel.path} exports neither {_DENSE} nor {_VARLEN}"
        yield Reason(code="not-a-kernel", text=text)


def _arguments_missing(kernel: LocalKernel, problem: Problem) -> Iterator[Reason]:
    """Find what the run needs and the kernel has no argument for: it would be dropped."""
    if kernel.varlen_takes is None:
        return
    layers = problem.model.layers if problem.model else ()
    needed = {
        "window": any(layer.window for layer in layers),
        "softcap": any(layer.softcap for layer in layers),
        "sinks": any(layer.sinks for layer in layers),
        "dropout": problem.training and bool(problem.dropout),
    }
    for feature, arguments in _ARGUMENTS.items():
        if needed[feature] and not kernel.varlen_takes & arguments:
            text = f"{kernel.path} has no argument {' or '.join(sorted(arguments))} for it"
            yield Reason(code=feature, text=text)


def _kernel(backend: Backend, machine: Machine) -> str:
    """Say what would run: a package and its version, or the folder that serves it."""
    if (local := local_kernel(backend, machine)) is not None:
        return f"{local.repo} {local.version} from {local.path}".replace("  ", " ")
    if not backend.needs.packages:
        return f"torch {machine.torch}" if machine.torch else "torch"
    package = backend.needs.packages[0][0]
    version = (machine.packages or {}).get(package)
    named = f"{package} {version}" if version else package
    variant = backend.variants.get(machine.arch.name)
    return f"{named}, {variant.name}" if variant else named


def _older(version: str, minimum: str) -> bool:
    return _release(version) < _release(minimum)


def _release(version: str) -> tuple[int, ...]:
    digits = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, digits[0].split("."))) if digits else ()
