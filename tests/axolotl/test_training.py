"""axolotl trains a tiny model with the plugin, packed, on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served_kernels import serve

FLASH = "kernels-community/flash-attn2"
STAND_IN = Path(__file__).parents[1] / "fixtures/flash_attn2"


@pytest.fixture(scope="module")
def plain(
    axolotl: Callable[..., Any],
    example: dict[str, Any],
    runs: dict[str, Any],
    tmp_path_factory: Any,
) -> Any:
    """Return the run of axolotl without the plugin, with eager attention."""
    config = {key: value for key, value in example.items() if key != "plugins"}
    folder = tmp_path_factory.mktemp("plain")
    run = axolotl("train", folder, config | {"attn_implementation": "eager"})
    runs["without the plugin, eager"] = {"backend": "eager", "losses": run.losses}
    return run


def test_the_plugin_trains_as_eager_attention_does(
    axolotl: Callable[..., Any],
    example: dict[str, Any],
    plain: Any,
    runs: dict[str, Any],
    tmp_path: Path,
) -> None:
    run = axolotl("train", tmp_path, example)
    assert run.code == 0, run.log
    assert "attnimg: requested auto, got sdpa on " in run.log
    assert "attnimg: proof: sdpa passed" in run.log
    assert "attnimg: packing: isolated on sdpa" in run.log
    assert "attnimg: the model trains with sdpa (sdpa)" in run.log
    receipt = json.loads((run.output_dir / "attnimg.json").read_text())
    assert receipt["verified"]
    assert receipt["implementation"] == receipt["chosen"]["backend"] == "sdpa"
    assert all(proof["passed"] for proof in receipt["proofs"])
    assert len(run.losses) == len(plain.losses) == 5
    # Both are printed with four digits.
    assert run.losses == pytest.approx(plain.losses, rel=1e-3)
    runs["auto"] = {"backend": receipt["chosen"]["backend"], "losses": run.losses}


def test_a_named_kernel_is_honoured(
    axolotl: Callable[..., Any],
    example: dict[str, Any],
    plain: Any,
    runs: dict[str, Any],
    tmp_path: Path,
) -> None:
    config = example | {"attn_implementation": "flash_attention_2"}
    run = axolotl("train", tmp_path, config, {"LOCAL_KERNELS": f"{FLASH}={STAND_IN}"})
    assert run.code == 0, run.log
    receipt = json.loads((run.output_dir / "attnimg.json").read_text())
    assert receipt["chosen"]["backend"] == "flash_attention_2"
    assert f"attnimg: the model trains with flash_attention_2 ({FLASH})" in run.log
    assert run.losses == pytest.approx(plain.losses, rel=1e-3)
    runs["named"] = {"backend": receipt["chosen"]["backend"], "losses": run.losses}


def test_a_wrong_kernel_is_refused_before_the_model_is_loaded(
    axolotl: Callable[..., Any], example: dict[str, Any], tmp_path: Path
) -> None:
    served = serve(tmp_path / "kernel", "zeros")
    config = example | {"attn_implementation": "flash_attention_2"}
    run = axolotl("train", tmp_path, config, {"LOCAL_KERNELS": f"{FLASH}={served}"})
    assert run.code != 0
    assert "flash_attention_2 failed its proof on this machine" in run.log
    assert not run.output_dir.exists()


def test_data_are_prepared_on_a_machine_that_lacks_the_kernel(
    axolotl: Callable[..., Any], example: dict[str, Any], tmp_path: Path
) -> None:
    config = example | {
        "attn_implementation": "flash_attention_2", "dataset_prepared_path": str(tmp_path / "data"),
    }  # fmt: skip
    run = axolotl("preprocess", tmp_path, config)
    assert run.code == 0, run.log
    assert [*(tmp_path / "data").iterdir()]
