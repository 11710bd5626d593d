"""Compare the trainer's loss with the model's own: right heads pass, wrong ones do not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from tiny_engine import make_engine, make_session
from tiny_models import tiny_model
from wrong_heads import WRONG_HEADS

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.memory.settings import keeps_logits
from attnimg.train import loss
from attnimg.train.fit import build_engine
from attnimg.train.loss import (
    Comparison,
    Loss,
    LossCheck,
    LossTrainer,
    Tolerance,
    loss_check_text,
    use_model_head,
)
from attnimg.train.own_loss import check_loss
from attnimg.train.records import ProgressView
from attnimg.train.rows import COUNTS

pytestmark = pytest.mark.filterwarnings("ignore")
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.1}


def engine_of(
    folder: Path, model: Any, *, small_logits: bool = False, **options: Any
) -> tuple[Any, Any]:
    """Return an engine and its session for a model in this process."""
    session = make_session(folder, model=model, **options)
    return make_engine(session, small_logits=small_logits), session


def check(engine: Any, session: Any) -> Any:
    return check_loss(engine, session.train, context=session.run.context, sharded=False)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        pytest.param("llama", {}, id="no scale"),
        pytest.param("cohere", {"logit_scale": 0.0625}, id="logit_scale"),
        pytest.param("granite", {"logits_scaling": 8.0}, id="logits_scaling"),
        pytest.param("gemma2", {"final_logit_softcapping": 30.0}, id="final_logit_softcapping"),
        pytest.param("mixtral", ROUTED, id="auxiliary loss"),
    ],
)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_head_that_trl_knows_is_used(
    tmp_path: Path, model_type: str, changes: dict[str, Any], packed: bool
) -> None:
    engine, session = engine_of(tmp_path, tiny_model(model_type, **changes), sample_packing=packed)
    found = check(engine, session)
    assert found.compared, found.why
    assert (found.head, engine.own_head) == ("chunked", False), found.why
    assert found.output_layer is not None
    assert found.ratio < 0.5
    assert found.tokens > 20
    assert (found.on_data.model.aux is None) is (not changes.get("output_router_logits"))
    assert "the trainer's loss equals the model's own" in loss_check_text(found)


class Transformed:
    """Turn the logits of a class around, as no field of a config says."""

    def forward(self, labels: Any = None, **arguments: Any) -> Any:
        outputs = super().forward(**arguments)  # type: ignore[misc]
        outputs.logits = outputs.logits.roll(1, dims=-1) * 1.01
        if labels is not None:
            outputs.loss = self.loss_function(  # type: ignore[attr-defined]
                outputs.logits, labels, vocab_size=outputs.logits.shape[-1]
            )
        return outputs


class Aligned:
    """Compare each position with its own label, not with the next."""

    def forward(self, labels: Any = None, **arguments: Any) -> Any:
        outputs = super().forward(**arguments)  # type: ignore[misc]
        if labels is not None:
            outputs.loss = torch.nn.functional.cross_entropy(outputs.logits.mT, labels)
        return outputs


class OwnLossRaises:
    """Raise with labels, as GitForCausalLM does without an image, in train mode too."""

    def forward(self, labels: Any = None, **arguments: Any) -> Any:
        if labels is not None:
            raise ValueError("Expected input batch_size (20) to match target batch_size (24).")
        return super().forward(**arguments)  # type: ignore[misc]


class OwnLossRaisesTransformed(OwnLossRaises, Transformed):
    """Raise with labels, and turn the logits around."""


class TermInTraining:
    """Add a term in train mode only, and count the calls."""

    def forward(self, labels: Any = None, **arguments: Any) -> Any:
        outputs = super().forward(labels=labels, **arguments)  # type: ignore[misc]
        if self.training and labels is not None:  # type: ignore[attr-defined]
            outputs.loss = outputs.loss + 0.1 * outputs.logits.logsumexp(-1).square().mean()
        return outputs


class Counts:
    """Count the forward passes of train mode in a buffer."""

    def forward(self, **arguments: Any) -> Any:
        if self.training:  # type: ignore[attr-defined]
            self.calls += 1
        return super().forward(**arguments)  # type: ignore[misc]


def changed(mixin: type) -> Any:
    """Return a tiny Llama of a class with another forward."""
    model = tiny_model("llama")
    model.__class__ = type("Changed", (mixin, type(model)), {})
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        pytest.param(lambda: tiny_model("recurrent_gemma"), "its loss is", id="logits_soft_cap"),
        pytest.param(lambda: changed(Transformed), "its loss is", id="a transform of a class"),
        pytest.param(lambda: tiny_model("granitemoe", **ROUTED), "it raised AttributeError",
                     id="an auxiliary loss that TRL's head can't compute"),
    ],
)  # fmt: skip
def test_the_models_own_logits_replace_a_head_that_differs(
    tmp_path: Path, build: Callable[[], Any], why: str
) -> None:
    engine, session = engine_of(tmp_path, build())
    found = check(engine, session)
    assert (found.head, engine.own_head) == ("own", True)
    assert why in loss_check_text(found)
    assert found.own_head.nll == pytest.approx(found.on_data.model.nll, abs=1e-5)
    assert found.own_head.total == pytest.approx(found.on_data.model.total, abs=1e-5)
    assert found.own_head.grad_norm == pytest.approx(found.on_data.model.grad_norm, rel=1e-5)


def test_a_cap_that_bfloat16_hides_shows_in_the_output_layer(tmp_path: Path) -> None:
    tiny_model("recurrent_gemma", logits_soft_cap=200.0).save_pretrained(tmp_path / "model")
    session = make_session(tmp_path, precision="bfloat16")
    engine = make_engine(session)
    found = check(engine, session)
    assert found.on_data.ratio <= 1
    assert found.output_layer.ratio > 1
    assert found.head == "own"
    assert "large hidden states" in found.why


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", WRONG_HEADS)
def test_a_wrong_trainer_head_is_seen(tmp_path: Path, wrong: str, precision: Any) -> None:
    engine, session = engine_of(tmp_path, tiny_model("llama"), precision=precision)
    engine.model.forward = WRONG_HEADS[wrong](engine.model.forward)
    found = check(engine, session)
    assert found.head == "own", found


@pytest.mark.parametrize(
    ("model_type", "field", "value", "neutral"),
    [
        ("cohere", "logit_scale", 0.0625, 1.0),
        ("granite", "logits_scaling", 8.0, 1.0),
        ("gemma2", "final_logit_softcapping", 30.0, None),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_trainer_that_misses_a_field_is_seen(
    tmp_path: Path,
    model_type: str,
    field: str,
    value: float,
    neutral: float | None,
    precision: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trl.trainer import sft_trainer

    patch = sft_trainer.add_fused_lm_head

    def patch_without(model: Any, **options: Any) -> None:
        setattr(model.config, field, neutral)
        patch(model, **options)
        setattr(model.config, field, value)

    monkeypatch.setattr(sft_trainer, "add_fused_lm_head", patch_without)
    model = tiny_model(model_type, **{field: value})
    engine, session = engine_of(tmp_path, model, precision=precision)
    assert check(engine, session).head == "own"


@pytest.mark.parametrize(
    ("mixin", "mode"),
    [
        pytest.param(Aligned, "eval mode", id="another shift of labels"),
        pytest.param(TermInTraining, "train mode", id="a term in train mode only"),
    ],
)
def test_a_class_whose_loss_is_not_that_of_its_logits_is_refused(
    tmp_path: Path, mixin: type, mode: str
) -> None:
    engine, session = engine_of(tmp_path, changed(mixin))
    with pytest.raises(AttnimgError, match="not the negative log-likelihood") as caught:
        check(engine, session)
    assert (caught.value.code, caught.value.exit_code) == ("loss-differs", 1)
    assert mode in caught.value.why


def test_a_term_that_the_config_weighs_can_be_turned_off(tmp_path: Path) -> None:
    engine, session = engine_of(tmp_path, tiny_model("bamba", z_loss_coefficient=0.1))
    with pytest.raises(AttnimgError, match="not the negative log-likelihood") as caught:
        check(engine, session)
    assert caught.value.do.startswith("set z_loss_coefficient: 0.0 in its config.json")
    engine, session = engine_of(tmp_path, tiny_model("bamba", z_loss_coefficient=0.0))
    assert check(engine, session).head == "chunked"


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("keys", [{}, {"adapter": "lora"}], ids=["full", "lora"])
def test_small_logits_give_the_loss_of_trls_head(
    tmp_path: Path, keys: dict[str, Any], precision: Any, packed: bool
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    session = make_session(tmp_path, precision=precision, sample_packing=packed, **keys)
    chunked = check(make_engine(session), session)
    engine = make_engine(session, small_logits=True)
    found = check(engine, session)
    assert (found.compared, found.head, found.small_logits) == (True, "own", True), found.why
    assert (found.why, found.output_layer) == ("", None)
    assert found.ratio < 0.5
    tolerance = chunked.on_data.tolerance
    assert found.own_head.nll == pytest.approx(chunked.on_data.trainer.nll, abs=tolerance.loss)
    assert found.own_head.grad_norm == pytest.approx(
        chunked.on_data.trainer.grad_norm, rel=tolerance.grad_norm
    )
    assert loss_check_text(found).startswith("loss: the trainer's loss equals the model's own on ")


def test_small_logits_give_the_metrics_of_trls_head(tmp_path: Path) -> None:
    engine, session = engine_of(tmp_path, tiny_model("llama"))
    batch = session.train.collate([session.train.dataset[0], session.train.dataset[1]])
    inputs = {name: value for name, value in batch.items() if name != COUNTS} | {"use_cache": False}
    with torch.no_grad():
        trl = engine.model(**inputs, fused_lm_head=True)
        own = use_model_head(engine.model, loss._score)(**inputs, fused_lm_head=True)
        without = use_model_head(engine.model, loss._log_probs)(**inputs, fused_lm_head=True)
    torch.testing.assert_close(own.log_probs, without.log_probs)
    mask = trl.label_mask
    assert torch.equal(own.label_mask[:, :-1], mask)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(own, name)[:, :-1], getattr(trl, name))
    assert torch.equal(own.is_top1[:, :-1][mask], trl.is_top1[mask].bool())


@pytest.mark.parametrize("tracked", [True, False])
def test_only_trackers_get_entropy_and_accuracy(tmp_path: Path, tracked: bool) -> None:
    engine, session = engine_of(tmp_path, tiny_model("llama"), small_logits=True)
    engine.with_scores = tracked
    batch = session.train.collate([session.train.dataset[0]])
    del batch[COUNTS]
    engine.compute_loss(engine.model, batch)
    logs = {"train_runtime": 1.0}
    LossTrainer.log(engine, logs)
    assert ({"entropy", "mean_token_accuracy"} <= logs.keys()) is tracked
    assert "num_tokens" in logs


def test_small_logits_need_no_head_that_trl_knows(tmp_path: Path) -> None:
    engine, session = engine_of(tmp_path, tiny_model("recurrent_gemma"), small_logits=True)
    found = check(engine, session)
    assert (found.small_logits, found.why) == (True, "")
    assert found.ratio < 0.5


def test_small_logits_of_a_class_with_another_loss_are_refused(tmp_path: Path) -> None:
    engine, session = engine_of(tmp_path, changed(Aligned), small_logits=True)
    with pytest.raises(AttnimgError, match="not the negative log-likelihood") as caught:
        check(engine, session)
    assert caught.value.code == "loss-differs"


def test_a_wrong_loss_of_small_logits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(logits: torch.Tensor, targets: torch.Tensor) -> Any:
        return score(2 * logits, targets)

    score = loss._log_probs
    monkeypatch.setattr(loss, "_log_probs", doubled)
    engine, session = engine_of(tmp_path, tiny_model("llama"), small_logits=True)
    with pytest.raises(AttnimgError, match="not the negative log-likelihood") as caught:
        check(engine, session)
    assert caught.value.code == "loss-differs"


def test_a_run_with_small_logits_keeps_them(tmp_path: Path) -> None:
    session = make_session(tmp_path, model=tiny_model("llama"))
    view = ProgressView(session.console, total=2, visible=False)
    assert build_engine(session, view, lambda _: None).own_head


@pytest.mark.parametrize(
    ("keys", "vocabulary", "kept"),
    [
        pytest.param({}, 32768, True, id="128 MiB"),
        pytest.param({}, 32769, False, id="more than 128 MiB"),
        pytest.param({"micro_batch_size": 2}, 32768, False, id="two rows"),
        pytest.param({"eval_batch_size": 2}, 32768, False, id="two rows to evaluate"),
        pytest.param({"eval_batch_size": 1}, 32768, True, id="one row to evaluate"),
        pytest.param({"gradient_accumulation_steps": 8}, 32768, True, id="accumulation"),
        pytest.param({"deepspeed": "ds.json"}, 2048, False, id="deepspeed"),
        pytest.param({}, None, False, id="vocabulary not known"),
    ],
)
def test_logits_are_kept_up_to_a_size(
    keys: dict[str, Any], vocabulary: int | None, kept: bool
) -> None:
    config = Config.model_validate(
        {"base_model": "model", "datasets": [{"path": "d", "type": "completion"}],
         "learning_rate": 1e-4, "sequence_len": 1024, "micro_batch_size": 1, **keys}
    )  # fmt: skip
    assert keeps_logits(config, vocabulary) is kept


def test_dropout_makes_no_term_in_train_mode(tmp_path: Path) -> None:
    engine, session = engine_of(tmp_path, tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5))
    found = check(engine, session)
    assert (found.head, found.compared) == ("chunked", True), found.why


@pytest.mark.parametrize(
    ("mixin", "head"),
    [
        pytest.param(OwnLossRaises, "chunked", id="the logits are the trainer's"),
        pytest.param(OwnLossRaisesTransformed, "own", id="the logits differ"),
    ],
)
def test_the_logits_are_compared_where_the_own_loss_raises(
    tmp_path: Path, mixin: type, head: str
) -> None:
    engine, session = engine_of(tmp_path, changed(mixin))
    found = check(engine, session)
    assert (found.compared, found.head, engine.own_head) == (True, head, head == "own")
    assert found.own_loss_raised.startswith("ValueError: Expected input batch_size (20)")
    said = loss_check_text(found)
    assert said.startswith("warning: ")
    assert "its own loss raised ValueError" in said
    if head == "own":
        assert "its loss is" in said
        assert found.own_head.nll == pytest.approx(found.on_data.model.nll, abs=1e-5)


def test_a_model_that_raises_is_refused(tmp_path: Path) -> None:
    engine, session = engine_of(tmp_path, tiny_model("llama"))
    engine.model.model.layers[0].mlp.down_proj = torch.nn.Linear(3, 5)
    with pytest.raises(AttnimgError, match="raised when it was called") as caught:
        check(engine, session)
    assert caught.value.code == "model-raised"


def test_sharded_weights_and_untrained_rows_are_not_compared(tmp_path: Path) -> None:
    engine, session = engine_of(tmp_path, tiny_model("llama"))
    found = check_loss(engine, session.train, context=session.run.context, sharded=True)
    assert (found.compared, engine.own_head) == (False, False)
    assert loss_check_text(found).startswith("warning: loss: not compared")
    rows = session.train
    untrained = rows.dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    found = check_loss(
        engine, type(rows)(dataset=untrained, collate=rows.collate, figures={}),
        context=session.run.context, sharded=False,
    )  # fmt: skip
    assert (found.compared, found.why) == (False, "the first rows have no trained token")


def counting() -> Any:
    model = changed(Counts)
    model.register_buffer("calls", torch.zeros(()))
    return model


@pytest.mark.parametrize(
    "build",
    [lambda: tiny_model("llama"), lambda: tiny_model("recurrent_gemma"), counting],
    ids=["llama", "recurrent_gemma", "a buffer that counts"],
)
def test_the_comparison_leaves_nothing_behind(tmp_path: Path, build: Callable[[], Any]) -> None:
    engine, session = engine_of(tmp_path, build())
    buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    before = {name: weight.clone() for name, weight in engine.model.named_parameters()}
    identities = {name: id(weight) for name, weight in engine.model.named_parameters()}
    engine.model.model.eval()
    modes = [module.training for module in engine.model.modules()]
    state = torch.get_rng_state()
    check(engine, session)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in engine.model.modules()]
    assert not engine._metrics["eval"]
    assert not torch.is_autocast_enabled("cpu")
    for name, weight in engine.model.named_parameters():
        assert torch.equal(weight, before[name])
        assert id(weight) == identities[name]
        assert weight.grad is None
        assert weight.requires_grad
    for name, buffer in engine.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_an_output_layer_that_was_not_compared_is_named() -> None:
    same = Loss(nll=2.0, total=2.0, aux=None, grad_norm=1.0)
    equal = Comparison(model=same, trainer=same, tolerance=Tolerance(loss=1e-3, grad_norm=1e-3))
    on_data = LossCheck(tokens=5, on_data=equal)
    assert loss_check_text(on_data).endswith("; its output layer alone could not be compared")
    assert "output layer" not in loss_check_text(
        LossCheck(tokens=5, on_data=equal, output_layer=equal)
    )
