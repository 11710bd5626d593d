"""Compare the losses of TRL's head and of the model from the same hidden states, in float32.

In bfloat16 the rounding errors of a whole model hide a soft cap, which hardly changes small logits.
Here the backbone's last hidden state is replaced by random float32 values, large enough for logits
of about LOGITS; the layers after it are cast to float32 and run without autocast. This shows any
scale, soft cap, transform or shift of labels that TRL's head lacks, in every precision of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from attnimg.train.loss_facts import Comparison, Loss
from attnimg.train.loss_tolerance import loss_tolerance
from attnimg.train.own_head import score, shifted

# Standard deviation of the logits; caps of published models lie at 15 to 50.
LOGITS = 10.0


def compare_output_layer(engine: Any, inputs: dict[str, Any]) -> Comparison | None:
    """Compare loss and gradient of TRL's head and of the model's own forward.

    Args:
        engine: an Objective in eval mode, with TRL's head.
        inputs: a batch of the run, on the model's device.

    Returns:
        None where the class can't be called that way: its backbone is not called exactly once by
        both, or the layers after it raise in float32 or run out of memory.
    """
    model = engine.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(base, "base_model", base)
    if backbone is base:
        return None
    targets = shifted(inputs["labels"])
    arguments = {name: value for name, value in inputs.items() if name != "labels"}

    def model_logits(**_: Any) -> torch.Tensor:
        logits: torch.Tensor = model(**arguments, use_cache=False).logits
        return logits

    def trainer_nll() -> torch.Tensor:
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        nll: torch.Tensor = -outputs.log_probs.sum() / outputs.label_mask.sum()
        return nll

    try:
        with torch.enable_grad(), engine.accelerator.autocast(), _in_float32(base, backbone):
            with torch.no_grad(), _RandomHiddenStates(backbone, scale=1.0) as first:
                spread = model_logits().float().std().item()
            scale = LOGITS / max(spread, 1e-6)
            with _RandomHiddenStates(backbone, scale=scale) as hidden:
                logits = model_logits()
                nll = -score(logits, targets)[0].sum() / (targets != -100).sum()
                model_loss = hidden.loss(nll)
                tolerance = loss_tolerance(
                    logits.detach(), targets, loss=model_loss.nll, precision="float32"
                )
            del logits
            with _RandomHiddenStates(backbone, scale=scale) as again:
                trainer_loss = again.loss(trainer_nll())
    except Exception:
        # A class that can't be called this way is still compared on the data.
        return None
    if {first.calls, hidden.calls, again.calls} != {1}:
        return None
    return Comparison(model=model_loss, trainer=trainer_loss, tolerance=tolerance)


class _RandomHiddenStates:
    """Replace the last hidden state of a backbone by random values, the same in each call.

    Args:
        backbone: the module whose output is the input of the output layer.
        scale: standard deviation of the values.

    Attributes:
        calls: how often the backbone was called.
    """

    def __init__(self, backbone: torch.nn.Module, *, scale: float) -> None:
        self.backbone, self.scale, self.calls = backbone, scale, 0
        self._values: torch.Tensor | None = None

    def __enter__(self) -> _RandomHiddenStates:
        self._handle = self.backbone.register_forward_hook(self._replace)
        self._stack = ExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self._stack.close()

    def _replace(self, _module: Any, _arguments: Any, output: Any) -> Any:
        self.calls += 1
        state = output[0]
        draw = torch.Generator().manual_seed(0)
        values = torch.randn(state.shape, generator=draw) * self.scale
        self._values = values.to(state.device).requires_grad_()
        self._stack.enter_context(torch.autocast(state.device.type, enabled=False))
        if isinstance(output, tuple):
            return (self._values, *output[1:])
        output.last_hidden_state = self._values
        return output

    def loss(self, nll: torch.Tensor) -> Loss:
        """Return a loss and the norm of its gradient with respect to the hidden states."""
        assert self._values is not None
        (gradient,) = torch.autograd.grad(nll, self._values)
        value = nll.item()
        return Loss(nll=value, total=value, aux=None, grad_norm=gradient.double().norm().item())


@contextmanager
def _in_float32(base: torch.nn.Module, backbone: torch.nn.Module) -> Iterator[None]:
    """Cast the weights after the backbone to float32 inside the block."""
    inside = set(backbone.modules())
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in base.modules():
            if module in inside:
                continue
            for name, weight in module._parameters.items():
                if weight is not None and weight.is_floating_point():
                    kept.append((module._parameters, name, weight))
                    module._parameters[name] = torch.nn.Parameter(
                        weight.detach().float(), requires_grad=False
                    )
        yield
    finally:
        for holder, name, weight in kept:
            holder[name] = weight
