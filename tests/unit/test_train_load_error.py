"""Test the advice on a model that can't be loaded: another download only for damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import make_model

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.run_facts import RunContext
from attnimg.train.model import load_model, load_model_config
from attnimg.train.tokenizer import load_tokenizer

CONTEXT = RunContext(
    dtype="float32", autocast=None, packing=False, padding_free=False, rows=1, sequence_len=8,
    compiled=False, checkpointing=False, seq_idx=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading") / "model"
    make_model(folder)
    return folder


@pytest.mark.parametrize(
    ("edit", "do"),
    [
        pytest.param({}, None, id="a whole model loads"),
        pytest.param({"model_type": "nobody"}, "upgrade", id="a type that transformers lacks"),
        pytest.param({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
                     "set trust_remote_code: true", id="code of its own"),
        pytest.param({"num_attention_heads": 3}, "correct config.json", id="heads that do not fit"),
        pytest.param("cut", "download all files of the model again", id="a file cut off"),
    ],
)  # fmt: skip
def test_the_advice_fits_the_fault(
    model: Path, tmp_path: Path, edit: dict[str, object] | str, do: str | None
) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if isinstance(edit, dict):
        written = json.loads((model / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(written | edit))
    else:
        whole = (model / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:999])
    config = Config(base_model=str(tmp_path), learning_rate=1e-3)

    def load() -> None:
        load_model_config(config)
        load_model(
            config, tokenizer=load_tokenizer(config, log=lambda _: None), implementation="sdpa",
            context=CONTEXT, needs_dtype_cast=False,
        )  # fmt: skip

    if do is None:
        load()
        return
    with pytest.raises(AttnimgError) as caught:
        load()
    assert do in caught.value.do
