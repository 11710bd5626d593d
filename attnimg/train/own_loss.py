"""Compare the trainer's loss with the model's own, before the first step.

    a batch of the data --> the model's own forward with labels --> loss, gradient norm
                        --> the engine's loss_terms             --> loss, gradient norm

TRL's chunked head rebuilds the model's output layer from its config, and silently leaves out any
scale, cap, transform or auxiliary term that it does not know. Where the two losses differ, on the
data or in the output layer, the model's own logits are used instead. A run with small logits uses
them from the start, and its loss is compared on the data only. Where the loss of the class is not
the negative log-likelihood of its logits either, the run is refused.

The comparison runs in eval mode, which turns dropout off, and in the run's autocast. A class may
add a term to its loss in train mode only: there, loss and logits of one forward pass are compared.
torch.compile is not used: it only changes rounding, and compiling for one more shape takes minutes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from attnimg.application import inner_model
from attnimg.errors import AttnimgError, exception_text, out_of_memory_error
from attnimg.run_facts import RunContext
from attnimg.train.distributed import any_rank
from attnimg.train.loss import (
    AUX_LOSS_COEFFICIENTS,
    Comparison,
    Loss,
    LossCheck,
    Tolerance,
    batch_tokens,
    difference,
    first_batch,
    loss_tolerance,
    score_tokens,
    shift_labels,
)
from attnimg.train.rows import COUNTS, Rows

# Loss scale for float16: without it, gradients below its range would be zero in both losses.
FLOAT16_SCALE = 1024.0


def check_loss(engine: Any, rows: Rows, *, context: RunContext, sharded: bool) -> LossCheck:
    """Compare the losses, and make the engine use the model's own logits where they differ.

    Weights, gradients, train and eval modes and random number generators are not changed.

    Args:
        engine: the engine before training; every process calls this.
        rows: the training rows.
        context: how the run calls the model.
        sharded: whether FSDP or DeepSpeed will shard the weights: then nothing is compared, since
            no process may have the memory for all of them.

    Raises:
        AttnimgError: the loss of the class is not the negative log-likelihood of its logits
            (loss-differs), or the model raises (model-raised); exit code 1.
    """
    began = time.monotonic()
    head = "own" if engine.own_head else "chunked"
    without = LossCheck(head=head, small_logits=engine.small_logits, compared=False)
    if sharded:
        return replace(without, why="FSDP or DeepSpeed shards the weights")
    vocabulary = getattr(engine.model.config.get_text_config(), "vocab_size", None) or 2**18
    batch = first_batch(rows, tokens=batch_tokens(vocabulary))
    if batch is None:
        return replace(without, why="the first rows have no trained token")
    inputs = {name: value for name, value in batch.items() if name != COUNTS}
    try:
        with _without_side_effects(engine):
            prepared = engine._prepare_inputs(inputs)
            found = _LossComparison(engine, prepared, context, without).run()
    except torch.OutOfMemoryError:
        return replace(without, why="the comparison does not fit into the free GPU memory")
    return replace(
        found, aux_coefficient=engine.aux_coefficient, seconds=round(time.monotonic() - began, 3)
    )


class _LossComparison:
    """One comparison of an engine on one batch.

    Args:
        engine: the engine in eval mode.
        inputs: the batch, on the model's device.
        context: how the run calls the model.
        without: the result without a comparison.
    """

    def __init__(
        self, engine: Any, inputs: dict[str, Any], context: RunContext, without: LossCheck
    ) -> None:
        self.engine, self.inputs, self.context, self.without = engine, inputs, context, without
        self.own_loss_raised: str | None = None

    def run(self) -> LossCheck:
        """Compare the engine's loss; if TRL's head differs, use the model's own instead."""
        trainer, raised = self.trainer_loss()
        try:
            model, tolerance, tokens = self.model_loss()
        except (AttnimgError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if (refusal := out_of_memory_error(error)) is not None:
                raise refusal from error
            if raised:
                raise _model_raised_error(self.engine, exception_text(error)) from error
            return replace(self.without, why=f"the model's own loss raised {exception_text(error)}")
        if any_rank(not math.isfinite(model.total)):
            return replace(self.without, why="the model's own loss is NaN or inf")
        on_data = Comparison(model=model, trainer=trainer, tolerance=tolerance, raised=raised)
        layer = None
        if trainer is not None and self.without.head == "chunked":
            layer = compare_output_layer(self.engine, self.inputs)
        found = replace(
            self.without, compared=True, tokens=tokens, on_data=on_data, output_layer=layer,
            own_loss_raised=self.own_loss_raised,
        )  # fmt: skip
        if self.without.head == "own":
            if any_rank(found.ratio > 1):
                trainer = self.require_equal(model, tolerance)
            return replace(found, on_data=replace(on_data, trainer=trainer), own_head=trainer)
        if not any_rank(found.ratio > 1):
            return found
        self.engine.own_head = True
        own_head = self.require_equal(model, tolerance)
        why = f"on {tokens} tokens {on_data.why}"
        if on_data.ratio <= 1 and layer is not None:
            why = f"on large hidden states {layer.why}"
        return replace(found, head="own", why=why, own_head=own_head)

    def trainer_loss(self) -> tuple[Loss | None, str | None]:
        """Compute the engine's loss with its current head; if that raises, return the error."""
        engine = self.engine
        try:
            with _run_context(engine):
                nll, aux = engine.loss_terms(engine.model, dict(self.inputs))
                total = nll if aux is None else nll + engine.aux_coefficient * aux
                return self.measure(nll, total, aux), None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return None, exception_text(error)

    def model_loss(self) -> tuple[Loss, Tolerance, int]:
        """Compute the loss by the model's own forward, and its tolerance.

        Raises:
            AttnimgError: its loss is not that of its logits (loss-differs).
        """
        targets = shift_labels(self.inputs["labels"])
        with _run_context(self.engine):
            nll, total, aux, tolerance = self.compute_likelihood(targets)
            found = self.measure(nll, total, aux)
            with _modes(self.engine.model, lambda _: True):
                self.compute_likelihood(targets)
        return found, tolerance, int((targets != -100).sum())

    def compute_likelihood(
        self, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Tolerance]:
        """Run the model; return its nll, its own loss, its auxiliary loss and the tolerance.

        Raises:
            AttnimgError: its loss is not that of its logits (loss-differs).
        """
        engine = self.engine
        outputs = self.call_model()
        nll = -score_tokens(outputs.logits, targets)[0].sum() / max(int((targets != -100).sum()), 1)
        aux, ours = None, nll
        if engine.aux_coefficient is not None:
            aux = getattr(outputs, "aux_loss", None)
        if aux is not None:
            ours = nll + engine.aux_coefficient * aux.to(nll.device)
        total = outputs.loss if getattr(outputs, "loss", None) is not None else ours
        with torch.no_grad():
            tolerance = loss_tolerance(
                outputs.logits, targets, loss=nll.item(), precision=self.context.dtype
            )
        if abs(total.item() - ours.item()) > tolerance.loss:
            mode = "train" if engine.model.training else "eval"
            raise _loss_differs_error(engine, own=total.item(), ours=ours.item(), mode=mode)
        return nll, total, aux, tolerance

    def call_model(self) -> Any:
        """Call the model with labels; without them where its own loss raises on these rows."""
        arguments = {**self.inputs, "use_cache": False}
        if self.engine.aux_coefficient is not None:
            arguments["output_router_logits"] = True
        try:
            return self.engine.model(**arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            del arguments["labels"]
            outputs = self.engine.model(**arguments)
            self.own_loss_raised = exception_text(error)
            return outputs

    def measure(self, nll: torch.Tensor, total: torch.Tensor, aux: torch.Tensor | None) -> Loss:
        """Return the numbers, with the norm of the gradient of the trained weights."""
        scale = FLOAT16_SCALE if self.context.autocast == "float16" else 1.0
        (total * scale).backward()
        norms = [
            torch.linalg.vector_norm(weight.grad, dtype=torch.float32).double().cpu()
            for weight in self.engine.model.parameters()
            if weight.grad is not None
        ]
        self.engine.model.zero_grad(set_to_none=True)
        return Loss(
            nll=nll.item(),
            total=total.item(),
            aux=None if aux is None else aux.item(),
            grad_norm=torch.stack(norms).norm().item() / scale if norms else 0.0,
        )

    def require_equal(self, model: Loss, tolerance: Tolerance) -> Loss:
        """Compute the loss from the model's own logits; raise unless it is that of its own forward.

        Raises:
            AttnimgError: they differ (loss-differs).
        """
        used, raised = self.trainer_loss()
        if used is None:
            raise _model_raised_error(self.engine, raised)
        if difference(used, model, tolerance) > 1:
            # Kernels without a fixed order of summation may differ between calls.
            again, _, _ = self.model_loss()
            noise = 4 * difference(again, model, tolerance)
            if difference(used, model, tolerance) > 1 + noise:
                raise _loss_differs_error(
                    self.engine, own=model.total, ours=used.total, mode="eval"
                )
        return used


# Standard deviation of the logits; the caps of published models are 15 to 50.
LOGITS = 10.0


def compare_output_layer(engine: Any, inputs: dict[str, Any]) -> Comparison | None:
    """Compare loss and gradient of TRL's head and of the model's own forward.

    Args:
        engine: the engine in eval mode, with TRL's head.
        inputs: a batch of the run, on the model's device.

    Returns:
        None where the class can't be called that way: its backbone is not called exactly once by
        both, or the layers after it raise in float32 or run out of memory.
    """
    model = engine.model
    base = inner_model(model)
    backbone = getattr(base, "base_model", base)
    if backbone is base:
        return None
    targets = shift_labels(inputs["labels"])
    arguments = {name: value for name, value in inputs.items() if name != "labels"}

    def model_logits(**_: Any) -> torch.Tensor:
        logits: torch.Tensor = model(**arguments, use_cache=False).logits
        return logits

    def trainer_nll() -> torch.Tensor:
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        nll: torch.Tensor = -outputs.log_probs.sum() / outputs.label_mask.sum()
        return nll

    try:
        with _run_context(engine), _in_float32(base, backbone):
            with torch.no_grad(), _RandomHiddenStates(backbone, scale=1.0) as first:
                spread = model_logits().float().std().item()
            scale = LOGITS / max(spread, 1e-6)
            with _RandomHiddenStates(backbone, scale=scale) as hidden:
                logits = model_logits()
                nll = -score_tokens(logits, targets)[0].sum() / (targets != -100).sum()
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
        calls: number of calls of the backbone.
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
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(state.shape, generator=generator) * self.scale
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
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in base.modules():
            if module in inside:
                continue
            for name, weight in module._parameters.items():
                if weight is not None and weight.is_floating_point():
                    replaced.append((module._parameters, name, weight))
                    module._parameters[name] = torch.nn.Parameter(
                        weight.detach().float(), requires_grad=False
                    )
        yield
    finally:
        for parameters, name, weight in replaced:
            parameters[name] = weight


@contextmanager
def _run_context(engine: Any) -> Iterator[None]:
    """Call the model as the run does: gradients on, in its autocast."""
    with torch.enable_grad(), engine.accelerator.autocast():
        yield


@contextmanager
def _without_side_effects(engine: Any) -> Iterator[None]:
    """Turn dropout off; restore modes, buffers, gradients, random states and metrics after it."""
    # In train mode, a class may update its buffers.
    buffers = [(module, name, buffer, buffer.clone()) for module in engine.model.modules()
               for name, buffer in module._buffers.items() if buffer is not None]  # fmt: skip
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    engine.model.zero_grad(set_to_none=True)
    try:
        with torch.random.fork_rng(devices), _modes(engine.model, _is_bitsandbytes):
            yield
    finally:
        for module, name, buffer, content in buffers:
            module._buffers[name] = buffer.copy_(content)
        engine.model.zero_grad(set_to_none=True)
        engine._metrics["eval"].clear()
        if devices:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _is_bitsandbytes(module: torch.nn.Module) -> bool:
    """Return whether a layer stays in train mode; it has no dropout.

    In eval mode on a CPU, bitsandbytes permanently changes the order of a 4-bit layer's weights.
    Source: bitsandbytes 0.50, nn/modules.py, Linear4bit.forward (2026-11-21).
    """
    return type(module).__module__.startswith("bitsandbytes.")


@contextmanager
def _modes(model: Any, training: Callable[[torch.nn.Module], bool]) -> Iterator[None]:
    """Set each module to train or eval mode inside the block; restore the modes after it."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = training(module)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _loss_differs_error(engine: Any, *, own: float, ours: float, mode: str) -> AttnimgError:
    do = (
        "train the model with its own training code; attnimg minimizes the negative log-likelihood "
        "of the next token"
    )
    weights = engine.model.config.get_text_config().to_dict()
    terms = [name for name, value in weights.items()
             if "loss_coef" in name and name not in AUX_LOSS_COEFFICIENTS and value]  # fmt: skip
    if terms:
        zeros = " and ".join(f"{name}: 0.0" for name in terms)
        do = f"set {zeros} in its config.json to train without that term, or {do}"
    return AttnimgError(
        f"the loss of {_class_name(engine)} is not the negative log-likelihood of its logits",
        why=f"found {own:.4f} from its forward with labels in {mode} mode, {ours:.4f} from its "
        "logits for the next tokens\nneeded the same, except for an aux_loss that it returns",
        do=do,
        code="loss-differs",
        key="base_model",
        exit_code=1,
    )


def _model_raised_error(engine: Any, raised: str | None) -> AttnimgError:
    return AttnimgError(
        f"{_class_name(engine)} raised when it was called on the first documents",
        why=f"found {raised}",
        do="check that plain transformers runs this model; --debug shows where it raised",
        code="model-raised",
        key="base_model",
        exit_code=1,
    )


def _class_name(engine: Any) -> str:
    return type(inner_model(engine.model)).__name__
