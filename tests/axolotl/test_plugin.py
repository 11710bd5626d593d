"""The plugin reads axolotl's config, refuses keys that replace kernels, and checks packing."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.collators import (
        BatchSamplerDataCollatorForSeq2Seq,
        V2BatchSamplerDataCollatorForSeq2Seq,
    )
    from axolotl.utils.config import normalize_config, validate_config
    from axolotl.utils.dict import DictDefault

    import attnimg
    from attnimg.integrations.axolotl import AttnimgPlugin, _collator, _settings

NAME = "attnimg.integrations.axolotl.AttnimgPlugin"
CAPABILITIES = {"bf16": False, "n_gpu": 1, "compute_capability": None}

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def cache(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNIMG_CACHE", str(kept))


def registered(config: dict[str, Any]) -> DictDefault:
    """Return a config as axolotl's commands have it, after the plugin and the validation."""
    given = DictDefault(config)
    try:
        prepare_plugins(given)
        valid = validate_config(
            given, capabilities=CAPABILITIES, env_capabilities={"torch_version": "2.13.0"}
        )
    finally:
        PluginManager.get_instance().plugins.clear()
    normalize_config(valid)
    return valid


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        pytest.param({}, "sdpa", id="absent"),
        pytest.param({"attn_implementation": None}, "sdpa", id="null"),
        pytest.param({"attn_implementation": "auto"}, "sdpa", id="auto"),
        pytest.param({"attn_implementation": "eager"}, "eager", id="a name"),
        pytest.param({"attn_implementation": "eager", "attn_strict": True}, "eager", id="strict"),
        pytest.param({"eager_attention": True}, "eager", id="a legacy flag"),
        pytest.param({"flash_attention": False}, "sdpa", id="a legacy flag that is off"),
        pytest.param({"sdpa_varlen": False, "context_parallel_size": 1}, "sdpa", id="no effect"),
    ],
)
def test_the_validated_config_has_the_verified_backend(
    example: dict[str, Any], keys: dict[str, Any], name: str
) -> None:
    found = registered(example | keys)
    assert found.attn_implementation == name
    assert found.sdpa_varlen is False
    assert found.attn_decontaminates_packing


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"sdpa_varlen": True}, "axolotl-conflict"),
        ({"large_head_attention": "triton_flash"}, "axolotl-conflict"),
        ({"gemma4_hybrid_attn_impl": True}, "axolotl-conflict"),
        ({"context_parallel_size": 2}, "axolotl-conflict"),
        ({"use_ray": True}, "axolotl-conflict"),
        ({"attn_implementation": "fa2"}, "alias-rejected"),
        ({"attn_implementation": "sdpa", "eager_attention": True}, "canonical-plus-legacy"),
        ({"attn_implementation": "flash_attention_2"}, "arch-too-old"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_would_run_another_kernel_is_refused(
    example: dict[str, Any], keys: dict[str, Any], code: str
) -> None:
    with pytest.raises(attnimg.AttnimgError) as caught:
        registered(example | keys)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("keys", "dtype", "autocast"),
    [
        ({"bf16": True}, "torch.bfloat16", True),
        ({"bf16": "full"}, "torch.bfloat16", False),
        ({"bf16": False, "fp16": True}, "torch.float16", True),
        ({"bf16": False}, "torch.float32", False),
        # axolotl's default, "auto", is float16 where the GPU has no bfloat16, and on a CPU.
        ({"bf16": None}, "torch.float16", True),
    ],
)
def test_the_precision_is_that_of_axolotl(
    example: dict[str, Any], keys: dict[str, Any], dtype: str, autocast: bool
) -> None:
    settings = _settings({**example, **keys})
    assert (str(settings["dtype"]), settings["autocast"]) == (dtype, autocast)
    assert settings["packing"]
    assert settings["sequence_len"] == example["sequence_len"]


CPU = torch.device("cpu")


@dataclass
class Args:
    multipack_real_batches: bool
    sample_packing_drop_attention_mask: bool = True
    device: torch.device = CPU


@dataclass
class Trainer:
    """The attributes of axolotl's trainer that the plugin reads."""

    model: Any
    data_collator: Any
    args: Args

    def is_world_process_zero(self) -> bool:
        return True


@pytest.fixture
def loaded(model: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "kind", [BatchSamplerDataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq]
)
def test_packing_is_checked_with_axolotls_collator(
    loaded: tuple[Any, Any], kind: Any, rows: int
) -> None:
    model, tokenizer = loaded
    args = Args(multipack_real_batches=rows > 1)
    collator = _collator(Trainer(model, kind(tokenizer, pad_to_multiple_of=512), args))
    batch = collator([{"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [2, 3]} for _ in range(rows)])
    assert batch["input_ids"].shape == (rows, 64)
    assert batch["position_ids"][0, :5].tolist() == [0, 1, 0, 1, 2]
    assert "attention_mask" not in batch
    assert attnimg.apply(model, collator=collator, packing=True, micro_batch_size=rows).verified


def test_a_collator_that_does_not_separate_documents_stops_the_run(
    loaded: tuple[Any, Any], example: dict[str, Any], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    leaking = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, squash_position_ids=True)
    plugin = AttnimgPlugin()
    config = DictDefault(example | {"output_dir": str(tmp_path)})
    plugin.register(config)
    with pytest.raises(attnimg.PackingLeak):
        plugin.post_trainer_create(config, Trainer(model, leaking, Args(False)))
    assert not (tmp_path / "attnimg.json").exists()
