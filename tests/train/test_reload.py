"""Check that a saved model loads again, by its own class, with the logits it had when trained.

RELOAD=all (make test/reload) takes every type of TYPES and writes RECORD; without it a few stand
for all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model
from tiny_run import sentences
from tiny_vlms import tiny_vlm

from attnimg import config, pipeline
from attnimg.cli.train import PrintedReport
from attnimg.selection.model_types import read_causal_types
from attnimg.task import installed_machine
from attnimg.train import fit, records, run
from attnimg.train.distributed import StopFlag
from attnimg.train.environment import silence_libraries
from attnimg.train.model_files import TORCH_NAMES, read_tensor_headers

RECORD = Path(__file__).parents[2] / "docs" / "measured" / "reload.json"
EVERY = os.environ.get("RELOAD") == "all"
pytestmark = [pytest.mark.filterwarnings("ignore")]

# Causal language models of transformers, by model type.
TYPES = [
    "afmoe", "apertus", "arcee", "bamba", "biogpt", "bloom", "codegen", "cohere", "cohere2",
    "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone4", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "helium", "hunyuan_v1_dense", "jamba", "lfm2", "llama", "longcat_flash",
    "mamba", "mamba2", "minimax", "ministral", "ministral3", "mistral", "mixtral", "mpt",
    "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_next", "recurrent_gemma",
    "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm", "zamba2",
]  # fmt: skip
# Multimodal types, whose language model is trained.
WITH_TOWERS = ["emu3", "gemma3", "got_ocr2", "llama4", "mllama", "qwen3_5", "qwen3_5_moe",
               "qwen4_exp", *sorted(read_causal_types().text_trained)]  # fmt: skip
# Tied and untied, an odd head, biases, experts, recurrent layers, a computed dtype.
FEW = ["llama", "gpt2", "gemma2", "qwen3_moe", "mamba2"]
FEW_WITH_TOWERS = ["qwen3_5", "mistral3"]

# PEFT refuses adapters on other layers of Mamba.
IN_PROJ = ["bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2",
           "zamba2"]  # fmt: skip

FULL: dict[str, Any] = {}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
        "lora_target_linear": True}  # fmt: skip


def tokenizer_in(folder: Path) -> Any:
    """Write a tokenizer whose ids are below those that tiny models have for images."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in sentences(200) for word in text.rstrip(".").split()})
    names = ["<pad>", "<s>", "</s>", "<unk>", ".", *words]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def record() -> dict[str, Any]:
    """Return the content of RECORD after all rows have passed."""
    return {
        "made by": "make test/reload",
        "transformers": metadata.version("transformers"),
        "rows": "each type full and with LoRA, in float32 and bfloat16: logits equal when reloaded",
        "types": sorted(TYPES),
        "with other parts": sorted(WITH_TOWERS),
    }


@pytest.fixture(scope="module", autouse=True)
def _written(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write RECORD after a run of all rows that has no failure."""
    yield
    session = request.session
    if EVERY and session.testscollected > len(ROWS) and not session.testsfailed:
        RECORD.write_text(json.dumps(record(), indent=2) + "\n")


@pytest.mark.skipif(EVERY, reason="a run of all rows writes the record")
def test_the_record_is_of_these_types_and_this_transformers() -> None:
    assert json.loads(RECORD.read_text()) == record(), "make test/reload"
    types = read_causal_types()
    assert types.text_trained | types.multimodal.keys() <= {*WITH_TOWERS}, "docs/checkpoints.md"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    lines = [json.dumps({"text": text}) for text in sentences(12, seed=3)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def base(home: Path, model_type: str) -> Path:
    """Write a tiny checkpoint of a type, once."""
    folder = home / model_type
    if not folder.exists():
        make = tiny_vlm if model_type in WITH_TOWERS else tiny_model
        make(model_type).save_pretrained(folder)
        tokenizer_in(folder)
        (folder / "preprocessor_config.json").write_text('{"size": 28}\n')
    return folder


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Restore the environment that transformers changes."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def train(model: Path, out: Path, patch: pytest.MonkeyPatch, **keys: Any) -> Any:
    """Train one step as the command does after the kernel's proof.

    Returns:
        The model as it was when it was saved, without the autocast of its training.
    """
    values = {
        "base_model": str(model),
        "datasets": [{"path": str(model.parent / "data.jsonl"), "type": "completion"}],
        "learning_rate": 1e-2,
        "sequence_len": 64,
        "max_steps": 1,
        "save_strategy": "no",
        "attn_implementation": "eager",
        "output_dir": str(out),
        **keys,
    }
    found: list[Any] = []
    save = fit.save_final_model

    def save_and_keep(engine: Any, *rest: Any) -> Any:
        files = save(engine, *rest)
        found.append(engine.accelerator.unwrap_model(engine.model, keep_fp32_wrapper=False))
        return files

    patch.setattr(fit, "save_final_model", save_and_keep)
    patch.setattr(records, "plot_loss", lambda *_, **__: None)
    checked = config.check_values(values, file="run.yaml")
    assert checked.config is not None, checked.errors
    silence_libraries()
    patch.setattr(pipeline, "verify_plan", lambda plan, task, report: (plan, ()))
    report = PrintedReport(Console(quiet=True))
    run.train(checked.config, installed_machine(), report=report, stop=StopFlag())
    return found[0]


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a few tokens, without autocast."""
    ids = torch.tensor([[4, 5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float()
    return found


def load(folder: Path, name: str, **options: Any) -> Any:
    """Load a checkpoint by the class that its config names, with nothing missing or left over."""
    import transformers

    model, told = getattr(transformers, name).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not told["missing_keys"], told
    assert not told["unexpected_keys"], told
    assert not told["mismatched_keys"], told
    return model


ROWS = [
    (model_type, adapter, precision)
    for model_type in (TYPES + WITH_TOWERS if EVERY else FEW + FEW_WITH_TOWERS)
    for adapter in (FULL, LORA)
    for precision in ("float32", "bfloat16")
    if EVERY or precision == "bfloat16" or model_type == "llama"
]


@pytest.mark.parametrize(
    ("model_type", "adapter", "precision"),
    [pytest.param(*row, id=f"{row[0]} {'lora' if row[1] else 'full'} {row[2]}") for row in ROWS],
)
def test_what_is_saved_is_what_was_trained(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    adapter: dict[str, Any],
    precision: str,
) -> None:
    folder = base(home, model_type)
    had = json.loads((folder / "config.json").read_text())
    out = tmp_path / "out"
    if adapter and model_type in IN_PROJ:
        adapter = {**adapter, "lora_target_linear": None, "lora_target_modules": ["in_proj"]}
    trained = train(folder, out, monkeypatch, bf16=precision == "bfloat16", **adapter)
    expected = logits(trained)
    name = had["architectures"][0]
    if adapter:
        from peft import PeftModel

        plain = load(folder, name, dtype=precision)
        before = logits(plain)
        again = PeftModel.from_pretrained(plain, out)
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
        assert not torch.equal(before, expected), "nothing was trained"
        return
    saved = json.loads((out / "config.json").read_text())
    dtypes = {TORCH_NAMES[t.dtype] for t in read_tensor_headers(out).values()
              if t.dtype in TORCH_NAMES}  # fmt: skip
    assert saved["dtype"] == precision
    if not keeps_float32(trained):
        assert dtypes == {precision}
    assert saved["architectures"] == had["architectures"]
    for key in ("tie_word_embeddings", "use_cache", "output_router_logits", "vocab_size"):
        assert saved.get(key) == had.get(key), key
    assert "quantization_config" not in saved
    was, is_now = generation(folder), generation(out)
    # The trainer names the tokenizer's tokens where the checkpoint named none.
    named = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2]}
    added = {key: named[key] for key in is_now.keys() & named.keys() - was.keys()}
    assert is_now == {**was, **added}
    again = load(out, name, dtype="auto")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    assert not torch.equal(logits(load(folder, name, dtype=precision)), expected), "not trained"
    processor = out / "preprocessor_config.json"
    assert processor.exists() is (model_type in WITH_TOWERS)
    if model_type in WITH_TOWERS:
        assert_towers_kept(folder, out, precision)


def generation(folder: Path) -> dict[str, Any]:
    """Return how a checkpoint generates."""
    found: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    return {key: value for key, value in found.items() if key != "transformers_version"}


def keeps_float32(model: Any) -> bool:
    """Return whether transformers keeps some weights of a class in float32 itself."""
    return any(
        getattr(module, "_keep_in_fp32_modules", None)
        or getattr(module, "_keep_in_fp32_modules_strict", None)
        for module in model.modules()
    )


def assert_towers_kept(before: Path, after: Path, precision: str) -> None:
    """Assert that all tensors are saved, and that those of the towers are unchanged."""
    from safetensors.torch import load_file

    old, new = (load_file(path / "model.safetensors") for path in (before, after))
    assert old.keys() == new.keys()
    words = (
        "vision",
        "visual",
        "tower",
        "projector",
        "connector",
        "aligner",
        "projection",
        "vqmodel",
    )
    towers = [key for key in old if any(word in key for word in words)]
    assert towers
    for key in towers:
        assert torch.equal(old[key].to(getattr(torch, precision)), new[key]), key
    assert any(not torch.equal(old[key].to(new[key].dtype), new[key]) for key in old)
