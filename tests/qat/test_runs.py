"""Test runs with qat: the rounding is that of the quantized model, and only ordinary weights stay.

The saved weights are quantized and called for inference: with int8 inputs by torchao, without by
torch's own kernel for int4 weights on a CPU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from tiny_engine import make_engine, make_session
from tiny_models import tiny_model
from torch import Tensor, nn
from torchao.quantization import quantize_
from transformers import AutoConfig, AutoModelForCausalLM

from attnimg.config.schema import Config, Qat
from attnimg.errors import AttnimgError
from attnimg.fake_quantization import (
    embedding_quantization,
    is_embedding,
    quantization,
    turn_fake_quantizers,
)
from attnimg.train import engine
from attnimg.train.own_loss import check_loss
from attnimg.train.qat import (
    QatCallback,
    qat_task,
    require_fitting_layers,
    simulate_quantization,
)

WEIGHTS = {"weight_dtype": "int4"}
INPUTS = {**WEIGHTS, "activation_dtype": "int8"}
TOKENS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_run.make_model(folder / "model")
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def rounded(folder: Path, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Return the model of a folder as training calls it."""
    model = loaded(folder, dtype)
    name: Any = str(dtype).removeprefix("torch.")
    simulate_quantization(model, Qat(**settings), dtype=name)
    turn_fake_quantizers(model, on=True)
    return model


def off(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


class Int4(nn.Module):
    """A linear layer whose weight is packed in 4 bits, for torch's kernel on CPUs."""

    def __init__(self, layer: nn.Linear, group_size: int) -> None:
        super().__init__()
        weight = layer.weight.detach().float().unflatten(-1, (-1, group_size))
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        scale = (high - low).clamp_min(1e-6) / 15
        codes = ((weight - low) / scale).round().clamp(0, 15).flatten(-2).to(torch.int32)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        both = torch.cat([scale, low + 8 * scale], -1)
        self.scales = both.transpose(0, 1).contiguous().to(layer.weight.dtype)
        self.group_size, self.outputs = group_size, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat, self.packed, self.group_size, self.scales
        )
        return found.view(*x.shape[:-1], self.outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embeddings", [False, True])
def test_int8_inputs_and_int4_weights_are_those_of_torchao_s_quantized_model(
    base: Path, dtype: torch.dtype, embeddings: bool
) -> None:
    settings = {**INPUTS, "quantize_embedding": embeddings}
    real, exact = loaded(base / "model", dtype), loaded(base / "model", dtype)
    one = qat_task(Qat(**settings), dtype="float32")
    quantize_(real, quantization(one))
    if embeddings:
        quantize_(real, embedding_quantization(one), filter_fn=is_embedding)
    with torch.no_grad():
        found = rounded(base / "model", settings, dtype)(TOKENS).logits
        wanted, unrounded = real(TOKENS).logits, exact(TOKENS).logits
    assert torch.equal(found, wanted)
    assert off(unrounded, wanted) > 0.02


@pytest.mark.parametrize("group_size", [32, 64])
def test_int4_weights_are_those_of_torch_s_int4_kernel(base: Path, group_size: int) -> None:
    settings = {**WEIGHTS, "group_size": group_size}
    real, exact = (loaded(base / "model", torch.bfloat16) for _ in range(2))
    for module in list(real.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, Int4(layer, group_size))
    with torch.no_grad():
        found = rounded(base / "model", settings, torch.bfloat16)(TOKENS).logits
        wanted, unrounded = real(TOKENS).logits, exact(TOKENS).logits
    # Scales in bfloat16, and the order of summation.
    assert off(found, wanted) < 0.02
    assert off(unrounded, wanted) > 0.06


@pytest.mark.parametrize(
    ("settings", "precision"),
    [(WEIGHTS, "float32"), ({**INPUTS, "quantize_embedding": True}, "bfloat16")],
)
def test_a_run_saves_ordinary_weights(
    base: Path, tmp_path: Path, settings: dict[str, Any], precision: str
) -> None:
    tiny_run.run(base, tmp_path / "out", engine={"precision": precision}, qat=settings,
                 bf16=precision == "bfloat16", val_set_size=0.1, eval_steps=6)  # fmt: skip
    losses = tiny_run.losses(tmp_path / "out")
    assert losses[-1] < losses[0] - 1
    before = load_file(base / "model/model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert {str(weight.dtype) for weight in after.values()} == {f"torch.{precision}"}
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    assert receipt["loss"]["head"] == "own"
    # The evaluated loss is that of the quantized model; the saved weights are not rounded.
    model = loaded(tmp_path / "out")
    assert not any("quantiz" in type(module).__name__.lower() for module in model.modules())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert all(not torch.equal(before[name].float(), after[name].float()) for name in before)


def test_the_rounding_begins_after_the_steps_without_it(base: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"val_set_size": 0.1, "eval_steps": 1}
    found = {}
    for name, qat in (("without", None), ("from the first step", INPUTS),
                      ("from step 3", {**INPUTS, "fake_quant_after_n_steps": 2}),
                      ("never", {**INPUTS, "fake_quant_after_n_steps": 4})):  # fmt: skip
        tiny_run.run(base, tmp_path / name, qat=qat, max_steps=4, **keys)
        lines = tiny_run.lines(tmp_path / name)
        found[name] = [line.get("loss", line.get("eval_loss")) for line in lines]
    assert found["never"] == found["without"]
    # Lines alternate: the loss of a step, and the evaluation after it.
    assert found["from step 3"][:4] == found["without"][:4]
    assert all(a != b for a, b in zip(found["from step 3"][4:], found["without"][4:], strict=True))
    assert found["from the first step"][0] != found["without"][0]


def test_a_rounding_that_never_begins_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for first, wanted in ((2, False), (50, True)):
        qat = {**INPUTS, "fake_quant_after_n_steps": first}
        tiny_run.run(base, tmp_path / str(first), qat=qat, max_steps=None, num_epochs=1)
        assert ("qat has no effect: it begins after 50 steps" in capsys.readouterr().err) is wanted


@pytest.mark.parametrize("first", [2, 3])
def test_a_resumed_run_ends_with_the_same_weights(base: Path, tmp_path: Path, first: int) -> None:
    keys = {"qat": {**INPUTS, "fake_quant_after_n_steps": first}, "save_steps": 3}
    tiny_run.run(base, tmp_path / "whole", **keys)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half/checkpoint-6")
    tiny_run.run(base, tmp_path / "half", resume_from_checkpoint=True, **keys)
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    assert tiny_run.losses(tmp_path / "whole") == tiny_run.losses(tmp_path / "half")


def test_another_rounding_is_not_resumed(base: Path, tmp_path: Path) -> None:
    tiny_run.run(base, tmp_path, qat=INPUTS, save_steps=3, max_steps=3)
    with pytest.raises(AttnimgError) as caught:
        tiny_run.run(base, tmp_path, qat=WEIGHTS, save_steps=3, resume_from_checkpoint=True)
    assert caught.value.code == "resume-differs"


def test_large_logits_are_computed_by_the_rounded_output_layer(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's head would read the output layer's weight, which is not rounded."""
    runs = {}
    for name in ("small", "large"):
        if name == "large":
            monkeypatch.setattr(engine, "keeps_logits", lambda *_: False)
        tiny_run.run(base, tmp_path / name, qat=INPUTS, max_steps=3)
        runs[name] = tiny_run.losses(tmp_path / name)
    assert runs["large"] == pytest.approx(runs["small"], rel=1e-5)
    receipt = json.loads((tmp_path / "large/receipt.json").read_text())["loss"]
    assert (receipt["head"], receipt["small_logits"], receipt["compared"]) == ("own", False, True)


def test_trl_s_head_would_have_another_loss(base: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path, model=loaded(base / "model"), qat=INPUTS)
    simulate_quantization(session.model, Qat(**INPUTS), dtype="float32")
    one = make_engine(session)
    QatCallback(session.model, session.config, done=0)
    found = check_loss(one, session.train, context=session.run.context, sharded=False)
    assert found.head == "own"
    assert found.ratio > 100


def test_the_gradient_passes_through_the_rounding(base: Path) -> None:
    """Of a trained weight, in a whole model: it is that of the rounded weights."""
    model, plain = rounded(base / "model", INPUTS), loaded(base / "model")
    for one in (model, plain):
        one(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for (name, found), (_, other) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert found.grad is not None, name
        cosine = torch.cosine_similarity(found.grad.flatten(), other.grad.flatten(), dim=0)
        assert cosine > 0.9, name
        assert not torch.equal(found.grad, other.grad), name


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("llama", {**INPUTS, "group_size": 48}, "48"),
        ("mixtral", INPUTS, "experts"),
        ("gpt2", INPUTS, "Conv1D"),
        ("gemma3_text", {**INPUTS, "quantize_embedding": True}, "Gemma3TextScaledWordEmbedding"),
    ],
)
def test_layers_that_torchao_would_leave_out_or_change_are_refused(
    kind: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(AttnimgError) as caught:
        require_fitting_layers(tiny_model(kind), Qat(**settings))
    error = caught.value
    assert (error.code, error.key) == ("bad-value", "qat")
    assert words in f"{error.what} {error.why}"
    if error.do != "remove qat":
        fitting = Config.model_validate({"qat": _yaml(error.do)}).qat
        assert fitting is not None
        require_fitting_layers(tiny_model(kind), fitting)


def _yaml(do: str | None) -> Any:
    import yaml

    return yaml.safe_load((do or "").removeprefix("set qat: "))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "glm4"])
def test_other_models_are_rounded_as_a_whole(kind: str) -> None:
    settings = {**INPUTS, "group_size": 16}
    real = tiny_model(kind).eval()
    model = tiny_model(kind).eval()
    model.load_state_dict(real.state_dict())
    with torch.no_grad():
        before = model(TOKENS).logits
        text = simulate_quantization(model, Qat(**settings), dtype="float32")
        assert torch.equal(model(TOKENS).logits, before)
        turn_fake_quantizers(model, on=True)
        quantize_(real, quantization(qat_task(Qat(**settings), dtype="float32")))
        assert torch.equal(model(TOKENS).logits, real(TOKENS).logits)
        assert not torch.equal(model(TOKENS).logits, before)
    assert text.endswith("with int4 weights in groups of 16, int8 inputs of linear layers")


def test_a_torchao_that_leaves_layers_out_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnimg.train import qat

    monkeypatch.setattr(qat, "insert_fake_quantizers", lambda *_: None)
    with pytest.raises(AttnimgError) as caught:
        simulate_quantization(loaded(base / "model"), Qat(**INPUTS), dtype="float32")
    assert (caught.value.code, caught.value.key) == ("not-applied", "qat")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model whose output layer has the weight of its embeddings."""
    folder = tmp_path_factory.mktemp("tied")
    tiny_run.make_model(folder / "model")
    model_config = AutoConfig.from_pretrained(folder / "model", tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model_config).save_pretrained(folder / "model")
    return folder


def test_tied_embeddings_stay_one_weight(tied: Path, tmp_path: Path) -> None:
    settings = {**INPUTS, "quantize_embedding": True}
    model, real = rounded(tied / "model", settings), loaded(tied / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    one = qat_task(Qat(**settings), dtype="float32")
    quantize_(real, quantization(one))
    quantize_(real, embedding_quantization(one), filter_fn=is_embedding)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, real(TOKENS).logits)
    tiny_run.run(tied, tmp_path / "out", qat=settings)
    after = load_file(tmp_path / "out/model.safetensors")
    assert after.keys() == load_file(tied / "model/model.safetensors").keys()
    assert tiny_run.losses(tmp_path / "out")[-1] < tiny_run.losses(tmp_path / "out")[0] - 0.5


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"gradient_checkpointing": True, "activation_offloading": True},
                     id="layers that are computed again"),
        pytest.param({"tokens": ["<new>"], "neftune_noise_alpha": 5.0}, id="more embeddings"),
        pytest.param({"unfrozen_parameters": ["model.embed_tokens.weight[3:60]", "layers.0"]},
                     id="frozen weights"),
        pytest.param({"val_set_size": 0.1, "eval_steps": 2, "save_steps": 2,
                      "load_best_model_at_end": True}, id="the best checkpoint"),
    ],
)  # fmt: skip
def test_other_keys_work_beside_it(base: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    tiny_run.run(base, tmp_path / "out", qat={**INPUTS, "quantize_embedding": True}, **keys)
    losses = tiny_run.losses(tmp_path / "out")
    assert losses[-1] < losses[0]
    loaded(tmp_path / "out")


def _train(session: Any) -> None:
    one = make_engine(session)
    check_loss(one, session.train, context=session.run.context, sharded=False)
    one.train()


@pytest.mark.parametrize(("kind", "layer"), [("mamba", "dt_proj"), ("falcon_mamba", "dt_proj")])
def test_a_weight_that_is_used_without_its_layer_is_refused_before_the_first_step(
    tmp_path: Path, kind: str, layer: str
) -> None:
    model = tiny_model(kind, time_step_rank=32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    session = make_session(tmp_path, model=model, qat=INPUTS)
    simulate_quantization(model, Qat(**INPUTS), dtype="float32")
    with pytest.raises(AttnimgError) as caught:
        _train(session)
    error = caught.value
    assert (error.code, error.key, error.do) == ("not-applied", "qat", "remove qat")
    assert f"{layer} and 1 more layer got a gradient without being called" in error.why
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_layers_that_are_neither_called_nor_trained_are_no_fault(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.unused = nn.Linear(64, 64)
    session = make_session(tmp_path, model=model, qat=INPUTS)
    simulate_quantization(model, Qat(**INPUTS), dtype="float32")
    _train(session)
