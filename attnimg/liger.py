"""Replace layers of a loaded model by Liger's fused Triton kernels, and undo it.

Liger's own function for the model's class is called for one op at a time, so that it is known which
layers an op replaced. The losses are never replaced: the trainer computes its own.

A replaced layer computes the same values; it saves time and the memory of intermediate results.
Its inputs may be overwritten: RMSNorm writes the gradient of its input over that of its output, and
RoPE and GLU reuse buffers. verification/layers.py proves the layers of a run.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

from attnimg.facts import LayerOp
from attnimg.files import read_data

# Op -> the arguments of Liger's functions that request it; a function has one of them.
# Source: axolotl 0.19.0, integrations/liger/plugin.py, pre_model_load (2026-11-27)
_ARGUMENTS: Mapping[LayerOp, tuple[str, ...]] = {
    "rope": ("rope",),
    "rms_norm": ("rms_norm",),
    "glu_activation": ("swiglu", "geglu"),
    "layer_norm": ("layer_norm",),
}
# Arguments of Liger's functions that are never set; most of them are true by default.
_LOSSES = ("cross_entropy", "fused_linear_cross_entropy", "relu_squared")


@cache
def known_types() -> Mapping[str, tuple[LayerOp, ...]]:
    """Return model type -> the ops that Liger has for it."""
    return {name: tuple(ops) for name, ops in read_data("liger.toml")["types"].items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplacedFunction:
    """A function of a transformers module that an op replaced.

    Attributes:
        module: the module.
        name: the function's name in it.
        original: the function that was replaced.
    """

    module: ModuleType
    name: str
    original: Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replaced:
    """What an op replaced in a model.

    Attributes:
        modules: names of the model's modules whose forward was replaced.
        functions: functions that the model's modules call.
    """

    modules: tuple[str, ...] = ()
    functions: tuple[ReplacedFunction, ...] = field(default=())

    def describe(self, model: Any) -> str:
        """Return the classes with counts, and the functions: "5 LlamaRMSNorm"."""
        classes = Counter(type(model.get_submodule(name)).__name__ for name in self.modules)
        names = [f"{count} {name}" for name, count in classes.items()]
        return ", ".join([*names, *(function.name for function in self.functions)]) or "nothing"

    def undo(self) -> None:
        """Restore the functions, which other models of the process call as well."""
        for function in self.functions:
            setattr(function.module, function.name, function.original)


def replace_layers(model: Any, op: LayerOp) -> Replaced:
    """Replace the layers of an op in a model.

    Args:
        model: a transformers model, before PEFT wraps it.
        op: the op; known_types() must have it for the model's type.

    Returns:
        What was replaced; its `undo` has to be called when the model is not used any more.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    parameters = inspect.signature(apply).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    ours = (name for arguments in _ARGUMENTS.values() for name in arguments)
    nothing = {name: False for name in (*ours, *_LOSSES) if takes_all or name in names}
    requested = dict.fromkeys(_ARGUMENTS[op], True)
    # The first call imports the modules that the second one changes.
    apply(model=model, **nothing)
    before = {name: dict(vars(module)) for name, module in _model_modules().items()}
    patched = {name for name, module in model.named_modules() if "forward" in vars(module)}
    apply(model=model, **{name: requested.get(name, False) for name in nothing})
    functions = []
    for module_name, module in _model_modules().items():
        for name, original in before.get(module_name, {}).items():
            found = vars(module).get(name)
            if found is original:
                continue
            if inspect.isclass(original):
                # Models that are built later keep their own layers.
                setattr(module, name, original)
            else:
                functions.append(ReplacedFunction(module=module, name=name, original=original))
    modules = (name for name, module in model.named_modules() if "forward" in vars(module))
    return Replaced(
        modules=tuple(name for name in modules if name not in patched), functions=tuple(functions)
    )


def _model_modules() -> dict[str, ModuleType]:
    """Return the modules of transformers that define models, of those that are imported."""
    return {
        name: module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and ".modeling_" in name
    }
