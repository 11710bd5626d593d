"""Test the proof of fake quantizers: torchao's pass, wrong ones are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig

from attnimg import fake_quantization
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, DType, Machine
from attnimg.run_facts import QatTask
from attnimg.train import layers
from attnimg.verification import fake_quantizers
from attnimg.verification.fake_quantizers import prove_fake_quantizers
from attnimg.verification.layers import TaskResult
from attnimg.verification.proofs import Setting
from attnimg.verification.task_proofs import prove_tasks

CPU = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="CPU", packages=None)


def task(
    inputs: Any = "int8", *, group_size: int = 32, dtype: DType = "float32", embeddings: bool = True
) -> QatTask:
    return QatTask(
        activation_dtype=inputs, group_size=group_size, embeddings=embeddings, dtype=dtype
    )


def prove(one: QatTask) -> TaskResult:
    return prove_fake_quantizers(one, device="cpu", on_case=lambda _: None)


@pytest.mark.parametrize("inputs", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 128, 256])
def test_torchao_passes(inputs: Any, dtype: DType, group_size: int) -> None:
    found = prove(task(inputs, dtype=dtype, group_size=group_size))
    assert found.reasons == []
    assert found.figures[0].error < 0.7 * found.figures[0].allowed


class Wrong(nn.Linear):
    """A linear layer that simulates a quantization with one mistake.

    Args:
        layer: the layer that it replaces.
        inner: the right one.
        how: the mistake.
    """

    def __init__(self, layer: nn.Linear, inner: nn.Module, how: str) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self.inner, self.how = [inner], how

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.inner[0]
        if self.how == "no gradient of the bias":
            return _OwnBackward.apply(x, self.weight, self.bias, inner)
        if self.how == "inputs are not rounded":
            return nn.functional.linear(x, inner.weight_fake_quantizer(self.weight), self.bias)
        if self.how == "weights are not rounded":
            rounded = inner.activation_fake_quantizer
            return nn.functional.linear(rounded(x) if rounded else x, self.weight, self.bias)
        output = inner(x)
        exact = nn.functional.linear(x, self.weight, self.bias)
        if self.how == "no gradient":
            return output.detach()
        if self.how == "the gradient of unrounded weights":
            return exact + (output - exact).detach()
        if self.how == "the first token alone is rounded":
            return torch.cat([output[:, :1], exact[:, 1:]], 1)
        if self.how == "the bias is lost":
            return output if self.bias is None else output - self.bias
        if self.how == "5 percent more":
            return output * 1.05
        if self.how == "NaN":
            return output * float("nan")
        assert self.how == "nothing"
        return exact


class _OwnBackward(torch.autograd.Function):
    """The right values, without the gradient of the bias, as torchao's layer for mxfp4 has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, inner: Any) -> Tensor:
        rounded = inner.activation_fake_quantizer
        ctx.save_for_backward(rounded(x) if rounded else x, inner.weight_fake_quantizer(weight))
        return inner(x)

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return out @ weight, out.flatten(0, 1).T @ x.flatten(0, 1), None, None


RIGHT = fake_quantization.insert_fake_quantizers


def replaced(how: str) -> Callable[[Any, QatTask], None]:
    def insert(model: Any, one: QatTask) -> None:
        layer = model[0]
        RIGHT(model, one)
        if isinstance(layer, nn.Linear):
            model[0] = Wrong(layer, model[0], how)

    return insert


def by_torchao(weight: Any, inputs: Any = None) -> Callable[[Any, QatTask], None]:
    def insert(model: Any, one: QatTask) -> None:
        if isinstance(model[0], nn.Embedding):
            RIGHT(model, one)
            return
        quantize_(model, QATConfig(weight_config=weight, activation_config=inputs))

    return insert


PER_TOKEN = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
SYMMETRIC = IntxFakeQuantizeConfig(torch.int4, group_size=32)
BETWEEN = Int4WeightFakeQuantizeConfig(group_size=32, activation_dtype=torch.bfloat16)
MISTAKES: dict[str, tuple[Any, Callable[[Any, QatTask], None]]] = {
    "axolotl's pair for int8 inputs": ("int8", by_torchao(BETWEEN, PER_TOKEN)),
    "symmetric weights without int8 inputs": (None, by_torchao(SYMMETRIC)),
    "groups of 64": ("int8", by_torchao(IntxFakeQuantizeConfig(torch.int4, group_size=64),
                                        PER_TOKEN)),
    "one scale a row": ("int8", by_torchao(IntxFakeQuantizeConfig(torch.int4, "per_channel"),
                                           PER_TOKEN)),
    "5 bits": ("int8", by_torchao(IntxFakeQuantizeConfig(torch.int5, group_size=32), PER_TOKEN)),
    "inputs in 4 bits": ("int8", by_torchao(SYMMETRIC, IntxFakeQuantizeConfig(
        torch.int4, "per_token", is_symmetric=False))),
    **{f"{how}, {inputs or 'weights alone'}": (inputs, replaced(how))
       for how in ("nothing", "weights are not rounded", "no gradient",
                   "the first token alone is rounded", "the bias is lost", "5 percent more", "NaN",
                   "the gradient of unrounded weights", "no gradient of the bias")
       for inputs in (None, "int8")},
    "inputs are not rounded": ("int8", replaced("inputs are not rounded")),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_fake_quantizer_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: DType
) -> None:
    inputs, insert = MISTAKES[name]
    monkeypatch.setattr(fake_quantizers, "insert_fake_quantizers", insert)
    found = prove(task(inputs, dtype=dtype))
    assert {reason.code for reason in found.reasons} == {"qat-wrong"}
    assert "qat: " in found.reasons[0].text


def test_a_right_fake_quantizer_built_in_another_way_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for inputs, insert in (("int8", by_torchao(SYMMETRIC, PER_TOKEN)), (None, by_torchao(BETWEEN))):
        monkeypatch.setattr(fake_quantizers, "insert_fake_quantizers", insert)
        assert prove(task(inputs)).reasons == []


def test_a_wrong_embedding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def insert(model: Any, one: QatTask) -> None:
        if isinstance(model[0], nn.Embedding):
            settings = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64))
            quantize_(model, QATConfig(settings), filter_fn=fake_quantization.is_embedding)
        else:
            RIGHT(model, one)

    monkeypatch.setattr(fake_quantizers, "insert_fake_quantizers", insert)
    reasons = prove(task()).reasons
    assert reasons
    assert all("embedding" in reason.text for reason in reasons)


def test_the_proof_runs_in_a_child_process_and_is_kept(tmp_path: Path) -> None:
    setting = Setting(machine=CPU, environment=os.environ, folder=tmp_path)
    log: list[str] = []
    found = [prove_tasks([task()], setting=setting, log=log.append)[0] for _ in range(2)]
    assert [(proof.backend, proof.passed, proof.cached) for proof in found] == [
        ("qat", True, False), ("qat", True, True)]  # fmt: skip


def test_a_failed_proof_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnimg.config.schema import Config
    from attnimg.run_facts import Proof, Reason
    from attnimg.verification import task_proofs

    proof = Proof(backend="qat", reasons=(Reason(code="qat-wrong", text="the output is 1 off"),))
    monkeypatch.setattr(task_proofs, "prove_tasks", lambda *_, **__: [proof])
    config = Config.model_validate({"qat": {"weight_dtype": "int4"}})
    with pytest.raises(AttnimgError) as caught:
        layers.prove_run(config, [task()], machine=CPU, log=lambda _: None)
    error = caught.value
    assert (error.key, error.code, error.exit_code) == ("qat", "qat-wrong", 1)
    assert error.what == "qat of torchao failed its proof on this machine"
    assert error.do == "remove qat, and report it to torchao"
