"""Train with the rounding of a later quantization: quantization-aware training (QAT).

The saved weights are ordinary ones; torchao quantizes them after the run, as docs/qat.md shows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import TrainerCallback

from attnimg.config.qat_rules import changed_settings
from attnimg.config.schema import Config, Qat
from attnimg.errors import AttnimgError, bad_value, counted
from attnimg.facts import DType
from attnimg.fake_quantization import (
    insert_fake_quantizers,
    is_embedding,
    is_linear,
    rounding_layers,
    turn_fake_quantizers,
)
from attnimg.run_facts import QatTask
from attnimg.train.distributed import gather_objects, world_size
from attnimg.train.experts import has_fused_experts


def qat_task(settings: Qat, *, dtype: DType) -> QatTask:
    """Return the rounding that a run simulates, and has to prove."""
    return QatTask(
        activation_dtype="int8" if settings.activation_dtype else None,
        group_size=settings.group_size,
        embeddings=bool(settings.quantize_embedding),
        dtype=dtype,
    )


def require_fitting_layers(model: Any, settings: Qat) -> None:
    """Raise unless all weights of a model's layers can be rounded; the model may have no weights.

    Raises:
        AttnimgError: code bad-value.
    """
    if has_fused_experts(model):
        raise bad_value(
            "qat",
            f"qat does not fit {type(model).__name__}",
            why="its experts are no linear layers, which torchao neither rounds nor quantizes; "
            "needed a model without experts",
            do="remove qat",
        )
    if any(type(module).__name__ == "Conv1D" for module in model.modules()):
        raise bad_value(
            "qat",
            f"qat does not fit {type(model).__name__}",
            why="its layers are Conv1D, which torchao neither rounds nor quantizes; needed linear "
            "layers",
            do="remove qat",
        )
    layers = {name: module for name, module in model.named_modules() if is_linear(module)
              or (settings.quantize_embedding and is_embedding(module))}  # fmt: skip
    for name, module in layers.items():
        plain = "Linear" if is_linear(module) else "Embedding"
        if type(module).__name__ != plain:
            raise bad_value(
                "qat",
                f"qat does not fit {type(model).__name__}",
                why=f"{name} is a {type(module).__name__}, which torchao would replace by a plain "
                f"{plain}, with other outputs",
                do="remove qat"
                if is_linear(module)
                else f"set qat: {changed_settings(settings, {'quantize_embedding': False})}",
            )
    size = settings.group_size
    sizes = {name: module.in_features if is_linear(module) else module.embedding_dim
             for name, module in layers.items()}  # fmt: skip
    wrong = {name: columns for name, columns in sizes.items() if columns % size}
    if not wrong:
        return
    name, columns = next(iter(wrong.items()))
    fitting = next((n for n in (256, 128, 64, 32, 16, 8)
                    if n < size and not any(c % n for c in sizes.values())), None)  # fmt: skip
    more = f" and of {counted(len(wrong) - 1, 'more layer')}" if len(wrong) > 1 else ""
    raise bad_value(
        "qat",
        f"qat.group_size: {size} does not fit {type(model).__name__}",
        why=f"the weight of {name}{more} can't be divided into groups of {size}; found {columns} "
        "columns",
        do=f"set qat: {changed_settings(settings, {'group_size': fitting})}"
        if fitting
        else "remove qat",
    )


def simulate_quantization(model: Any, settings: Qat, *, dtype: DType) -> str:
    """Replace the layers of a loaded model, with the rounding turned off; return what is rounded.

    It is off until the first step, so that the model can be checked for documents that leak: near
    the limit between two numbers, rounding makes a tiny difference a large one.
    """
    require_fitting_layers(model, settings)
    linear = sum(map(is_linear, model.modules()))
    embeddings = sum(map(is_embedding, model.modules())) if settings.quantize_embedding else 0
    insert_fake_quantizers(model, qat_task(settings, dtype=dtype))
    found = turn_fake_quantizers(model, on=False)
    needed = linear * (2 if settings.activation_dtype else 1) + embeddings
    if found != needed:
        raise AttnimgError(
            "qat was not applied to all layers",
            why=f"found {found} fake quantizers after torchao's quantize_, needed {needed}",
            do="remove qat, and report it to torchao",
            code="not-applied",
            key="qat",
            exit_code=1,
        )
    parts = [counted(linear, "linear layer")]
    parts += [counted(embeddings, "embedding")] if embeddings else []
    inputs = ", int8 inputs of linear layers" if settings.activation_dtype else ""
    return f"{' and '.join(parts)} with int4 weights in groups of {settings.group_size}{inputs}"


class QatCallback(TrainerCallback):  # type: ignore[misc]  # transformers' types are not followed
    """Turn the rounding on when its first step begins; refuse weights that are used without it.

    The code of some models reads the weight of a layer in place of calling it, such as that of
    Mamba's dt_proj, or with its kernels of out_proj.

    Args:
        model: the model with fake quantizers.
        config: of the run.
        done: the steps that a resumed run has done.
    """

    def __init__(self, model: Any, config: Config, *, done: int) -> None:
        assert config.qat is not None
        self.first = config.qat.fake_quant_after_n_steps or 0
        self.model = model
        self.layers = rounding_layers(model)
        self.called: set[str] = set()
        self.hooks = [
            layer.register_forward_hook(partial(self._on_call, name))
            for name, layer in self.layers.items()
        ]
        # An evaluation that a resumed run begins with belongs to the last step.
        self.set(max(done - 1, 0))

    def set(self, step: int) -> None:
        """Turn the rounding on or off for a step, counted from 0."""
        self.on = step >= self.first
        turn_fake_quantizers(self.model, on=self.on)

    def _on_call(self, name: str, *_: Any) -> None:
        self.called.add(name)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  transformers passes all
        """Raise before the first step if a weight has a gradient, and its layer was not called.

        Raises:
            AttnimgError: code not-applied.
        """
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        # Another process may have called a layer that only some tokens use.
        called = set().union(*gather_objects(self.called)) if world_size() > 1 else self.called
        missed = [
            name
            for name, layer in self.layers.items()
            if name not in called and layer.weight.grad is not None
        ]
        if missed:
            more = f" and {counted(len(missed) - 1, 'more layer')}" if len(missed) > 1 else ""
            raise AttnimgError(
                f"qat does not round all weights of {type(self.model).__name__}",
                why=f"{missed[0]}{more} got a gradient without being called: the model's code uses "
                "the weight itself, which is not rounded",
                do="remove qat",
                code="not-applied",
                key="qat",
                exit_code=1,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  transformers passes all
        """Turn the rounding on at its first step.

        Source: axolotl 0.19.0, utils/callbacks/qat.py, QATCallback (2026-11-28).
        """
        if not self.on and state.global_step >= self.first:
            self.set(state.global_step)
