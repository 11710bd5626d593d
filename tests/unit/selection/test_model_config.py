"""What a config.json may look like, where it is found, and what is said when it can't be read."""

import json
import os
from pathlib import Path

import pytest

from attnimg.errors import AttnimgError
from attnimg.run_facts import LayerGroup
from attnimg.selection.attention_shapes import read_attention_dropout, read_model
from attnimg.selection.model_config import find_config, missing_folder, read_config


@pytest.mark.parametrize(
    ("config", "layers", "sentence"),
    [
        pytest.param(
            {"model_type": "new", "num_hidden_layers": 2, "hidden_size": 64,
             "num_attention_heads": 4, "sliding_window": 16},
            (LayerGroup(count=2, heads=4, kv_heads=4, head_dim_qk=16, head_dim_v=16, window=16),),
            "general rule", id="an unknown type is read by the general rule",
        ),
        pytest.param({}, (), "no num_hidden_layers", id="an empty config says nothing"),
        pytest.param(
            {"model_type": "new", "num_hidden_layers": 2, "num_attention_heads": 4}, (),
            "no hidden_size", id="heads without a size are not known",
        ),
        pytest.param(
            {"model_type": "llama4_text", "num_hidden_layers": 4},
            (LayerGroup(count=4, heads=40, kv_heads=8, head_dim_qk=128, head_dim_v=128),),
            "3 of 4 layers attend within chunks of 8192", id="chunks are told in words",
        ),
        pytest.param(
            {"model_type": "llama", "num_hidden_layers": 1, "is_encoder_decoder": True},
            (LayerGroup(count=1, heads=32, kv_heads=32, head_dim_qk=128, head_dim_v=128),),
            "encoder", id="an encoder is not looked at",
        ),
    ],
)  # fmt: skip
def test_what_is_not_known_is_said(config, layers, sentence):
    model = read_model(config)
    assert model.layers == layers
    assert any(sentence in text for text in model.unknown)


def test_a_new_layer_kind_is_named():
    kinds = ["full_attention", "quantum_attention"]
    model = read_model({"model_type": "llama", "num_hidden_layers": 2, "layer_types": kinds})
    assert any("'quantum_attention'" in text for text in model.unknown)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        pytest.param({"num_attention_heads": "32"}, "num_attention_heads", id="a string"),
        pytest.param({"num_attention_heads": True}, "num_attention_heads", id="a boolean"),
        pytest.param({"num_attention_heads": 32.0}, "num_attention_heads", id="a fraction"),
        pytest.param({"num_hidden_layers": -1}, "num_hidden_layers", id="negative"),
        pytest.param({"num_hidden_layers": 0}, "num_hidden_layers", id="no layers"),
        pytest.param({"num_hidden_layers": 10**9}, "num_hidden_layers", id="a billion layers"),
        pytest.param({"n_layer": "x", "num_hidden_layers": None}, "n_layer", id="its own name"),
        pytest.param({"hidden_size": [4096]}, "hidden_size", id="a list"),
        pytest.param({"hidden_size": 8}, "hidden_size", id="less than the heads"),
        pytest.param({"num_key_value_heads": 5}, "num_key_value_heads", id="5 of 32 kv heads"),
        pytest.param({"head_dim": {}}, "head_dim", id="an object"),
        pytest.param({"layer_types": ["full_attention"]}, "layer_types", id="too few kinds"),
        pytest.param(
            {"model_type": "llama4_text", "no_rope_layers": [1]},
            "no_rope_layers",
            id="too few flags",
        ),
        pytest.param({"layer_types": "full"}, "layer_types", id="kinds as a string"),
        pytest.param({"layer_types": [1] * 32}, "layer_types", id="kinds as numbers"),
        pytest.param({"attn_logit_softcapping": "50"}, "attn_logit_softcapping", id="softcap"),
        pytest.param({"attn_logit_softcapping": float("nan")}, "attn_logit_softcapping", id="nan"),
        pytest.param({"per_layer_config": {"x": {}}}, "per_layer_config", id="layer named x"),
        pytest.param({"per_layer_config": {"1": 3}}, "per_layer_config", id="layer is no object"),
        pytest.param({"text_config": "x"}, "text_config", id="a language part as a string"),
        pytest.param({"model_type": 3}, "model_type", id="a type as a number"),
        pytest.param({"vocab_size": "many"}, "vocab_size", id="a size for the count of weights"),
        pytest.param({"is_encoder_decoder": "yes"}, "is_encoder_decoder", id="a word for a flag"),
    ],
)
def test_a_field_that_cannot_be_is_named(fields, name):
    with pytest.raises(AttnimgError) as caught:
        read_model({"model_type": "llama"} | fields)
    assert caught.value.code == "bad-model"
    assert name in caught.value.what
    assert "needed" in caught.value.why


@pytest.mark.parametrize(
    ("config", "probability"),
    [
        pytest.param({"model_type": "llama"}, 0.0, id="none is the rule"),
        pytest.param({"model_type": "gpt2"}, 0.1, id="gpt2 drops unless told"),
        pytest.param({"model_type": "gpt2", "attn_pdrop": 0.0}, 0.0, id="gpt2 told"),
        pytest.param({"model_type": "llama", "attention_dropout": 0.25}, 0.25, id="llama told"),
        pytest.param({"model_type": "mpt", "attn_config": {"attn_pdrop": 0.5}}, 0.5, id="mpt"),
        pytest.param(
            {"model_type": "gemma3", "text_config": {"attention_dropout": 0.5}}, 0.5, id="gemma3"
        ),
    ],
)
def test_dropout(config, probability):
    assert read_attention_dropout(config) == probability


@pytest.mark.parametrize("value", [1, 1.5, -0.1, "0.1", True])
def test_a_dropout_that_is_no_probability_is_refused(value):
    with pytest.raises(AttnimgError, match="attention_dropout"):
        read_attention_dropout({"model_type": "llama", "attention_dropout": value})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b"", "line 1, column 1", id="empty"),
        pytest.param(b"{'a': 1}", "line 1, column 2", id="Python, not JSON"),
        pytest.param(b"[1]", "list", id="a list"),
        pytest.param(b'{"a": "\x80"}', "not text", id="binary"),
        pytest.param(b"[" * 100_000, "can't be read", id="nested too deep"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "can't be read", id="an endless number"),
        pytest.param(b" " * (16 * 2**20 + 1), "longer than 16,777,216 bytes", id="too large"),
    ],
)
def test_a_file_that_is_no_config_is_refused(content, why, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(AttnimgError) as caught:
        read_config(tmp_path / "config.json")
    assert caught.value.code == "bad-model"
    assert why in caught.value.why


def test_a_folder_without_a_config_is_named(tmp_path):
    path = find_config(str(tmp_path))
    with pytest.raises(AttnimgError, match="cannot read the model") as caught:
        read_config(path)
    assert "No such file" in caught.value.why


def snapshot(cache, name, commit, *, ref=None):
    folder = cache / ("models--" + name.replace("/", "--"))
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit / "config.json"


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        pytest.param({"HF_HUB_CACHE": "hub"}, "hub", id="HF_HUB_CACHE"),
        pytest.param({"HF_HOME": "home"}, "home/hub", id="HF_HOME"),
        pytest.param({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/hub", id="XDG_CACHE_HOME"),
        pytest.param({"HOME": "me"}, "me/.cache/huggingface/hub", id="nothing set"),
    ],
)
def test_the_hub_cache_is_found(variables, place, tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    path = snapshot(tmp_path / place, "org/name", "abc", ref="main")
    snapshot(tmp_path / place, "org/name", "newer")
    assert find_config("org/name") == path
    assert find_config("org/name", revision="newer").parent.name == "newer"
    assert find_config("org/name", revision="absent") is None


def test_without_a_ref_the_newest_snapshot_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    old, new = snapshot(tmp_path, "gpt2", "aaa"), snapshot(tmp_path, "gpt2", "bbb")
    os.utime(old.parent, (1, 1))
    assert find_config("gpt2") == new


@pytest.mark.parametrize(
    "name",
    ["org/none", "../../etc", "a/b/c", "/no/such/folder", "", "a b", "~nobody-here/x", "x" * 5000],
)
def test_what_is_not_at_hand_is_none(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find_config(name) is None


def test_a_config_file_and_its_folder_are_the_same(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "config.json"
    assert find_config(str(tmp_path)) == find_config(str(path)) == path


def test_an_adapter_in_the_place_of_a_model_is_named_with_its_base_model(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    for folder in (adapter, base):
        folder.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    with pytest.raises(AttnimgError, match="is an adapter, not a model") as caught:
        read_config(adapter / "config.json")
    assert caught.value.code == "bad-model"
    advised = caught.value.do.removeprefix("set base_model: ").partition(";")[0]
    found = find_config(advised)
    assert found is not None
    assert read_config(found) == {"model_type": "llama"}
    for damaged in ("{", "[]", "{}", '{"base_model_name_or_path": null}'):
        (adapter / "adapter_config.json").write_text(damaged)
        with pytest.raises(AttnimgError, match="is an adapter, not a model") as caught:
            read_config(adapter / "config.json")
        assert caught.value.do.startswith("set base_model: the model that it was trained on;")


@pytest.mark.parametrize(
    "written", ["./modle", "{here}/modle", "modle/", "../here/modle", "~/modle"]
)
def test_a_path_that_does_not_exist_is_refused_with_the_nearest_name(
    written, tmp_path, monkeypatch
):
    here = tmp_path / "here"
    (here / "model").mkdir(parents=True)
    (here / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    written = written.format(here=here)
    assert find_config(written) is None
    error = missing_folder(written)
    assert error is not None
    assert error.key == "base_model"
    key, _, advised = error.do.partition("set base_model: ")
    assert (key, find_config(advised).is_file()) == ("", True)


@pytest.mark.parametrize("name", ["org/model", "gpt2", "meta-llama/Llama-3.1-8B"])
def test_a_hub_name_is_not_the_path_of_a_folder(name):
    assert missing_folder(name) is None


def test_a_path_with_no_name_near_it_has_to_be_corrected(tmp_path):
    error = missing_folder(str(tmp_path / "none" / "model"))
    assert error.do.startswith("correct the path")
