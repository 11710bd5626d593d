"""The losses of real runs: the same on every backend, and the true mean over trained tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from tiny_run import documents, lines, losses, make_model, run

KERNEL = Path(__file__).parents[1] / "fixtures" / "flash_attn2"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def hub_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn2={KERNEL}")


def nll(model: Any, ids: list[int]) -> tuple[float, int]:
    """Sum the negative log-likelihood of one document by itself; count its predicted tokens."""
    import torch

    row = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=row).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum")
    return loss.item(), len(ids) - 1


def true_loss(folder: Path, *, validation: bool) -> float:
    """Compute the mean loss per token with plain transformers, one document at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    made = documents(AutoTokenizer.from_pretrained(folder), validation=True)
    split = made.validation if validation else made.train
    sums, counts = zip(*(nll(model, ids) for ids in split["input_ids"]), strict=True)
    return sum(sums) / sum(counts)


EAGER = {"attention": "eager"}
FLASH = {"attention": "flash_attention_2", "padding_free": True}


def test_twenty_packed_steps_are_the_same_on_every_backend(tiny: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 20, "gradient_accumulation_steps": 2, "val_set_size": 0.1,
                            "eval_steps": 10}  # fmt: skip
    for name, engine in (("sdpa", {}), ("eager", EAGER), ("flash", FLASH)):
        run(tiny, tmp_path / name, engine=engine, **keys)
    reference = losses(tmp_path / "sdpa")
    assert len(reference) == 20
    assert reference[-1] < reference[0] - 1
    for name in ("eager", "flash"):
        assert losses(tmp_path / name) == pytest.approx(reference, abs=1e-5)
        for ours, theirs in zip(lines(tmp_path / name), lines(tmp_path / "sdpa"), strict=True):
            assert ours.get("tokens") == theirs.get("tokens")
            assert ours.get("eval_loss", 0) == pytest.approx(theirs.get("eval_loss", 0), abs=1e-5)


@pytest.mark.parametrize(
    ("keys", "engine"),
    [
        pytest.param({}, {}, id="packed under a mask"),
        pytest.param({}, FLASH, id="packed for a varlen kernel"),
        pytest.param({"pad_to_sequence_len": True}, FLASH, id="padded to a fixed shape"),
        pytest.param({"sample_packing": False}, {}, id="one document a row"),
        pytest.param({"sample_packing": False, "batch_flattening": True}, FLASH, id="flattened"),
        pytest.param({"gradient_checkpointing": True}, {}, id="with gradient checkpointing"),
        pytest.param({"micro_batch_size": 7, "gradient_accumulation_steps": 40}, {},
                     id="accumulated over uneven batches"),
    ],
)  # fmt: skip
def test_the_loss_is_the_mean_over_all_trained_tokens(
    tiny: Path, tmp_path: Path, keys: dict[str, Any], engine: dict[str, Any]
) -> None:
    run(tiny, tmp_path, engine=engine, **{"max_steps": 1, "micro_batch_size": 200, **keys})
    assert losses(tmp_path)[0] == pytest.approx(
        true_loss(tiny / "model", validation=False), abs=1e-5
    )


@pytest.mark.parametrize(
    ("keys", "engine"),
    [
        pytest.param({"eval_batch_size": 1}, {}, id="row by row"),
        pytest.param({"eval_batch_size": 4}, {}, id="four rows at once"),
        pytest.param({"eval_batch_size": 4}, FLASH, id="four rows in one"),
        pytest.param({"eval_sample_packing": False}, {}, id="not packed"),
    ],
)
def test_the_evaluation_loss_does_not_depend_on_batches(
    tiny: Path, tmp_path: Path, keys: dict[str, Any], engine: dict[str, Any]
) -> None:
    result = run(tiny, tmp_path, engine=engine, max_steps=2, val_set_size=0.1, eval_steps=2, **keys)
    assert result.eval_loss == pytest.approx(true_loss(tmp_path, validation=True), abs=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_evaluation_is_packed_only_where_packing_was_proven(
    tiny: Path, tmp_path: Path, packed: bool
) -> None:
    run(
        tiny, tmp_path, max_steps=1, val_set_size=0.1, sample_packing=packed,
        eval_sample_packing=True,
    )  # fmt: skip
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["packing"]["eval"]["packed"] == packed
