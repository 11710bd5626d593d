"""AttnimgCallback applies a backend before the first step, and restores after the last one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import (
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig

import attnimg
from attnimg.integrations import transformers as integration
from attnimg.integrations.transformers import AttnimgCallback, read_settings


class Watch(TrainerCallback):
    """Record the attention that the model runs in each step; raise in a step if told to."""

    def __init__(self, *, raise_in=None):
        self.seen, self.raise_in = [], raise_in

    def on_step_end(self, args, state, control, *, model, **_):
        self.seen.append(model.config._attn_implementation)
        if state.global_step == self.raise_in:
            raise RuntimeError("the power failed")


def a_trainer(tmp_path, callbacks, *, model=None, collator=None, **options):
    documents = [{"input_ids": list(range(20, 40 + n)), "labels": list(range(20, 40 + n))}
                 for n in range(8)]  # fmt: skip
    options = {"per_device_train_batch_size": 2, "max_steps": 2} | options
    return Trainer(
        model=model or tiny_model("llama", "sdpa"),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        ),
        train_dataset=documents,
        data_collator=collator or DataCollatorWithFlattening(),
        callbacks=callbacks,
    )


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "PEFT"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True, "gradient_checkpointing": True}],
    ids=["float32", "autocast and checkpointing"],
)
def test_the_model_runs_the_choice_while_it_trains(wrap, options, tmp_path):
    model, watch = wrap(tiny_model("llama", "sdpa")), Watch()
    callback = AttnimgCallback(backend="eager")
    a_trainer(tmp_path, [callback, watch], model=model, **options).train()
    assert watch.seen == ["eager", "eager"]
    assert model.config._attn_implementation == "sdpa"
    assert callback.choice.backend == "eager"
    assert callback.choice.verified
    assert json.loads((tmp_path / "attnimg.json").read_text()) == json.loads(
        json.dumps(callback.choice.to_dict())
    )
    with pytest.raises(attnimg.AttnimgError, match="nothing to restore"):
        attnimg.restore(model)


def test_a_model_whose_documents_mix_is_not_trained(tmp_path):
    model, watch = tiny_model("opt", "eager"), Watch()
    with pytest.raises(attnimg.PackingLeak):
        a_trainer(tmp_path, [AttnimgCallback(backend="sdpa"), watch], model=model).train()
    assert watch.seen == []
    assert model.config._attn_implementation == "eager"
    assert not (tmp_path / "attnimg.json").exists()


def test_after_an_exception_training_starts_again(tmp_path):
    model, watch = tiny_model("llama", "sdpa"), Watch(raise_in=1)
    trainer = a_trainer(tmp_path, [AttnimgCallback(backend="eager"), watch], model=model)
    with pytest.raises(RuntimeError, match="the power failed"):
        trainer.train()
    assert model.config._attn_implementation == "eager"
    watch.raise_in = None
    trainer.train()
    assert watch.seen == ["eager"] * 3
    assert model.config._attn_implementation == "sdpa"


def test_rows_of_one_document_are_not_packed(tmp_path):
    callback = AttnimgCallback(backend="eager")
    rows = [{"input_ids": [5] * 9, "labels": [5] * 9}] * 4
    trainer = a_trainer(tmp_path, [callback], collator=default_data_collator)
    trainer.train_dataset = rows
    trainer.train()
    assert "one document per row" in str(callback.choice)


def test_an_argument_that_select_does_not_have_is_refused_at_once():
    with pytest.raises(TypeError, match="Did you mean 'sequence_len'"):
        AttnimgCallback(sequence_length=5)


SETTINGS = [
    pytest.param({"packing": True}, {"packing": True}, id="packing"),
    pytest.param({"packing": True, "packing_strategy": "wrapped"}, {"packing": False},
                 id="wrapped-rows-have-no-boundaries"),
    pytest.param({"padding_free": True, "max_length": None},
                 {"packing": True, "sequence_len": None}, id="padding-free"),
    pytest.param({"max_length": 77, "per_device_train_batch_size": 3},
                 {"packing": False, "sequence_len": 77, "micro_batch_size": 3}, id="sizes"),
    pytest.param({"bf16": True}, {"dtype": "bfloat16", "autocast": True}, id="bf16"),
    pytest.param({"bf16": False}, {"autocast": False}, id="the-weights-own-dtype"),
    pytest.param({"gradient_checkpointing": True}, {"checkpointing": True}, id="checkpointing"),
    pytest.param({"gradient_checkpointing": False, "torch_compile": True},
                 {"checkpointing": False, "compiled": True}, id="compiled"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), SETTINGS)
def test_settings_come_from_the_arguments_of_the_trainer(given, expected, tmp_path):
    settings = read_settings(SFTConfig(output_dir=str(tmp_path), use_cpu=True, **given))
    assert {name: settings.get(name) for name in expected} == expected
    assert ("dtype" in settings) is (given.get("bf16", True))


def test_weights_that_fsdp_has_split_are_refused(tmp_path, monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29533")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        whole = tiny_model("llama", "sdpa")
        integration._require_whole_weights(whole)
        split = fully_shard(whole, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(attnimg.AttnimgError, match="split between processes"):
            integration._require_whole_weights(split)
    finally:
        torch.distributed.destroy_process_group()


def test_weights_that_deepspeed_has_split_are_refused():
    model = tiny_model("llama", "sdpa")
    next(model.parameters()).ds_id = 1
    with pytest.raises(attnimg.AttnimgError, match="ZeRO-3"):
        integration._require_whole_weights(model)


IN_A_PROCESS = """
import os, sys
from pathlib import Path
from test_transformers import a_trainer
from attnimg.errors import AttnimgError
from attnimg.integrations.transformers import AttnimgCallback

rank = int(os.environ["RANK"])
trainer = a_trainer(Path(sys.argv[1]), [AttnimgCallback(backend=sys.argv[2 + rank])])
try:
    trainer.train()
    print(f"{rank} trained {type(trainer.model_wrapped).__name__} ", flush=True)
except AttnimgError as error:
    print(f"{rank} {error.code} {trainer.model.config._attn_implementation} ", flush=True)
"""


@pytest.mark.parametrize(
    ("backends", "printed"),
    [
        pytest.param(["eager", "eager"], ["0 trained DistributedDataParallel",
                     "1 trained DistributedDataParallel"], id="equal-choices"),
        pytest.param(["eager", "sage"], ["0 rank-mismatch sdpa", "1 rank-mismatch sdpa"],
                     id="an-error-in-one-process"),
    ],
)  # fmt: skip
def test_processes_must_choose_the_same(backends, printed, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(IN_A_PROCESS)
    tests = Path(__file__).parents[2]
    paths = [Path(__file__).parent, tests / "fixtures", tests.parent]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
         str(script), str(tmp_path / "out"), *backends],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    # The lines of two processes may be mixed.
    found = re.findall(r"[01] (?:trained|rank-mismatch) [A-Za-z]+", done.stdout)
    assert sorted(found) == printed, done.stderr
    assert (tmp_path / "out" / "attnimg.json").exists() is (backends[0] == backends[1])


@pytest.mark.parametrize("packing", [{"packing": False}, {}], ids=str)
def test_packing_that_is_denied_is_a_warning(packing, tmp_path, caplog):
    a_trainer(tmp_path, [AttnimgCallback(**packing)], max_steps=1).train()
    warned = "DataCollatorWithFlattening packs documents" in caplog.text
    assert warned is bool(packing)
