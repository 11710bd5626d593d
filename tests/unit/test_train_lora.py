"""Test which modules an adapter is put on, and that the merged model is the trained one."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnimg.config import check_values
from attnimg.errors import AttnimgError
from attnimg.train.lora import adapter_notes, add_adapter
from attnimg.train.model import load_model
from attnimg.train.tokenizer import load_tokenizer, require_embeddings

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
import tiny_run
from run_facts import a_context
from tiny_models import tiny_model

AXOLOTL_REGEX = r"model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose model/ has an untied output layer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_run.make_model(folder / "model")
    return folder


def beside(folder: Path, model_type: str, **changes: Any) -> Path:
    """Make a model of a type with `tiny_run`'s tokenizer; large weights."""
    tokenizer = tiny_run.make_tokenizer(folder / "model")
    model = tiny_model(model_type, None, **{"vocab_size": len(tokenizer), **changes})
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    return beside(folder, "llama", tie_word_embeddings=True)


def load(folder: Path, **keys: Any) -> Any:
    values = tiny_run.config_for(folder, adapter="lora", **keys)
    return load_model(
        values, tokenizer=load_tokenizer(values, log=lambda _: None), implementation="sdpa",
        context=a_context(dtype="float32"), needs_dtype_cast=False,
    )  # fmt: skip


def adapted(model: Any) -> set[str]:
    """Return the names of the modules that an adapter is on."""
    return {name.removeprefix("base_model.model.").split(".lora_")[0]
            for name, _ in model.named_parameters() if ".lora_" in name}  # fmt: skip


def leaves(model: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in adapted(model)}


def applied(do: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Apply literally what the first lines of a refusal ask for."""
    for line in do.splitlines():
        if found := re.fullmatch(r"set (\w+): (.*)", line):
            keys = {**keys, found[1]: yaml.safe_load(found[2])}
    return keys


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        pytest.param({"lora_target_modules": AXOLOTL_REGEX}, LINEAR, id="a regular expression"),
        pytest.param({"lora_target_modules": "all-linear"}, LINEAR, id="all-linear"),
        pytest.param({"lora_target_modules": r".*\.q_proj"}, {"q_proj"}, id="one name by regex"),
        pytest.param({"lora_target_modules": ["self_attn.q_proj"]}, {"q_proj"}, id="a path's end"),
        pytest.param({"lora_target_modules": ["embed_tokens"], "lora_target_linear": True},
                     {*LINEAR, "embed_tokens"}, id="lora_target_linear adds to a list"),
        pytest.param({"lora_target_modules": ".*embed_tokens", "lora_target_linear": True},
                     {*LINEAR, "embed_tokens"}, id="lora_target_linear adds to an expression"),
    ],
)  # fmt: skip
def test_targets_are_what_peft_and_axolotl_take(
    tiny: Path, keys: dict[str, Any], expected: set[str]
) -> None:
    assert leaves(load(tiny, **keys)) == expected


def test_an_expression_reaches_the_layers_it_names(tiny: Path) -> None:
    found = adapted(load(tiny, lora_target_modules=r"model\.layers\.1\..*\.(q|v)_proj"))
    assert found == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}


def test_only_the_named_layers_get_an_adapter(tiny: Path) -> None:
    for more in ({}, {"lora_target_modules": ["q_proj"]}, {"peft_layers_pattern": ["layers"]}):
        found = adapted(load(tiny, peft_layers_to_transform=[1], **more))
        assert found
        assert all(name.startswith("model.layers.1.") for name in found)
    assert adapted(load(tiny, peft_layers_to_transform=[0, 1])) == adapted(load(tiny))


@pytest.mark.parametrize(("layers", "fixed"), [([0, 7], [0]), ([7], None)])
def test_a_layer_that_the_model_lacks_is_refused(
    tiny: Path, layers: list[int], fixed: list[int] | None
) -> None:
    with pytest.raises(AttnimgError) as caught:
        load(tiny, peft_layers_to_transform=layers)
    assert (caught.value.code, caught.value.key) == ("bad-value", "peft_layers_to_transform")
    asked = "remove peft_layers_to_transform"
    assert caught.value.do == (f"set peft_layers_to_transform: {fixed}" if fixed else asked)
    load(tiny, peft_layers_to_transform=fixed)


def test_ranks_and_alphas_of_some_layers_are_those_of_the_patterns(tiny: Path) -> None:
    model = load(tiny, lora_r=8, lora_alpha=16, lora_rank_pattern={r"layers\.1\..*q_proj": 2},
                 lora_alpha_pattern={"up_proj": 4})  # fmt: skip
    layers = model.base_model.model.model.layers
    ranks = [layer.self_attn.q_proj.r["default"] for layer in layers]
    assert ranks == [8, 2]
    assert layers[0].mlp.up_proj.scaling["default"] == 4 / 8
    assert layers[0].mlp.down_proj.scaling["default"] == 16 / 8


@pytest.mark.parametrize("key", ["lora_rank_pattern", "lora_alpha_pattern"])
@pytest.mark.parametrize("pattern", ["q_prj", "q_pro"])
def test_a_pattern_for_no_layer_is_refused(tiny: Path, key: str, pattern: str) -> None:
    with pytest.raises(AttnimgError) as caught:
        load(tiny, **{key: {"v_proj": 4, pattern: 4}})
    assert (caught.value.code, caught.value.key) == ("bad-value", key)
    assert pattern in caught.value.what
    load(tiny, **{key: {"v_proj": 4, "q_proj": 4}})


def test_an_adapter_starts_as_the_config_asks_and_without_effect(tiny: Path) -> None:
    import torch

    starts = [load(tiny, peft_init_lora_weights=how, lora_target_modules=["q_proj"])
              for how in (None, False, True, "gaussian", "orthogonal")]  # fmt: skip
    ids = torch.arange(9)[None]
    first, *others = (
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
        for model in starts
    )
    assert [torch.equal(first, other) for other in others] == [True, True, False, False]
    with starts[0].disable_adapter():
        plain = starts[0](input_ids=ids).logits
    for model in starts:
        torch.testing.assert_close(model(input_ids=ids).logits, plain)


def test_an_invalid_expression_is_refused_on_its_value_alone() -> None:
    found = check_values({"lora_target_modules": "(q_proj"}, file="x").errors
    errors = [(error.code, error.key) for error in found]
    assert ("bad-value", "lora_target_modules") in errors
    fine = check_values({"lora_target_modules": AXOLOTL_REGEX}, file="x")
    assert "lora_target_modules" not in [error.key for error in fine.errors]


@pytest.mark.parametrize(
    ("key", "value", "corrected"),
    [
        pytest.param("lora_target_modules", ["q_proj", "v_pro"], ["q_proj", "v_proj"],
                     id="a misspelt name beside a good one"),
        pytest.param("lora_target_modules", "q_proj", ["q_proj"], id="a name as a string"),
        pytest.param("lora_target_modules", "q_proj, v_proj", ["q_proj", "v_proj"],
                     id="names in one string"),
        pytest.param("lora_target_modules", ["all-linear"], "all-linear",
                     id="all-linear in a list"),
        pytest.param("lora_target_modules", r"layer\d.*", sorted(LINEAR), id="a wrong expression"),
        pytest.param("lora_target_modules", ["xyz", "q_proj"], ["q_proj"],
                     id="a name of another model"),
        pytest.param("lora_modules_to_save", ["embed_token"], ["embed_tokens"],
                     id="a misspelt module to save"),
        pytest.param("lora_target_modules", ["q_proj", "self_attn"],
                     ["k_proj", "o_proj", "q_proj", "v_proj"],
                     id="a module that has no weight of its own"),
    ],
)  # fmt: skip
def test_a_target_that_matches_nothing_is_refused_before_weights_load(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, corrected: Any
) -> None:
    from transformers import PreTrainedModel

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", None)
        with pytest.raises(AttnimgError) as caught:
            load(tiny, **{key: value})
    assert (caught.value.code, caught.value.key) == ("bad-value", key)
    do = caught.value.do.split("\nor ")[0]
    assert applied(do, {})[key] == corrected
    load(tiny, **applied(do, {key: value}))


@pytest.mark.parametrize("value", [".*head", ["lm_head"], "model.layers.0.*_proj|lm_head"])
def test_the_output_layer_takes_no_adapter(tiny: Path, value: Any) -> None:
    with pytest.raises(AttnimgError, match="can't contain lm_head") as caught:
        load(tiny, lora_target_modules=value)
    corrected = applied(caught.value.do, {})
    assert corrected["lora_modules_to_save"] == ["lm_head"]
    load(tiny, **corrected)


def test_a_mamba_layer_is_refused_with_layers_that_can_be_adapted(tiny: Path) -> None:
    def put_on(**keys: Any) -> Any:
        config = tiny_run.config_for(tiny, adapter="lora", **keys)
        return add_adapter(tiny_model("mamba", None, vocab_size=64), config)

    with pytest.raises(AttnimgError, match="does not fit") as caught:
        put_on()
    found = leaves(put_on(**applied(caught.value.do, {})))
    assert found == {"in_proj", "x_proj", "dt_proj"}


def merged_and_trained(folder: Path, out: Path, **keys: Any) -> tuple[Any, Any, list[float]]:
    """Train, load the adapter again, merge and save it; return logits of both, and the losses."""
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    tiny_run.run(folder, out, adapter="lora", max_steps=3, learning_rate=5e-2, **keys)
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        if keys.get("tokens"):  # a base model without these rows has to be resized first
            model = AutoPeftModelForCausalLM.from_pretrained(out)
        else:
            base = AutoModelForCausalLM.from_pretrained(folder / "model")
            model = PeftModel.from_pretrained(base, out)
        trained = model.eval()(input_ids=ids).logits
        model.merge_and_unload().save_pretrained(out / "merged")
        merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()(input_ids=ids).logits
    return trained, merged, tiny_run.losses(out)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("model", ["tiny", "tied"])
@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, id="every linear layer"),
        pytest.param({"lora_modules_to_save": ["embed_tokens", "lm_head"]}, id="with embeddings"),
        pytest.param({"lora_modules_to_save": ["lm_head"]}, id="with the output"),
        pytest.param({"special_tokens": {"pad_token": "<pad>"}}, id="with a new pad token"),
        pytest.param({"peft_use_rslora": True, "lora_dropout": 0.2}, id="rank-stabilized"),
        pytest.param({"peft_use_dora": True, "lora_modules_to_save": ["lm_head"]}, id="DoRA"),
        pytest.param({"tokens": ["<new>"], "lora_modules_to_save": ["embed_tokens", "lm_head"]},
                     id="with a new token"),
    ],
)  # fmt: skip
def test_the_merged_model_is_the_trained_one(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, keys: dict[str, Any]
) -> None:
    import torch

    folder = request.getfixturevalue(model)
    trained, merged, losses = merged_and_trained(folder, tmp_path, **keys)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    assert losses[0] != losses[-1]


def test_the_loaded_adapter_has_the_loss_of_the_run(tied: Path, tmp_path: Path) -> None:
    """One weight for input and output: the run's own evaluation against a plain forward pass."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    keys = {"adapter": "lora", "lora_modules_to_save": ["embed_tokens"], "max_steps": 3,
            "val_set_size": 0.1, "eval_steps": 3, "learning_rate": 5e-2}  # fmt: skip
    result = tiny_run.run(tied, tmp_path, **keys)
    base = AutoModelForCausalLM.from_pretrained(tied / "model")
    model = PeftModel.from_pretrained(base, tmp_path).merge_and_unload().eval()
    tokenizer = AutoTokenizer.from_pretrained(tied / "model")
    rows = tiny_run.documents(tokenizer, validation=True).validation["input_ids"]
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            found = torch.nn.functional.cross_entropy(
                model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"
            )
            total, count = total + float(found), count + len(row) - 1
    assert result.eval_loss == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_one_weight_for_input_and_output_resumes_bit_for_bit(
    tied: Path, tmp_path: Path, adapter: str
) -> None:
    keys = {"adapter": adapter, "lora_modules_to_save": ["embed_tokens"], "lora_dropout": 0.2,
            "max_steps": 4, "save_steps": 2}  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    tiny_run.run(tied, whole, **keys)
    shutil.copytree(whole / "checkpoint-2", out / "checkpoint-2")
    tiny_run.run(tied, out, **keys, resume_from_checkpoint=True)
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_an_adapter_on_a_tied_embedding_is_refused_and_the_advice_helps(
    tied: Path, tiny: Path
) -> None:
    keys = {"lora_target_modules": ["q_proj", "embed_tokens"]}
    with pytest.raises(AttnimgError, match="can't contain embed_tokens") as caught:
        load(tied, **keys)
    assert caught.value.key == "lora_target_modules"
    config = tiny_run.config_for(tied, adapter="lora")
    assert adapter_notes(load(tied, **applied(caught.value.do, keys)), config) == [
        "lora_modules_to_save: embed_tokens and lm_head are tied in the base model: both "
        "are trained, and stay one weight"
    ]
    untied = load(tiny, **keys)
    assert leaves(untied) == {"q_proj", "embed_tokens"}
    assert adapter_notes(untied, config) == []


def test_a_new_pad_token_needs_no_new_row(tiny: Path) -> None:
    import json

    said: list[str] = []
    values = tiny_run.config_for(tiny, adapter="lora", special_tokens={"pad_token": "<pad>"})
    tokenizer = load_tokenizer(values, log=said.append)
    rows = json.loads((tiny / "model" / "config.json").read_text())["vocab_size"]
    assert tokenizer.pad_token_id < rows
    assert len(tokenizer) == rows
    assert "'<pad>' is not added" in said[0]


def test_a_new_pad_token_takes_a_row_that_is_there(tmp_path: Path) -> None:
    folder = beside(tmp_path, "llama", vocab_size=512)
    values = tiny_run.config_for(folder, adapter="lora", special_tokens={"pad_token": "<pad>"})
    assert load_tokenizer(values, log=lambda _: None).pad_token == "<pad>"


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"tokens": ["<new>"]}, id="tokens"),
        pytest.param({"special_tokens": {"eos_token": "<new>"}}, id="a new eos"),
        pytest.param({"special_tokens": {"eos_token": "<new>", "pad_token": "<new>"}},
                     id="a new eos that also pads"),
        pytest.param({"tokens": ["<new>"], "lora_modules_to_save": ["embed_tokens"]},
                     id="its input alone"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_new_tokens_are_trained_or_refused_with_the_model_s_own_names(
    tmp_path: Path, keys: dict[str, Any], model_type: str
) -> None:
    if model_type != "llama" and "lora_modules_to_save" in keys:
        keys = {**keys, "lora_modules_to_save": ["embed_in"]}
    folder = beside(tmp_path, model_type, tie_word_embeddings=False)
    with pytest.raises(AttnimgError, match="<new>") as caught:
        load(folder, **keys)
    assert caught.value.key == "lora_modules_to_save"
    model = load(folder, **applied(caught.value.do, keys))
    trained = [name for name, weight in model.named_parameters()
               if weight.requires_grad and "modules_to_save" in name]  # fmt: skip
    assert len(trained) == 2


def test_documents_with_tokens_beyond_the_model_are_refused(tiny: Path, tmp_path: Path) -> None:
    """Return a tokenizer's folder with more tokens than the model has embeddings."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    shutil.copytree(tiny / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = len(tokenizer)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "model")

    def documents(*ids: int) -> Dataset:
        return Dataset.from_dict({"input_ids": [[1, 2], list(ids)]})

    values = tiny_run.config_for(tmp_path, adapter="lora")
    require_embeddings(values, (documents(3, rows - 1), None), tokenizer)
    for splits in ((documents(3, rows + 1), None), (documents(3), documents(rows + 1))):
        with pytest.raises(AttnimgError, match=r"1 token without .*<two>") as caught:
            require_embeddings(values, splits, tokenizer)
    corrected = applied(caught.value.do, {"adapter": "lora"})
    require_embeddings(tiny_run.config_for(tmp_path, **corrected), splits, tokenizer)
    require_embeddings(tiny_run.config_for(tmp_path), splits, tokenizer)
    assert load(tmp_path).get_input_embeddings().weight.shape[0] == rows


def test_a_pad_token_beyond_the_model_is_not_padded_with(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(tiny / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "model")
    said: list[str] = []
    found = load_tokenizer(tiny_run.config_for(tmp_path, adapter="lora"), log=said.append)
    assert found.pad_token == "</s>"
    assert "no embedding for '<pad>'" in said[0]
    tiny_run.run(tmp_path, tmp_path / "out", adapter="lora", max_steps=1, sample_packing=False)


def test_a_tokenizer_that_can_t_pad_is_refused_and_the_advice_helps(
    tiny: Path, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(tiny / "model", tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_file=str(tiny / "model/tokenizer.json")).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(AttnimgError, match="no token for padding") as caught:
        load_tokenizer(tiny_run.config_for(tmp_path, adapter="lora"), log=lambda _: None)
    corrected = applied(caught.value.do, {"adapter": "lora"})
    assert load_tokenizer(tiny_run.config_for(tmp_path, **corrected), log=lambda _: None).pad_token


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["q_proj", "gate_proj", "up_proj", "down_proj"], {"q_proj", "experts", "base_layer"}),
        (["q_proj", "down_proj"], {"q_proj", "experts"}),
        (r".*\.experts\.(gate|up)_proj", {"experts"}),
    ],
)
def test_experts_are_targeted_by_the_names_that_they_had(targets: Any, found: set[str]) -> None:
    values = tiny_run.config_for(Path("unused"), adapter="lora", lora_target_modules=targets)
    assert leaves(add_adapter(tiny_model("qwen3_moe"), values)) == found


EVERY = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("model_type", "keys", "fixed"),
    [
        pytest.param("llama", {"lora_target_modules": ["q_proj", "mlp"]},
                     {"lora_target_modules": ["down_proj", "gate_proj", "q_proj", "up_proj"]},
                     id="a module of linear layers"),
        pytest.param("llama", {"lora_target_modules": r".*\.mlp"},
                     {"lora_target_modules": ["down_proj", "gate_proj", "up_proj"]},
                     id="an expression of them"),
        pytest.param("llama", {"lora_target_modules": ["layers.0.mlp"]},
                     {"lora_target_modules": [f"model.layers.0.mlp.{name}_proj"
                                              for name in ("down", "gate", "up")]},
                     id="one of one layer"),
        pytest.param("llama", {"lora_target_modules": ["q_proj", "norm"]},
                     {"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["norm"]},
                     id="a norm beside a layer"),
        pytest.param("llama",
                     {"lora_target_modules": ["norm"], "lora_modules_to_save": ["lm_head"]},
                     {"lora_target_modules": EVERY, "lora_modules_to_save": ["lm_head", "norm"]},
                     id="a norm alone"),
        pytest.param("llama", {"lora_target_modules": ["act_fn"]}, {"lora_target_modules": EVERY},
                     id="a function"),
        pytest.param("mixtral", {"lora_target_modules": ["q_proj", "w1"]},
                     {"lora_target_modules": ["q_proj", "w1", "w3"]}, id="half of a fused pair"),
        pytest.param("qwen3_moe", {"lora_target_modules": ["up_proj"]},
                     {"lora_target_modules": ["up_proj", "gate_proj"]}, id="the other half"),
        pytest.param("mixtral", {"lora_target_modules": ["experts"]},
                     {"lora_target_modules": ["w1", "w2", "w3"]}, id="the module of experts"),
        pytest.param("mixtral", {"lora_target_modules": ["gate_up_proj", "v_proj"]},
                     {"lora_target_modules": ["w1", "w3", "v_proj"]}, id="a fused parameter"),
        pytest.param("qwen3_moe", {"lora_dropout": 0.05}, {"lora_dropout": 0.0}, id="dropout"),
        pytest.param("qwen3_moe", {"peft_use_dora": True}, {"peft_use_dora": False}, id="DoRA"),
    ],
)  # fmt: skip
def test_targets_that_peft_refuses_are_refused_with_what_fits(
    model_type: str, keys: dict[str, Any], fixed: dict[str, Any]
) -> None:
    def put_on(**found: Any) -> Any:
        config = tiny_run.config_for(Path("unused"), adapter="lora", **found)
        return add_adapter(tiny_model(model_type), config)

    with pytest.raises(AttnimgError) as caught:
        put_on(**keys)
    assert caught.value.code == "bad-value"
    first, _, other = caught.value.do.partition("\nor ")
    assert applied(first, {}) == fixed
    put_on(**applied(first, keys))
    if other:
        assert applied(other, {}) == {"lora_target_modules": ATTENTION}
        put_on(**applied(other, keys))


@pytest.mark.parametrize(
    ("model_type", "keys", "noted"),
    [
        pytest.param("gpt_oss", {}, True, id="PEFT knows no names of them"),
        pytest.param("qwen2_moe", {"lora_target_modules": ["gate_proj"]}, True,
                     id="the name is the shared expert's"),
        pytest.param("gpt_oss", {"lora_target_modules": ["q_proj"]}, False, id="not asked for"),
        pytest.param("qwen3_moe", {}, False, id="all have an adapter"),
        pytest.param("llama", {}, False, id="no experts"),
    ],
)  # fmt: skip
def test_experts_without_an_adapter_are_named(
    model_type: str, keys: dict[str, Any], noted: bool
) -> None:
    config = tiny_run.config_for(Path("unused"), adapter="lora", **keys)
    notes = adapter_notes(add_adapter(tiny_model(model_type), config), config)
    assert any("gate_up_proj" in note and "no adapter" in note for note in notes) is noted


def test_a_dense_model_has_no_names_of_experts() -> None:
    values = tiny_run.config_for(Path("unused"), adapter="lora", lora_target_modules=["w1"])
    with pytest.raises(AttnimgError, match="w1"):
        add_adapter(tiny_model("llama"), values)


@pytest.mark.parametrize("model_type", ["llama4_text", "phimoe"])
def test_all_linear_leaves_out_routers_that_return_two_values(model_type: str) -> None:
    import torch

    values = tiny_run.config_for(Path("unused"), adapter="lora")
    model = add_adapter(tiny_model(model_type), values)
    assert "q_proj" in leaves(model)
    assert "router" not in leaves(model)
    assert torch.isfinite(model(input_ids=torch.tensor([[3, 4, 5]])).logits).all()


def test_every_linear_layer_of_transformers_with_code_of_its_own_is_known() -> None:
    import transformers

    from attnimg.train.lora import _OTHER_LINEAR

    # Falcon's returns what a linear layer does; the others are no part of a causal model.
    known = _OTHER_LINEAR | {"FalconLinear", "EsmFoldLinear", "IdeficsDecoupledLinear"}
    models = Path(transformers.__file__).parent / "models"
    found = {
        name
        for file in models.glob("*/modeling_*.py")
        for name in re.findall(r"^class (\w+)\(nn\.Linear\)", file.read_text(), re.MULTILINE)
    }
    assert found == known


def test_layers_of_other_models_are_named_and_left_out(tmp_path: Path) -> None:
    folder = beside(tmp_path, "apertus")
    keys = {"lora_target_modules": ["q_proj", "gate_proj", "up_proj"]}
    model = load(folder, **keys)
    assert leaves(model) == {"q_proj", "up_proj"}
    config = tiny_run.config_for(folder, adapter="lora", **keys)
    (note,) = [text for text in adapter_notes(model, config) if "gate_proj" in text]
    assert note.startswith("lora_target_modules: a apertus model has no gate_proj;")
    for wrong in (["q_proj", "gate_porj"], ["gate_proj"], ["q_proj", "gate_up_projs"]):
        with pytest.raises(AttnimgError, match="no module of the model is named"):
            load(folder, lora_target_modules=wrong)


def test_evaluation_does_not_repack_weights_of_4_bits(tiny: Path) -> None:
    import torch

    model = load(tiny, load_in_4bit=True, lora_target_modules=["q_proj"])
    linear = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert linear
    assert not any(module.support_avx512bf16_for_cpu for module in linear)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        model.eval()(input_ids=tokens)
    model.train()(input_ids=tokens).logits.sum().backward()
    gradients = [w.grad for name, w in model.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients)
