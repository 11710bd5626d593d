"""Return every reason why one backend cannot be used for a run on a machine.

This file has the rules on layers, model classes and software; known_bad.py has those on known bugs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from attnimg.backends import arch_code, arch_mismatch, conflicting_variables, local_kernel, runs_on
from attnimg.backends.flash_attention_2 import ARGUMENTS, DENSE, VARLEN
from attnimg.backends.sage import DENSE as SAGE
from attnimg.errors import counted
from attnimg.facts import Backend, HeadDims, LocalKernel, Machine
from attnimg.run_facts import LayerGroup, ModelClass, Problem, Reason, Verdict
from attnimg.selection import known_bad

# Backend -> its name in ModelClass.lacks: a model class declares whether it supports these.
# Source: transformers 5.22.2, modeling_utils.py, class PreTrainedModel.
_CLASS_SUPPORTS = {"sdpa": "sdpa", "flex_attention": "flex"}


def judge(backend: Backend, machine: Machine, problem: Problem, *, rank: int) -> Verdict:
    """Return the verdict on one candidate; see reasons_against."""
    if reasons := reasons_against(backend, machine, problem):
        return Verdict(backend=backend, rank=rank, reasons=reasons)
    return Verdict(
        backend=backend, rank=rank, reasons=(), kernel=_describe_kernel(backend, machine)
    )


def reasons_against(backend: Backend, machine: Machine, problem: Problem) -> tuple[Reason, ...]:
    """Return every reason why a backend can't be used here; empty when it fits."""
    problem = with_effective_windows(problem)
    needs, model_class = backend.needs, problem.model_class
    against_class = reason_against_class(model_class, backend)
    found: list[Reason] = []
    if (local := local_kernel(backend, machine)) is not None:
        if model_class is not None and "others" in model_class.lacks:
            # falcon, gpt_neo and gptj look the name up in their own tables.
            against_class = _own_attention_code(model_class, backend.name)
        found += _local_reasons(backend, local, machine, problem)
        return (*found, *filter(None, [against_class]))
    if not runs_on(needs, machine.arch):
        text = arch_mismatch("", needs, machine.arch)
        found.append(Reason(code=arch_code(needs, machine.arch), text=text))
    found += _variant_reasons(backend, machine)
    found += _dtype_reasons(backend, machine, problem)
    found += _backward_reasons(backend, machine, problem)
    found += _packing_reasons(backend, problem)
    found += _model_reasons(backend, machine, problem)
    found += filter(None, [against_class])
    found += _software_reasons(backend, machine)
    found += known_bad.reasons_against(backend, machine, problem)
    return tuple(found)


def with_effective_windows(problem: Problem) -> Problem:
    """Return the problem without sliding windows that mask no key; verify uses the same rule.

    A layer whose window is not shorter than its row has full attention, and kernels do not get the
    window: transformers passes it only if `key_length > sliding_window`, and so do attnimg's own
    calls. key_length is the number of tokens in the row of the call. The packed rows of a batch are
    flattened into one row for a kernel, whose length counts then, although no document is longer
    than sequence_len. If sequence_len is not known, all windows are kept.
    Source: transformers 5.22.2, modeling_flash_attention_utils.py:685 (2026-11-26).
    """
    if problem.model is None or problem.sequence_len is None:
        return problem
    row = problem.sequence_len * (problem.rows if problem.packing else 1)
    layers = tuple(
        replace(layer, window=None) if layer.window is not None and layer.window >= row else layer
        for layer in problem.model.layers
    )
    return replace(problem, model=replace(problem.model, layers=layers))


def _variant_reasons(backend: Backend, machine: Machine) -> Iterator[Reason]:
    """Yield a reason if the user's environment selects other kernels than those for this GPU."""
    for setting in conflicting_variables(backend, machine.arch, machine.variables):
        kernels = backend.variants[machine.arch.name].name
        text = f"found {setting}, needs it unset: on {machine.arch.name} it runs {kernels} kernels"
        yield Reason(code="variant", text=text)
    for name, value in backend.for_process.items():
        if machine.variables.get(name, value) != value:
            text = f"found {name}={machine.variables[name]}, which disables its kernel"
            yield Reason(code="variant", text=text)


def _dtype_reasons(backend: Backend, machine: Machine, problem: Problem) -> Iterator[Reason]:
    capability = machine.arch.capability
    missing = backend.needs.dtypes_missing.get(capability[0], frozenset()) if capability else set()
    dtypes = backend.needs.dtypes - missing
    if problem.dtype not in dtypes:
        supported = " or ".join(sorted(dtypes))
        yield Reason(code="dtype", text=f"found {problem.dtype}, supports {supported} here")
    elif problem.dtype == "bfloat16" and capability is not None and capability < (8, 0):
        text = f"found bfloat16 on {machine.arch.name}, needs sm_80 or newer"
        yield Reason(code="dtype", text=text)


def _backward_reasons(backend: Backend, machine: Machine, problem: Problem) -> Iterator[Reason]:
    if not problem.training or machine.arch.vendor in backend.needs.backward:
        return
    if backend.forward_only and problem.forward_only_ok:
        return
    if runs_on(backend.needs, machine.arch) or not backend.needs.backward:
        where = "" if not backend.needs.backward else f" on {machine.arch.name}"
        yield Reason(code=backend.needs.backward_code, text=f"forward only{where}: cannot train")


def _packing_reasons(backend: Backend, problem: Problem) -> Iterator[Reason]:
    if backend.needs.packed_only and not problem.packing:
        yield Reason(code="not-packed", text="takes packed rows only; sdpa takes the others")
    # The isolation check tests an unreviewed hub kernel before the first training step.
    if backend.unreviewed and problem.trusted:
        return
    if problem.packing and backend.packing == "none":
        code = "s2-with-packing" if backend.name == "s2" else "packing-not-isolated"
        yield Reason(code=code, text="takes no document boundaries: packed documents would mix")


def _model_reasons(backend: Backend, machine: Machine, problem: Problem) -> Iterator[Reason]:
    needs, model = backend.needs, problem.model
    major = machine.arch.capability[0] if machine.arch.capability else None
    place = machine.arch.name if major is None else major
    features = needs.features - needs.features_missing.get(place, frozenset())
    if problem.dropout and "dropout" not in features:
        yield Reason(
            code="dropout", text=f"found attention dropout {problem.dropout}, does not support it"
        )
    if model is None:
        return
    if needs.model_types and model.type not in needs.model_types:
        supported = ", ".join(sorted(needs.model_types))
        yield Reason(
            code=needs.model_code, text=f"found model type {model.type}, supports {supported}"
        )
    for layer in model.layers:
        yield from layer_reasons(layer, needs.head_dims, major, features)
        if layer.features >= {"softcap", "sinks"} <= needs.exclusive:
            text = f"{_layers(layer, 'use')} a logit soft cap and sinks, supports only one"
            yield Reason(code="sinks", text=text)
    capped = any(layer.softcap for layer in model.layers)
    if problem.dropout and capped and needs.exclusive >= {"softcap", "dropout"}:
        text = f"found attention dropout {problem.dropout} and a soft cap, supports only one"
        yield Reason(code="dropout", text=text)


def _layers(layer: LayerGroup, verb: str) -> str:
    """Return the number of layers with a verb: "2 layers use", "1 layer uses"."""
    one = {"use": "uses", "have": "has"}[verb]
    return f"{counted(layer.count, 'layer')} {one if layer.count == 1 else verb}"


def layer_reasons(
    layer: LayerGroup, rules: tuple[HeadDims, ...], major: int | None, features: frozenset[str]
) -> Iterator[Reason]:
    """Yield the reasons against one group of layers: its head sizes, and the features it needs.

    Args:
        layer: the group.
        rules: the head sizes that a backend supports.
        major: major compute capability of an NVIDIA GPU; None for other devices.
        features: the features that the backend supports on this machine.
    """
    texts = {
        "window": f"a sliding window of {layer.window}",
        "softcap": f"a logit soft cap of {layer.softcap}",
        "sinks": "attention sinks",
    }
    used = layer.features
    for feature in sorted(used - features):
        text = f"{_layers(layer, 'use')} {texts[feature]}, not supported here"
        yield Reason(code=feature, text=text)
    rules = tuple(
        rule for rule in rules if not rule.majors or major is None or major in rule.majors
    )
    sized = [rule for rule in rules if _supports_qk(rule, layer) and _supports_v(rule, layer)]
    size = f"{_layers(layer, 'have')} head_dim {layer.head_dim_qk}"
    if layer.head_dim_v != layer.head_dim_qk:
        size += f" (v {layer.head_dim_v})"
    if rules and not sized:
        code = "head-dim" if not any(_supports_qk(rule, layer) for rule in rules) else "head-dim-v"
        yield Reason(code=code, text=f"{size}, takes {_describe_sizes(rules)}")
    elif sized and all(used & features & rule.without for rule in sized):
        missing = sorted(used & features & sized[0].without)
        yield Reason(code=missing[0], text=f"{size}, where {' or '.join(missing)} is not supported")


def _supports_qk(rule: HeadDims, layer: LayerGroup) -> bool:
    if rule.ungrouped and layer.heads != layer.kv_heads:
        return False
    in_range = rule.qk[0] <= layer.head_dim_qk <= rule.qk[1]
    return in_range and layer.head_dim_qk % rule.multiple == 0


def _supports_v(rule: HeadDims, layer: LayerGroup) -> bool:
    if rule.equal and layer.head_dim_v != layer.head_dim_qk:
        return False
    in_range = rule.v[0] <= layer.head_dim_v <= rule.v[1]
    return in_range and layer.head_dim_v % rule.multiple_v == 0


def _describe_sizes(rules: tuple[HeadDims, ...]) -> str:
    texts = []
    for rule in rules:
        low, high = rule.qk
        text = f"{high}" if low == high else f"at most {high}"
        if rule.multiple > 1:
            text += f" in steps of {rule.multiple}"
        if rule.ungrouped:
            text += f" with v {rule.v[1]} and ungrouped heads"
        if rule.multiple_v > 1 and not rule.equal:
            text += f", v in steps of {rule.multiple_v}"
        texts.append(text + (", v equal" if rule.equal else ""))
    return " or ".join(texts)


def reason_against_class(model_class: ModelClass | None, backend: Backend) -> Reason | None:
    """Return why a transformers model class (None: unknown) can't run a backend, or None."""
    if model_class is None:
        return None
    name = backend.applied_as or backend.name
    if name.startswith("attnimg_"):
        return reason_against_registered(model_class, backend.name)
    flash = backend.uses_flash_lib or backend.family
    text, supported = "", model_class.flash_names
    if ("flash" if flash else _CLASS_SUPPORTS.get(name)) in model_class.lacks:
        text = f"declares that it does not support {backend.summary}"
    # transformers replaces any other name with "flash" in it by the first in this list.
    elif supported and "flash" in name and name not in supported:
        text = f"supports {', '.join(supported)}; it would replace {name}"
    return _class_reason(model_class, text) if text else None


def reason_against_registered(model_class: ModelClass, name: str) -> Reason | None:
    """Return why a model class can't run a function that attnimg registers with transformers.

    transformers accepts a registered name even for classes with their own attention code: bloom
    then silently runs eager, falcon raises KeyError. It does not check the flags of the class
    either: a function that gets no mask except for padding, like a flash kernel, would ignore the
    chunks of llama4. Seen with transformers 5.22.2 (2026-11-21).

    Args:
        model_class: the implementations that the class supports.
        name: the backend's name, for messages.
    """
    if "others" in model_class.lacks:
        return _own_attention_code(model_class, name)
    if "flash" in model_class.lacks:
        text = (
            f"declares that it does not support flash attention: its mask has more than {name} gets"
        )
        return _class_reason(model_class, text)
    return None


def _own_attention_code(model_class: ModelClass, name: str) -> Reason:
    return _class_reason(model_class, f"has its own attention code, which can't call {name}")


def _class_reason(model_class: ModelClass, text: str) -> Reason:
    return Reason(code="model-class", text=f"transformers' {model_class.name} {text}")


def _software_reasons(backend: Backend, machine: Machine) -> Iterator[Reason]:
    needs = backend.needs
    if needs.torch_min and machine.torch and is_older(machine.torch, needs.torch_min[0]):
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
        elif lowest and is_older(version, lowest):
            code = "version-low" if code == "not-installed" else code
            yield Reason(code=code, text=f"found {package} {version}, needs {lowest} or newer")


def is_older(version: str, minimum: str) -> bool:
    """Return whether a version's release number is lower; suffixes are ignored."""
    return release(version) < release(minimum)


def release(version: str) -> tuple[int, ...]:
    """Return the release number at the start of a version, (2, 13, 0) of "2.13.0+cpu"."""
    digits = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, digits[0].split("."))) if digits else ()


def _local_reasons(
    backend: Backend, kernel: LocalKernel, machine: Machine, problem: Problem
) -> Iterator[Reason]:
    """Yield the reasons against a local kernel, from its metadata and its exports."""
    if kernel.vendor != machine.arch.vendor:
        text = f"the build in LOCAL_KERNELS is for {kernel.vendor}, found {machine.arch.name}"
        yield Reason(code="arch-mismatch", text=text)
    if kernel.exports is None:
        return
    if wanted := backend.name.partition(":")[2]:
        if wanted not in kernel.exports:
            yield Reason(code="not-a-kernel", text=f"{kernel.path} exports no {wanted}")
        return
    if problem.packing and not kernel.exports & {VARLEN, SAGE}:
        text = f"{kernel.path} exports no {VARLEN}: packed documents would mix"
        yield Reason(code="packing-not-isolated", text=text)
    yield from _arguments_missing(kernel, problem)
    if not kernel.exports & {VARLEN, DENSE, SAGE}:
        text = f"{kernel.path} exports neither {DENSE} nor {VARLEN}"
        yield Reason(code="not-a-kernel", text=text)


def _arguments_missing(kernel: LocalKernel, problem: Problem) -> Iterator[Reason]:
    """Yield a reason for each feature that the run needs and the kernel has no argument for."""
    if kernel.varlen_takes is None:
        return
    layers = problem.model.layers if problem.model else ()
    needed = {feature for layer in layers for feature in layer.features}
    if problem.training and problem.dropout:
        needed.add("dropout")
    for feature, arguments in ARGUMENTS.items():
        if feature in needed and kernel.varlen_takes.isdisjoint(arguments):
            text = f"{kernel.path} has no argument {' or '.join(sorted(arguments))} for it"
            yield Reason(code=feature, text=text)


def _describe_kernel(backend: Backend, machine: Machine) -> str:
    """Return the kernel that would run: a package and its version, or a local kernel's folder."""
    if (local := local_kernel(backend, machine)) is not None:
        return f"{local.repo} {local.version} from {local.path}".replace("  ", " ")
    if not backend.needs.packages:
        return f"torch {machine.torch}" if machine.torch else "torch"
    package = backend.needs.packages[0][0]
    version = (machine.packages or {}).get(package)
    named = f"{package} {version}" if version else package
    variant = backend.variants.get(machine.arch.name)
    return f"{named}, {variant.name}" if variant else named
