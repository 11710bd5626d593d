"""Test which weights are trained, and how they start.

The keys are unfrozen_parameters, model_config, reinit_weights, those on the size of the embeddings,
and those on experts.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bitsandbytes import functional
from safetensors.torch import load_file
from transformers import LlamaTokenizer

from attnimg.errors import AttnimgError
from attnimg.task import read_task
from attnimg.train.arguments import count_weights
from attnimg.train.model import load_model, load_model_config
from attnimg.train.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
import tiny_run
from run_facts import a_context
from tiny_models import tiny_model

ROWS = ["^model.embed_tokens.weight$[:100]", "^model.embed_tokens.weight$[120:130]",
        "model.layers.1.self_attn.q_proj"]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_run.make_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    tokenizer = tiny_run.make_tokenizer(folder / "model")
    tiny_model("mixtral", None, vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    return folder


def load(folder: Path, *, log: Any = None, **keys: Any) -> Any:
    values = tiny_run.config_for(folder, **keys)
    return load_model(
        values, tokenizer=load_tokenizer(values, log=lambda _: None), implementation="sdpa",
        context=a_context(dtype="float32"), needs_dtype_cast=False, log=log,
    )  # fmt: skip


def changed_rows(folder: Path, out: Path) -> dict[str, set[int]]:
    """Return weight -> its rows that training changed, without unchanged weights."""
    before, after = (load_file(place / "model.safetensors") for place in (folder / "model", out))
    rows = {name: (before[name] != after[name]).flatten(1).any(1) if before[name].dim() > 1
            else before[name] != after[name] for name in before}  # fmt: skip
    return {name: set(found.nonzero().flatten().tolist()) for name, found in rows.items()
            if found.any()}  # fmt: skip


def refused(folder: Path, **keys: Any) -> AttnimgError:
    with pytest.raises(AttnimgError) as caught:
        load(folder, **keys)
    assert caught.value.code in ("bad-value", "bad-model")
    return caught.value


def advised(error: AttnimgError, keys: dict[str, Any]) -> dict[str, Any]:
    """Follow the first line of advice literally: set a key, or remove it."""
    first = error.do.partition(", or ")[0]
    if first.startswith("set "):
        key, _, value = first.removeprefix("set ").partition(": ")
        return {**keys, key: yaml.safe_load(value)}
    key = first.removeprefix("remove ")
    assert key in keys
    return {name: value for name, value in keys.items() if name != key}


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd", "adamw_8bit"])
def test_rows_outside_the_range_keep_their_values_exactly(
    tiny: Path, tmp_path: Path, optimizer: str
) -> None:
    tiny_run.run(tiny, tmp_path, unfrozen_parameters=ROWS, weight_decay=0.5, optimizer=optimizer,
                 max_steps=4, gradient_accumulation_steps=2)  # fmt: skip
    found = changed_rows(tiny, tmp_path)
    assert found.keys() == {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"}
    allowed = {*range(100), *range(120, 130)}
    assert found["model.embed_tokens.weight"] <= allowed
    # Weight decay changes all rows that are trained, also of tokens that do not occur.
    assert len(found["model.embed_tokens.weight"]) > 10
    assert len(found["model.layers.1.self_attn.q_proj.weight"]) == 64


def test_frozen_rows_are_exact_in_bfloat16_and_after_resuming(tiny: Path, tmp_path: Path) -> None:
    keys = {"unfrozen_parameters": ROWS, "weight_decay": 0.5, "bf16": True, "save_steps": 2}
    engine = {"precision": "bfloat16"}
    tiny_run.run(tiny, tmp_path, engine=engine, max_steps=2, **keys)
    tiny_run.run(tiny, tmp_path, engine=engine, max_steps=4, resume_from_checkpoint=True, **keys)
    for name in ("checkpoint-2", "checkpoint-4", "."):
        after = load_file(tmp_path / name / "model.safetensors")
        before = load_file(tiny / "model" / "model.safetensors")
        kept = [row for row in range(len(before["model.embed_tokens.weight"]))
                if row not in {*range(100), *range(120, 130)}]  # fmt: skip
        assert torch.equal(
            after["model.embed_tokens.weight"][kept].float(),
            before["model.embed_tokens.weight"][kept].bfloat16().float(),
        ), name


def test_gradients_of_frozen_rows_do_not_count_in_the_norm(tiny: Path) -> None:
    model = load(tiny, unfrozen_parameters=["^model.embed_tokens.weight$[:2]"])
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[:2].abs().sum() > 0
    assert not gradient[2:].any()
    assert all(weight.grad is None for name, weight in model.named_parameters()
               if "embed_tokens" not in name)  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "said", "trained"),
    [
        pytest.param(ROWS[:2], "rows 0 to 99, 120 to 129 of model.embed_tokens", 110 * 64,
                     id="rows"),
        pytest.param(["^lm_head.weight$[300:]"], "rows 300 to the last of lm_head", None,
                     id="the last rows"),
        pytest.param(["^model.embed_tokens.weight$[7]"], "row 7 of model.embed_tokens", 64,
                     id="a row"),
        # One row of each matrix of a layer (4 x 64 wide, down_proj 128), and of each norm.
        pytest.param(["model.layers.0[01]"], "row 1 of model.layers.0.self_attn.q_proj.weight and 8"
                     " more weights", 6 * 64 + 128 + 2, id="digits that are a row"),
        pytest.param(["^lm_head"], "", None, id="a whole weight"),
    ],
)  # fmt: skip
def test_rows_are_named_and_counted(
    tiny: Path, patterns: list[str], said: str, trained: int | None
) -> None:
    lines: list[str] = []
    model = load(tiny, log=lines.append, unfrozen_parameters=patterns)
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(said in line for line in lines if "trains" in line) or not said
    assert all("trains row" not in line for line in lines) or said
    head = len(model.lm_head.weight) - (300 if said else 0)
    assert count_weights(model)["trained"] == (trained or head * 64)


def test_a_pattern_that_names_no_weight_is_a_warning_beside_others(tiny: Path) -> None:
    said: list[str] = []
    load(tiny, log=said.append, unfrozen_parameters=["^lm_head", "model.layers.4[4-9]+.moe"])
    assert any("model.layers.4[4-9]+.moe names no weight" in line for line in said)
    said.clear()
    load(tiny, log=said.append, unfrozen_parameters=["^lm_head"])
    assert not any("unfrozen_parameters" in line for line in said)


@pytest.mark.parametrize(
    "patterns",
    [
        pytest.param(["lm_heed", "embed_tokens"], id="names that no weight begins with"),
        pytest.param(["^lm_head.weight$[:99999]"], id="more rows than there are"),
    ],
)
def test_patterns_for_nothing_are_refused(tiny: Path, patterns: list[str]) -> None:
    keys = {"unfrozen_parameters": patterns}
    error = refused(tiny, **keys)
    assert error.key == "unfrozen_parameters"
    if error.do.startswith("set "):
        model = load(tiny, **advised(error, keys))
        assert [n for n, w in model.named_parameters() if w.requires_grad] == ["lm_head.weight"]
    else:
        load(tiny, unfrozen_parameters=["^lm_head.weight$[:9]"])


def test_model_config_changes_what_is_computed_and_saved(moe: Path, tmp_path: Path) -> None:
    changes = {"output_router_logits": True, "rms_norm_eps": 0.25}
    tiny_run.run(moe, tmp_path, overrides_of_model_config=changes, max_steps=1)
    assert "aux_loss" in tiny_run.lines(tmp_path)[0]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in changes} == changes
    norms = [m for m in load(moe, overrides_of_model_config=changes).modules()
             if type(m).__name__ == "MixtralRMSNorm"]  # fmt: skip
    assert {norm.variance_epsilon for norm in norms} == {0.25}


def test_a_backend_is_selected_for_the_changed_config(tiny: Path) -> None:
    changes = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32,
               "num_hidden_layers": 3}  # fmt: skip
    keys = {"reinit_weights": True, "overrides_of_model_config": changes}
    task, raw = read_task(tiny_run.config_for(tiny, **keys), tiny_run.CPU)
    assert raw is not None
    assert task.problem.model is not None
    (layers,) = task.problem.model.layers
    shape = (layers.count, layers.heads, layers.kv_heads, layers.head_dim_qk)
    assert shape == (3, 8, 1, 32)
    blocks = load(tiny, **keys).model.layers
    assert len(blocks) == 3
    assert blocks[0].self_attn.q_proj.weight.shape == (8 * 32, 64)
    assert blocks[0].self_attn.k_proj.weight.shape == (32, 64)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_model_config_scales_rope_and_keeps_its_base(tiny: Path, name: str, kind: str) -> None:
    changes = {name: {kind: "linear", "factor": 4.0}}
    plain = load(tiny).model.rotary_emb.inv_freq
    scaled = load(tiny, overrides_of_model_config=changes).model.rotary_emb.inv_freq
    assert torch.equal(scaled * 4, plain)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"rms_norm_epss": 0.25}, "rms_norm_eps", id="a typo"),
        pytest.param({"num_hidden_layers": "two"}, "int", id="a wrong type"),
        pytest.param({"model_type": "qwen2"}, "class", id="another type of model"),
        pytest.param({"zzz": 1}, "no such field", id="a field of nobody"),
        pytest.param({"_name_or_path": "a"}, "no such field", id="a private field"),
        pytest.param({"output_hidden_states": True}, "no such field", id="a field of all models"),
        pytest.param({"to_dict": 1}, "no such field", id="a method"),
        pytest.param({"num_attention_heads": 3}, "multiple", id="contradicting values"),
        pytest.param({"num_attention_heads": 8}, "derives head_dim", id="a shape"),
    ],
)
def test_a_field_that_the_model_does_not_have_is_refused(
    tiny: Path, changes: dict[str, Any], said: str
) -> None:
    config = tiny_run.config_for(tiny, overrides_of_model_config=changes)
    with pytest.raises(AttnimgError) as caught:
        load_model_config(config)
    assert (caught.value.code, caught.value.key) == ("bad-value", "model_config")
    assert said in caught.value.why
    fixed = {"rms_norm_eps": 0.25, "num_hidden_layers": 1}
    found = load_model_config(tiny_run.config_for(tiny, overrides_of_model_config=fixed))
    assert (found.rms_norm_eps, found.num_hidden_layers) == (0.25, 1)


def added_fields(error: AttnimgError, changes: dict[str, Any]) -> dict[str, Any]:
    """Follow advice on the fields of model_config."""
    text = error.do.removeprefix("add ").removeprefix("write ").partition(" in place of ")
    new = yaml.safe_load("{" + text[0].removesuffix(" to model_config") + "}")
    old = text[2].removesuffix(" in model_config")
    return {name: value for name, value in changes.items() if name != old} | new


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("qwen3", {"use_sliding_window": True, "sliding_window": 8,
                               "max_window_layers": 0}, id="windows of layers"),
        pytest.param("qwen3", {"num_hidden_layers": 1}, id="kinds of fewer layers"),
        pytest.param("llama", {"num_attention_heads": 8, "num_key_value_heads": 2}, id="heads"),
        pytest.param("llama", {"rope_theta": 1e6, "rms_norm_eps": 0.5}, id="RoPE's base"),
    ],
)  # fmt: skip
def test_fields_that_follow_from_changed_ones_must_be_changed_too(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    tokens = len(tiny_run.make_tokenizer(tmp_path / "model"))
    tiny_model(kind, None, vocab_size=tokens).save_pretrained(tmp_path / "model")
    keys = {"reinit_weights": True}
    error = refused(tmp_path, overrides_of_model_config=changes, **keys)
    assert error.key == "model_config"
    model = load(tmp_path, overrides_of_model_config=added_fields(error, changes), **keys)
    if "sliding_window" in changes:
        assert [layer.self_attn.sliding_window for layer in model.model.layers] == [8, 8]
    if "num_hidden_layers" in changes:
        assert len(model.model.layers) == 1
    if "num_attention_heads" in changes:
        assert model.model.layers[0].self_attn.head_dim == model.config.hidden_size // 8
    if "rope_theta" in changes:
        base = 1e6 ** -(2 / model.config.head_dim)
        assert model.model.rotary_emb.inv_freq[1].item() == pytest.approx(base)
        assert model.config.rms_norm_eps == 0.5


def test_a_field_without_effect_is_refused(tmp_path: Path) -> None:
    tokens = len(tiny_run.make_tokenizer(tmp_path / "model"))
    tiny_model("qwen3", None, vocab_size=tokens).save_pretrained(tmp_path / "model")
    for changes in ({"sliding_window": 8}, {"max_window_layers": 0}, {"use_sliding_window": True}):
        error = refused(tmp_path, overrides_of_model_config=changes)
        assert "no effect" in error.why
    kept = {"max_window_layers": 28, "rms_norm_eps": 0.5, "attention_dropout": 0.1}
    load(tmp_path, overrides_of_model_config=kept)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
        ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}),
        ("mistral", {"sliding_window": 8, "max_position_embeddings": 512, "hidden_act": "gelu"}),
        ("llama", {"initializer_range": 0.1, "attention_bias": True, "use_cache": False}),
        ("gpt2", {"attn_pdrop": 0.1, "scale_attn_by_inverse_layer_idx": True}),
        # Layers are of a kind that the configuration computes from these.
        (
            "jamba",
            {
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 1,
                "expert_layer_offset": 0,
            },
        ),
    ],
)
def test_fields_that_a_model_reads_are_changed(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    tokens = len(tiny_run.make_tokenizer(tmp_path / "model"))
    tiny_model(kind, None, vocab_size=tokens).save_pretrained(tmp_path / "model")
    found = load(tmp_path, overrides_of_model_config=changes, reinit_weights=True).config
    assert {name: getattr(found, name) for name in changes} == changes


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_as_model_config_says_or_it_is_refused(
    tmp_path: Path, tied: bool, asked: bool
) -> None:
    tokens = len(tiny_run.make_tokenizer(tmp_path / "model"))
    made = tiny_model("llama", None, vocab_size=tokens, tie_word_embeddings=tied)
    made.save_pretrained(tmp_path / "model")
    changes = {"overrides_of_model_config": {"tie_word_embeddings": asked}}
    if tied != asked:
        error = refused(tmp_path, **changes)
        assert "tie_word_embeddings" in error.do
    model = load(tmp_path, **changes, reinit_weights=True)
    same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same is asked
    if tied == asked:
        load(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 500}, {"head_dim": 8}, {"num_hidden_layers": 3}]
)
def test_weights_that_do_not_fit_model_config_are_named(
    tiny: Path, changes: dict[str, int]
) -> None:
    error = refused(tiny, overrides_of_model_config=changes)
    assert error.key == "model_config"
    assert ".weight" in error.why
    assert next(iter(changes)) in error.do
    load(tiny, overrides_of_model_config=changes, reinit_weights=True)


def test_random_weights_need_no_weight_file(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    tiny_run.run(tmp_path, tmp_path / "out", reinit_weights=True, max_steps=1, learning_rate=1e-9)
    before = load_file(tiny / "model" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert before.keys() == after.keys()
    assert not torch.equal(before[weight], after[weight])
    assert 0.01 < after[weight].std() < 0.03  # initializer_range
    # With the same seed, the weights start the same.
    one, two = (load(tmp_path, reinit_weights=True).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_the_key_a_weight_file_is_needed(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(AttnimgError) as caught:
        tiny_run.run(tmp_path, tmp_path / "out", max_steps=1)
    assert caught.value.code == "bad-model"


TO_32 = {"resize_token_embeddings_to_32x": True}


@pytest.mark.parametrize(
    ("stored", "keys", "needed"),
    [
        pytest.param(0, {}, 0, id="one row a token"),
        pytest.param(0, TO_32, "32x", id="a multiple of 32"),
        pytest.param(0, TO_32 | {"tokens": ["<a>"]}, "32x", id="a multiple of 32 with a token"),
        pytest.param(0, {"tokens": ["<a>"]}, 1, id="a row for a new token"),
        pytest.param(70, {}, 70, id="unused rows are kept"),
        pytest.param(70, TO_32, 70, id="unused rows are not rounded"),
        pytest.param(70, {"shrink_embeddings": True}, 0, id="unused rows are removed"),
        pytest.param(70, TO_32 | {"shrink_embeddings": True}, "32x", id="removed, and rounded"),
    ],
)  # fmt: skip
def test_embeddings_have_the_rows_that_the_config_asks_for(
    tiny: Path, tmp_path: Path, stored: int, keys: dict[str, Any], needed: int | str
) -> None:
    tokens = len(tiny_run.make_tokenizer(tmp_path / "model"))
    wide = tiny_model("llama", None, vocab_size=tokens + stored, tie_word_embeddings=False)
    wide.save_pretrained(tmp_path / "model")
    model = load(tmp_path, **keys)
    rows = -(-(tokens + len(keys.get("tokens", []))) // 32) * 32
    rows = rows if needed == "32x" else tokens + int(needed)
    weights = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert [len(weight) for weight in weights] == [rows, rows]
    assert model.config.vocab_size == rows
    kept = min(rows, tokens)
    assert torch.equal(weights[0][:kept], wide.get_input_embeddings().weight[:kept])


def test_new_rows_start_at_the_mean_if_the_config_asks_for_it(tiny: Path) -> None:
    def new_rows(**keys: Any) -> torch.Tensor:
        weight = load(tiny, tokens=["<a>", "<b>"], **keys).get_input_embeddings().weight
        return weight.detach()[-2:]

    mean = load(tiny).get_input_embeddings().weight.mean(0)
    near = new_rows(mean_resizing_embeddings=True)
    assert torch.allclose(near, mean.expand(2, -1), atol=1e-3)
    assert not torch.allclose(new_rows(), mean.expand(2, -1), atol=1e-3)


def test_rows_that_an_adapter_does_not_save_are_refused(tiny: Path) -> None:
    keys = {"adapter": "lora", "resize_token_embeddings_to_32x": True}
    error = refused(tiny, **keys)
    assert error.key == "resize_token_embeddings_to_32x"
    load(tiny, **advised(error, keys))
    saved = ["embed_tokens", "lm_head"]
    model = load(tiny, **keys, lora_modules_to_save=saved)
    assert len(model.get_input_embeddings().weight) % 32 == 0


@pytest.mark.parametrize("name", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_computed_as_the_config_asks(moe: Path, tmp_path: Path, name: str) -> None:
    tiny_run.run(moe, tmp_path, experts_implementation=name, max_steps=1)
    assert json.loads((tmp_path / "receipt.json").read_text())["applied"]["experts"] == name


def test_a_model_without_experts_refuses_a_choice_for_them(tiny: Path) -> None:
    keys = {"experts_implementation": "eager"}
    error = refused(tiny, **keys)
    assert error.key == "experts_implementation"
    load(tiny, **advised(error, keys))


def test_an_adapter_is_put_on_fused_experts(moe: Path, tmp_path: Path) -> None:
    keys = {"adapter": "lora", "lora_target_parameters": ["experts.gate_up_proj",
                                                         "mlp.experts.down_proj"]}  # fmt: skip
    tiny_run.run(moe, tmp_path, max_steps=2, **keys)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 8  # A and B of two weights in two layers
    assert all("mlp.experts" in name for name in saved)
    assert all(weight.abs().max() > 0 for weight in saved.values())


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(["experts.gate_proj"], id="a name before fusing"),
        pytest.param(["experts.down_proj", "lm_head.weight"], id="the output layer"),
    ],
)
def test_weights_that_an_adapter_can_t_train_are_refused(moe: Path, wrong: list[str]) -> None:
    keys = {"adapter": "lora", "lora_target_parameters": wrong}
    error = refused(moe, **keys)
    assert error.key == "lora_target_parameters"
    load(moe, **advised(error, keys))


def test_a_legacy_tokenizer_splits_after_special_tokens_as_before(
    tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "b": 5, "\u2581a": 6,
                  "\u2581b": 7}  # fmt: skip
    LlamaTokenizer(
        vocab=vocabulary, merges=[("\u2581", "a"), ("\u2581", "b")]
    ).save_pretrained(tmp_path / "llama")  # fmt: skip
    said: list[str] = []
    for legacy, ids in ((None, [6, 2, 5]), (False, [6, 2, 5]), (True, [6, 2, 7])):
        keys = {"tokenizer_config": str(tmp_path / "llama"), "tokenizer_legacy": legacy}
        tokenizer = load_tokenizer(tiny_run.config_for(tmp_path, **keys), log=said.append)
        assert tokenizer("a</s>b", add_special_tokens=False)["input_ids"] == ids
    assert not any("tokenizer_legacy" in line for line in said)
    load_tokenizer(tiny_run.config_for(tiny, tokenizer_legacy=True), log=said.append)
    assert any("tokenizer_legacy has no effect" in line for line in said)


def test_the_template_is_saved_inside_the_tokenizer_s_config(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    for name, inside in (("in", True), ("out", False)):
        keys = {"tokenizer_save_jinja_files": False} if inside else {}
        tiny_run.run(tmp_path, tmp_path / name, max_steps=1, **keys)
        found = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert ("chat_template" in found) is inside
        assert (tmp_path / name / "chat_template.jinja").exists() is not inside


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"adapter": "qlora"}, id="nf4"),
        pytest.param({"adapter": "lora", "load_in_8bit": True}, id="int8"),
    ],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_fused_experts_are_quantized_and_the_rest_is_trained(
    tmp_path: Path, kind: str, keys: dict[str, Any]
) -> None:
    tokenizer = tiny_run.make_tokenizer(tmp_path / "model")
    plain = tiny_model(kind, None, vocab_size=len(tokenizer))
    plain.save_pretrained(tmp_path / "model")
    keys = {**keys, "quantize_moe_experts": True, "lora_target_modules": ATTENTION}
    model = load(tmp_path, **keys)
    experts = [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]
    assert len(experts) == 2
    for layer, module in zip(plain.model.layers, experts, strict=True):
        for name, original in layer.mlp.experts.named_parameters():
            packed = module.parametrizations[name].original
            found, weight = getattr(module, name), original.detach()
            if keys["adapter"] == "qlora":
                numbers, state = functional.quantize_4bit(
                    weight, compress_statistics=True, quant_type="nf4"
                )
                assert packed.dtype == torch.uint8
                assert packed.numel() * 2 == weight.numel()
                assert torch.equal(found, functional.dequantize_4bit(numbers, state))
            else:
                assert packed.dtype == torch.int8
                error = (found - weight).abs() / weight.abs().amax(-1, keepdim=True)
                assert 0 < error.max() < 0.005  # half of 1/127, and float16
    result = tiny_run.run(tmp_path, tmp_path / "out", max_steps=3, **keys)
    assert result.loss is not None
    assert result.loss < tiny_run.lines(tmp_path / "out")[0]["loss"]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved} == set(ATTENTION)
    counted = json.loads((tmp_path / "out" / "receipt.json").read_text())["weights"]
    everything = sum(weight.numel() for weight in plain.parameters())
    assert counted["all"] == everything + counted["trained"]


def test_loading_is_restored_after_experts_were_quantized(moe: Path) -> None:
    from transformers import core_model_loading, modeling_utils

    before = core_model_loading.set_param_for_module, modeling_utils.caching_allocator_warmup
    load(moe, adapter="qlora", quantize_moe_experts=True, lora_target_modules=ATTENTION)
    after = core_model_loading.set_param_for_module, modeling_utils.caching_allocator_warmup
    assert after == before
    plain = load(moe, adapter="qlora", lora_target_modules=ATTENTION)
    assert not any("parametrizations" in name for name, _ in plain.named_parameters())


EXPERTS = {
    "by the names of their layers": {"lora_target_modules": ["q_proj", "w1", "w2", "w3"]},
    "by the names of the weights": {
        "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "lora_target_modules": ["q_proj"]},
    "in full": {"lora_target_parameters": ["model.layers.1.mlp.experts.gate_up_proj",
                                           "model.layers.1.mlp.experts.down_proj"]},
    "one of two": {"lora_target_parameters": ["experts.down_proj"]},
    "by all linear layers": {"lora_target_linear": True},
}  # fmt: skip


def plain_copy(quantized: Any, folder: Path, out: Path) -> None:
    """Write the model of a folder with the values that its quantized experts have."""
    model = load(folder)
    for name, module in quantized.named_modules():
        if hasattr(module, "attnimg_weights"):
            plain = model.get_submodule(name)
            for leaf in module.attnimg_weights:
                getattr(plain, leaf).data = getattr(module, leaf).detach().clone()
    model.save_pretrained(out)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_an_adapter_on_quantized_experts_gets_the_gradients_of_one_on_plain_experts(
    moe: Path, tmp_path: Path, name: str, bits: int
) -> None:
    base = {"adapter": "qlora"} if bits == 4 else {"adapter": "lora", "load_in_8bit": True}
    keys = {**base, "gradient_checkpointing": True, **EXPERTS[name]}
    shutil.copytree(moe / "model", tmp_path / "model")
    alone = load(moe, **base, quantize_moe_experts=True, lora_target_modules=ATTENTION)
    plain_copy(alone.get_base_model(), moe, tmp_path / "model")
    found = {}
    for kind, folder, extra in (
        ("quantized", moe, {"quantize_moe_experts": True}), ("plain", tmp_path, {})
    ):  # fmt: skip
        model = load(folder, **keys, **extra)
        torch.manual_seed(0)
        for weight in model.parameters():
            if weight.requires_grad:  # B is zero at first, and with it the gradient of A
                weight.data = torch.randn_like(weight) / 8
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        ids = torch.arange(24).reshape(2, 12)
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        found[kind] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found[kind]["loss"] = loss.detach()
    assert found["quantized"].keys() == found["plain"].keys()
    for weight, expected in found["plain"].items():
        gradient = found["quantized"][weight]
        assert gradient is not None, weight
        assert gradient.abs().max() > 0, weight
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_an_adapter_trained_on_quantized_experts_loads_on_plain_ones(
    moe: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    keys = EXPERTS["by the names of the weights"]
    result = tiny_run.run(moe, tmp_path, max_steps=3, adapter="qlora", quantize_moe_experts=True,
                          **keys)  # fmt: skip
    assert result.loss < tiny_run.lines(tmp_path)[0]["loss"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len([name for name in saved if ".experts." in name]) == 2 * 2 * 2
    assert all(tensor.abs().max() > 0 for tensor in saved.values())
    again = PeftModel.from_pretrained(load(moe), tmp_path)
    loaded = {name.replace(".default", ""): p for name, p in again.named_parameters()
              if ".lora_" in name}  # fmt: skip
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name].cpu(), saved[name]) for name in saved)


def test_quantized_experts_of_a_dense_model_are_a_warning(tiny: Path) -> None:
    said: list[str] = []
    load(tiny, log=said.append, adapter="qlora", quantize_moe_experts=True)
    assert any("quantize_moe_experts has no effect" in line for line in said)


def test_padding_is_a_token_that_the_adapted_model_has_a_row_for(tmp_path: Path) -> None:
    tokenizer = tiny_run.make_tokenizer(tmp_path / "model")
    rows = len(tokenizer)
    tiny_model("llama", None, vocab_size=rows).save_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"unk_token": "<new>"})
    tokenizer.save_pretrained(tmp_path / "model")
    found = load_tokenizer(tiny_run.config_for(tmp_path, adapter="lora"), log=lambda _: None)
    assert found.unk_token_id == rows
    assert found.pad_token == found.eos_token
    # Without an adapter, the embeddings get a row for it.
    found = load_tokenizer(tiny_run.config_for(tmp_path), log=lambda _: None)
    assert found.pad_token == "<new>"
