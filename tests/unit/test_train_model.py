"""What is loaded: files, tokens, precision, adapters; and what is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import DType
from attnimg.train.base_model import require_causal_type
from attnimg.train.model import load_model, load_model_config
from attnimg.train.model_files import check_model_files, read_tensor_headers
from attnimg.train.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
import tiny_run
from run_facts import a_context

QLORA = {"adapter": "qlora", "load_in_4bit": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_run.make_model(folder / "model")
    return folder


def load(folder: Path, *, dtype: DType = "float32", cast: bool = False, **keys: Any) -> Any:
    values = tiny_run.config_for(folder, **keys)
    autocast = None if dtype == "float32" or values.bf16 == "full" else dtype
    context = a_context(dtype=dtype, autocast=autocast)
    tokenizer = load_tokenizer(values, log=lambda _: None)
    return load_model(
        values, tokenizer=tokenizer, implementation="sdpa", context=context, needs_dtype_cast=cast
    )


def dtypes(model: Any, *, trained: bool = True) -> Counter[str]:
    return Counter(
        str(weight.dtype).removeprefix("torch.")
        for weight in model.parameters()
        if weight.requires_grad == trained
    )


@pytest.mark.parametrize(
    ("dtype", "cast", "keys", "expected"),
    [
        pytest.param("float32", False, {}, {"float32"}, id="float32 stays float32"),
        pytest.param("float32", True, {}, {"float32"}, id="casting to float32 changes nothing"),
        pytest.param("bfloat16", False, {}, {"bfloat16", "float32"},
                     id="bfloat16 keeps embeddings and norms"),
        pytest.param("bfloat16", True, {}, {"bfloat16"}, id="a kernel that casts gets bfloat16"),
        pytest.param("bfloat16", False, {"bf16": "full"}, {"bfloat16"}, id="full is full"),
        pytest.param("float16", False, {}, {"float32"}, id="float16 trains float32 weights"),
        pytest.param("bfloat16", False, {"adapter": "lora"}, {"float32"},
                     id="an adapter is float32"),
    ],
)  # fmt: skip
def test_trained_weights_have_the_right_precision(
    tiny: Path, dtype: DType, cast: bool, keys: dict[str, Any], expected: set[str]
) -> None:
    assert set(dtypes(load(tiny, dtype=dtype, cast=cast, **keys))) == expected


def test_the_kept_weights_are_embeddings_and_norms(tiny: Path) -> None:
    import torch

    model = load(tiny, dtype="bfloat16")
    kept = {name.split(".")[-2] for name, weight in model.named_parameters()
            if weight.dtype == torch.float32}  # fmt: skip
    assert kept == {"embed_tokens", "lm_head", "norm", "input_layernorm",
                    "post_attention_layernorm"}  # fmt: skip


def test_weights_under_an_adapter_are_frozen_in_the_run_s_precision(tiny: Path) -> None:
    assert set(dtypes(load(tiny, dtype="bfloat16", adapter="lora"), trained=False)) == {"bfloat16"}


@pytest.mark.parametrize(
    ("keys", "touched"),
    [
        pytest.param({}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                          "down_proj"}, id="every linear layer but the output by default"),
        pytest.param({"lora_target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"},
                     id="those named"),
        pytest.param({"lora_target_modules": ["q_proj"], "lora_target_linear": True},
                     {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
                     id="lora_target_linear adds the rest"),
    ],
)  # fmt: skip
def test_lora_is_put_on(tiny: Path, keys: dict[str, Any], touched: set[str]) -> None:
    model = load(tiny, adapter="lora", **keys)
    named = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters()
             if "lora_A" in name}  # fmt: skip
    assert named == touched


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        pytest.param(QLORA, "Linear4bit", id="qlora is 4 bit"),
        pytest.param({"adapter": "qlora"}, "Linear4bit", id="qlora alone says 4 bit"),
        pytest.param({"adapter": "lora", "load_in_8bit": True}, "Linear8bitLt", id="lora in 8 bit"),
    ],
)
def test_weights_are_quantized(tiny: Path, keys: dict[str, Any], kind: str) -> None:
    model = load(tiny, **keys)
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == kind


def test_added_tokens_get_embeddings(tiny: Path) -> None:
    model = load(tiny, tokens=["<|one|>", "<|two|>"], special_tokens={"pad_token": "<pad>"})
    before = json.loads((tiny / "model" / "config.json").read_text())["vocab_size"]
    assert model.get_input_embeddings().weight.shape[0] == before + 3


def test_the_end_token_pads_when_nothing_else_does_and_it_is_said(tiny: Path) -> None:
    said: list[str] = []
    tokenizer = load_tokenizer(tiny_run.config_for(tiny), log=said.append)
    assert tokenizer.pad_token == "</s>"
    assert "'</s>' is used for padding" in said[0]


@pytest.mark.parametrize(
    ("keys", "code", "key", "says"),
    [
        pytest.param({"model_type": "NoSuchModel"}, "bad-value", "model_type", "NoSuchModel",
                     id="a model class that is not there"),
        pytest.param({"tokenizer_type": "NoSuchTokenizer"}, "bad-value", "tokenizer_type",
                     "NoSuchTokenizer", id="a tokenizer class that is not there"),
        pytest.param({"tokenizer_type": "BartphoTokenizer"}, "bad-model", "base_model", "tokenizer",
                     id="a tokenizer class whose package is not installed"),
        pytest.param({"adapter": "lora", "tokens": ["<|new|>"]}, "bad-value",
                     "lora_modules_to_save", "<|new|>", id="new tokens nobody would train"),
        pytest.param({"eot_tokens": ["<|never|>"]}, "bad-value", "eot_tokens", "<|never|>",
                     id="an end of turn that is many tokens"),
        pytest.param({"adapter": "lora", "lora_target_modules": ["c_attn"]}, "bad-value",
                     "lora_target_modules", "c_attn", id="layers of another model"),
        pytest.param({"base_model": "nobody/has-this-cached"}, "bad-model", "base_model",
                     "nobody/has-this-cached", id="a hub name that is not in the cache"),
    ],
)  # fmt: skip
def test_what_can_t_be_loaded_is_named(
    tiny: Path, keys: dict[str, Any], code: str, key: str, says: str
) -> None:
    with pytest.raises(AttnimgError, match="attnimg") as caught:
        load(tiny, **keys)
    assert (caught.value.code, caught.value.key) == (code, key)
    assert says.replace("|", "|") in caught.value.what


def folder_of(tmp_path: Path, tiny: Path, *, without: tuple[str, ...]) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny / "model", folder)
    for name in without:
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize(
    ("without", "says"),
    [
        pytest.param(("config.json",), "has no config.json", id="no config"),
        pytest.param(("model.safetensors",), "has no weights", id="no weights"),
        pytest.param(("tokenizer.json", "tokenizer_config.json"), "has no tokenizer",
                     id="no tokenizer"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused(
    tmp_path: Path, tiny: Path, without: tuple[str, ...], says: str
) -> None:
    folder = folder_of(tmp_path, tiny, without=without)
    with pytest.raises(AttnimgError, match=says) as caught:
        check_model_files(Config(base_model=str(folder)))
    assert (caught.value.code, caught.value.exit_code) == ("bad-model", 2)


def test_a_missing_shard_is_named(tmp_path: Path, tiny: Path) -> None:
    folder = folder_of(tmp_path, tiny, without=())
    shards = {"weight_map": {"a": "model.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(AttnimgError, match=r"model-2-of-2\.safetensors"):
        check_model_files(Config(base_model=str(folder)))


def test_weights_that_would_start_random_are_refused(tmp_path: Path, tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = folder_of(tmp_path, tiny, without=())
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AttnimgError, match=r"lm_head\.weight"):
        load(tmp_path)


def test_a_torn_weight_file_is_refused(tmp_path: Path, tiny: Path) -> None:
    folder = folder_of(tmp_path, tiny, without=())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AttnimgError, match="could not be loaded"):
        load(tmp_path)


def with_weight(folder: Path, name: str, value: float, *, half: bool = False) -> None:
    """Write one value into a weight of a model folder."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights[name][1, 1] = value
    if half:
        weights = {label: weight.to(torch.bfloat16) for label, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("keys", [{}, QLORA, {"adapter": "lora"}], ids=["full", "qlora", "lora"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, tiny: Path, value: float, keys: dict[str, Any]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with_weight(folder_of(tmp_path, tiny, without=()), name, value)
    with pytest.raises(AttnimgError) as caught:
        load(tmp_path, **keys)
    assert (caught.value.code, caught.value.exit_code) == ("weights-not-finite", 2)
    assert name in caught.value.why


def test_weights_larger_than_float16_are_refused_there_and_taken_in_bfloat16(
    tmp_path: Path, tiny: Path
) -> None:
    folder = folder_of(tmp_path, tiny, without=())
    with_weight(folder, "model.layers.1.mlp.up_proj.weight", 1e5, half=True)
    load(tmp_path, dtype="bfloat16", adapter="lora")
    with pytest.raises(AttnimgError, match="NaN or infinite"):
        load(tmp_path, dtype="float16", adapter="lora")


@pytest.mark.parametrize(
    ("raw", "keys", "says"),
    [
        pytest.param({"model_type": "bert"}, {}, "is_decoder", id="BERT"),
        pytest.param({"model_type": "t5"}, {}, "choose a decoder", id="T5"),
        pytest.param({"model_type": "vit"}, {}, "choose a decoder", id="a vision model"),
        pytest.param({"model_type": "whisper"}, {}, "choose a decoder", id="Whisper"),
        pytest.param({"model_type": "florence2"}, {},
                     "model_type: Florence2ForConditionalGeneration", id="images, not tried"),
        pytest.param({"model_type": "new", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, {},
                     "trust_remote_code: true", id="code of its own, not trusted"),
    ],
)  # fmt: skip
def test_a_model_that_is_no_causal_language_model_is_refused(
    raw: dict[str, Any], keys: dict[str, Any], says: str
) -> None:
    with pytest.raises(AttnimgError) as caught:
        require_causal_type(Config(base_model="there", **keys), raw)
    assert (caught.value.code, caught.value.exit_code) == ("not-causal-lm", 2)
    assert caught.value.key == "base_model"
    assert says in caught.value.do


@pytest.mark.parametrize(
    ("raw", "keys"),
    [
        pytest.param({"model_type": "llama"}, {}, id="Llama"),
        pytest.param({"model_type": "bert", "is_decoder": True}, {}, id="BERT as a decoder"),
        pytest.param({"model_type": "gemma3"}, {}, id="Gemma 3 with its vision tower"),
        pytest.param({"model_type": "mistral3"},
                     {"model_type": "Mistral3ForConditionalGeneration"}, id="a class by name"),
        pytest.param({"model_type": "mistral3"}, {}, id="images, trained on text"),
        pytest.param({"model_type": "new", "auto_map": {"AutoModelForCausalLM": "x.Y"}},
                     {"trust_remote_code": True}, id="trusted code of its own"),
    ],
)  # fmt: skip
def test_a_causal_language_model_is_taken(raw: dict[str, Any], keys: dict[str, Any]) -> None:
    require_causal_type(Config(base_model="there", **keys), raw)


def test_a_class_of_this_task_is_taken(tiny: Path) -> None:
    for name in ("LlamaForCausalLM", "AutoModelForCausalLM"):
        load_model_config(tiny_run.config_for(tiny, model_type=name))


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate((256 << 20) + 1)


@pytest.mark.parametrize(
    "make", [_pipe, _device, Path.mkdir, _large], ids=lambda make: make.__name__
)
@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "model.safetensors.index.json", "adapter_config.json"]
)
def test_what_is_no_file_of_a_normal_size_is_refused(
    tiny: Path, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "notes").mkdir()
    config = tiny_run.config_for(tmp_path)
    check_model_files(config)
    (tmp_path / "model" / name).unlink(missing_ok=True)
    make(tmp_path / "model" / name)
    with pytest.raises(AttnimgError, match=name) as caught:
        check_model_files(config)
    assert caught.value.code == "bad-model"
    assert "found" in caught.value.why
    # The headers are read before: a pipe there must not hang.
    assert read_tensor_headers(tmp_path / "model")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 50_000, id="50,000 levels"),
        pytest.param("[]", id="a list"),
        pytest.param('{"weight_map": {"a": 3}}', id="a number for a name"),
        pytest.param('{"weight_map": {"a": "%s"}}' % ("x" * 300), id="a name of 300 bytes"),
        pytest.param("", id="nothing"),
    ],
)
def test_an_index_that_names_no_files_is_refused(tiny: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(AttnimgError, match=r"model\.safetensors\.index\.json"):
        check_model_files(tiny_run.config_for(tmp_path))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("text", ["[" * 50_000, "[]", '{"a": ' + "1" * 5000 + "}"],
                         ids=["50,000 levels", "a list", "5,000 digits"])  # fmt: skip
def test_json_that_the_loaders_do_not_expect_is_refused_with_a_reason(
    tiny: Path, tmp_path: Path, name: str, text: str
) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / name).write_text(text)
    with suppress(AttnimgError):
        load(tmp_path)


def test_a_model_is_moved_to_the_gpu_unless_it_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from attnimg.train.model import _device

    plain = Config(learning_rate=1e-3)
    assert _device(plain) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _device(plain) == torch.device("cuda", 1)
    for sharded in ({"fsdp": ["full_shard"]}, {"deepspeed": {"zero": 1}}):
        assert _device(Config(learning_rate=1e-3, **sharded)) is None
