"""Test that lora_model_dir continues the training of a saved adapter."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from attnimg.errors import AttnimgError
from attnimg.train.lora import adapter_notes
from attnimg.train.model import load_model
from attnimg.train.saved_adapter import with_saved_adapter
from attnimg.train.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
import tiny_run
from run_facts import a_context

KEYS = {"lora_r": 4, "lora_alpha": 32, "lora_target_modules": ["q_proj", "up_proj"],
        "lora_modules_to_save": ["lm_head"], "peft_use_rslora": True}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_run.make_model(folder / "model")
    tiny_run.run(folder, folder / "first", adapter="lora", max_steps=4, **KEYS)
    return folder


def load(folder: Path, **keys: Any) -> Any:
    values = with_saved_adapter(tiny_run.config_for(folder, **{"adapter": "lora", **keys}))
    return load_model(
        values, tokenizer=load_tokenizer(values, log=lambda _: None), implementation="sdpa",
        context=a_context(dtype="float32"), needs_dtype_cast=False,
    )  # fmt: skip


def refused(folder: Path, **keys: Any) -> AttnimgError:
    with pytest.raises(AttnimgError) as caught:
        load(folder, **keys)
    return caught.value


def continued(folder: Path, out: Path, **keys: Any) -> None:
    given = {"adapter": "lora", "lora_model_dir": str(folder / "first"), **keys}
    values = with_saved_adapter(tiny_run.config_for(folder, **given)).model_dump(exclude_unset=True)
    tiny_run.run(folder, out, **{key: values[key] for key in values if key != "output_dir"})


def test_a_run_starts_with_the_weights_and_settings_of_the_adapter(
    tiny: Path, tmp_path: Path
) -> None:
    continued(tiny, tmp_path, max_steps=1, learning_rate=1e-30)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if name.endswith(".json"):
            first, again = (json.loads((folder / name).read_text())
                            for folder in (tiny / "first", tmp_path))  # fmt: skip
            first["target_modules"].sort()
            again["target_modules"].sort()
            assert again == first
        else:
            first, again = load_file(tiny / "first" / name), load_file(tmp_path / name)
            assert again.keys() == first.keys()
            assert all(torch.equal(again[key], first[key]) for key in first)


def test_training_goes_on_from_where_it_was(tiny: Path, tmp_path: Path) -> None:
    continued(tiny, tmp_path / "again", max_steps=4)
    first, again = tiny_run.losses(tiny / "first"), tiny_run.losses(tmp_path / "again")
    assert again[0] < first[0] - 0.5
    assert again[-1] < first[-1]


@pytest.mark.parametrize("keys", [{}, KEYS, {"lora_target_modules": ["up_proj", "q_proj"]}])
def test_keys_that_agree_are_accepted(tiny: Path, keys: dict[str, Any]) -> None:
    keys = {"adapter": "lora", "lora_model_dir": str(tiny / "first"), **keys}
    model = load(tiny, **keys)
    (note,) = adapter_notes(model, tiny_run.config_for(tiny, **keys))
    assert str(tiny / "first") in note
    assert model.peft_config["default"].r == 4
    assert model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] == 16


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_r": 8}, {"lora_alpha": 16}, {"lora_dropout": 0.1}, {"peft_use_rslora": False},
        {"lora_modules_to_save": ["embed_tokens"]}, {"lora_target_modules": ["q_proj"]},
        {"lora_target_linear": True}, {"lora_rank_pattern": {"q_proj": 2}},
    ],
    ids=str,
)  # fmt: skip
def test_a_key_that_contradicts_the_adapter_is_refused(tiny: Path, keys: dict[str, Any]) -> None:
    given = {"lora_model_dir": str(tiny / "first"), **keys}
    error = refused(tiny, **given)
    (key,) = keys
    assert (error.code, error.key) == ("bad-value", key)
    assert error.do.splitlines()[0].partition(",")[0] == f"remove {key}"
    load(tiny, lora_model_dir=str(tiny / "first"))


def test_folders_without_an_adapter_are_refused(tiny: Path, tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "none", tiny / "model"):
        error = refused(tiny, lora_model_dir=str(name))
        assert (error.code, error.key) == ("bad-model", "lora_model_dir")
    shutil.copytree(tiny / "first", tmp_path / "pickled")
    (tmp_path / "pickled/adapter_model.safetensors").rename(tmp_path / "pickled/adapter_model.bin")
    assert refused(tiny, lora_model_dir=str(tmp_path / "pickled")).code == "pickled-weights"


@pytest.mark.parametrize(
    "change", [{"peft_type": "IA3"}, {"bias": "all"}, {"trainable_token_indices": [1]}], ids=str
)
def test_another_kind_of_adapter_is_refused(
    tiny: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(tiny / "first", tmp_path / "other")
    path = tmp_path / "other/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    error = refused(tiny, lora_model_dir=str(path.parent))
    assert (error.code, error.key) == ("bad-value", "lora_model_dir")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"r": "x"}', '{"target_modules": 5}', '{"lora_alpha": null, "r": -1}', "\xff"],
)
def test_settings_that_cannot_be_read_are_refused(tiny: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(tiny / "first", tmp_path / "damaged")
    (tmp_path / "damaged/adapter_config.json").write_bytes(text.encode("latin-1"))
    error = refused(tiny, lora_model_dir=str(tmp_path / "damaged"))
    assert (error.code, error.key) == ("bad-model", "lora_model_dir")


def test_settings_without_an_entry_have_pefts_default(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "first", tmp_path / "older")
    path = tmp_path / "older/adapter_config.json"
    saved = json.loads(path.read_text())
    del saved["lora_dropout"], saved["use_dora"], saved["fan_in_fan_out"]
    path.write_text(json.dumps(saved))
    assert load(tiny, lora_model_dir=str(path.parent)).peft_config["default"].lora_dropout == 0


def test_damaged_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "first", tmp_path / "damaged")
    (tmp_path / "damaged/adapter_model.safetensors").write_bytes(b"")
    assert refused(tiny, lora_model_dir=str(tmp_path / "damaged")).key == "lora_model_dir"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_that_the_loss_would_not_train_is_refused(
    tiny: Path, tmp_path: Path, target: str, tied: bool
) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    settings = LoraConfig(target_modules=[target], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    keys = {"lora_model_dir": str(tmp_path / "adapter")}
    if target == "embed_tokens" and not tied:
        load(tmp_path, **keys)
    else:
        assert refused(tmp_path, **keys).key == "lora_model_dir"


def test_a_folder_of_an_unknown_user_is_refused(tiny: Path) -> None:
    assert refused(tiny, lora_model_dir="~nobody-here/adapter").code == "bad-model"


def test_weights_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path) -> None:
    for number, change in enumerate(("shape", "missing", "more")):
        folder = tmp_path / str(number)
        shutil.copytree(tiny / "first", folder)
        weights = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in weights if "lora_A" in name)
        if change == "shape":
            weights[name] = torch.zeros(4, 3)
        elif change == "missing":
            del weights[name]
        else:
            weights[name.replace("layers.0", "layers.7")] = weights[name].clone()
        save_file(weights, folder / "adapter_model.safetensors")
        error = refused(tiny, lora_model_dir=str(folder))
        assert (error.code, error.key) == ("bad-value", "lora_model_dir")
        assert "does not fit the model" in error.what
