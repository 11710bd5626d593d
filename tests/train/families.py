"""Train a tiny model of every causal type of transformers, with packed rows and without.

Each run is `attnimg train` itself, three steps in this process; `attnimg explain` reads the same
config. What came of it stands in docs/measured/families.json, which `make families` writes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from tiny_models import causal_types, tiny_config, tiny_model
from tiny_run import lines, sentences

RECORD = Path(__file__).parents[2] / "docs" / "measured" / "families.json"
ROWS: dict[str, dict[str, Any]] = {
    "unpacked": {"sample_packing": False},
    "packed": {"sample_packing": True},
}
# Packed rows of these may be as long as the field says, which is small in a tiny config.
CHANGES: dict[str, dict[str, Any]] = {
    **{name: {"index_topk": 64} for name in ("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4")},
    **{name: {"attention_chunk_size": 128} for name in ("llama4", "llama4_text")},
}
# What runs in this process: neither loads, trains nor leaves anything elsewhere.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def prepare(home: Path) -> None:
    """Write the data and a tokenizer with fewer tokens than the tiny models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = sentences(40, seed=3)
    (home / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=120, special_tokens=["<pad>", "<s>", "</s>"])
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(home / "tokenizer")


def outcome(home: Path, *, rows: str) -> dict[str, Any]:
    """Train one type once; return whether it trained, or what refused it.

    Returns:
        trains: the backend; or refused: the code, with what was found and whether weights were
        loaded before; or crashed: an exception that no part of attnimg raised. And explained: the
        codes of the errors that `attnimg explain` has for the same config.
    """
    values = values_of(home, rows=rows)
    file = home / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    found = _trained(file)
    if found.get("trains"):
        out = Path(values["output_dir"])
        losses = [line["loss"] for line in lines(out) if "loss" in line]
        receipt = json.loads((out / "receipt.json").read_text())
        found["trains"] = receipt["plan"]["chosen"]["backend"]
        if len(losses) != 3 or not all(map(math.isfinite, losses)):
            return {"crashed": f"losses {losses}"}
    return {**found, "explained": explained(file)}


def values_of(home: Path, *, rows: str) -> dict[str, Any]:
    """Return the config of a run of the model in a folder."""
    return {
        "base_model": str(home / "model"),
        "datasets": [{"path": str(home / "data.jsonl"), "type": "completion"}],
        "learning_rate": 1e-3,
        "sequence_len": 64,
        "micro_batch_size": 2,
        "max_steps": 3,
        "save_strategy": "no",
        "bf16": False,
        **ROWS[rows],
        "output_dir": str(home / "out" / rows),
    }


def _trained(file: Path) -> dict[str, Any]:
    from rich.console import Console

    from attnimg.cli.train import PrintedReport, train_file
    from attnimg.errors import AttnimgError
    from attnimg.train.distributed import StopFlag

    text = io.StringIO()
    console = Console(file=text, width=400)
    with _loading() as loaded, contextlib.redirect_stdout(io.StringIO()):
        try:
            train_file(str(file), (), report=PrintedReport(console), stop=StopFlag())
        except AttnimgError as error:
            said = error.why.splitlines()[0].removeprefix("found: ")
            return {"refused": error.code, "found": said, "before_weights": not loaded}
        except SystemExit:
            return {"refused": "config", "found": text.getvalue(), "before_weights": not loaded}
        except Exception as error:
            trace = traceback.extract_tb(error.__traceback__)
            place = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in trace[-4:]]
            return {"crashed": repr(error)[:300], "place": place, "loaded": bool(loaded)}
    return {"trains": True}


@contextlib.contextmanager
def _loading() -> Iterator[list[str]]:
    """Watch whether weights are loaded."""
    from attnimg.train import model as loading

    calls: list[str] = []
    load = loading._from_pretrained

    def watched(*args: Any, **options: Any) -> Any:
        calls.append("weights")
        return load(*args, **options)

    loading._from_pretrained = watched
    try:
        yield calls
    finally:
        loading._from_pretrained = load


def explained(file: Path) -> list[str]:
    """Return the codes of the errors that `attnimg explain` finds in a config."""
    from attnimg.cli.explain import explain

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        explain(str(file), settings=[], on=None, image=None, as_json_lines=True)
    return [error["code"] for error in json.loads(out.getvalue())["errors"]]


def variants(model_types: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the runs of each type: row of the record -> the type and its settings.

    A type that attends to both sides has a second row, for its decoders.
    """
    from attnimg.selection.model_types import read_causal_types

    two_sided = read_causal_types().two_sided
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in model_types:
        settings = {"is_decoder": False} if name in two_sided else CHANGES.get(name, {})
        found[name] = (name, settings)
        if name in two_sided:
            found[f"{name}, is_decoder: true"] = (name, {"is_decoder": True})
    return found


def write_config(folder: Path, model_type: str, settings: dict[str, Any]) -> None:
    """Write the config.json of a tiny model as it is published: of the whole model."""
    tiny_config(model_type, **settings).save_pretrained(folder)
    if "is_decoder" in settings:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def save_tiny(folder: Path, model_type: str, settings: dict[str, Any]) -> None:
    """Write a tiny checkpoint, with the tokenizer.

    Of a type that does not build, and of one that is no decoder, there is the config.json alone: it
    has to be refused before its weights are looked for.
    """
    from transformers import AutoModelForImageTextToText

    if settings.get("is_decoder") is not False:
        with contextlib.suppress(AssertionError):
            model, config = tiny_model(model_type, **settings), tiny_config(model_type, **settings)
            if model.config.model_type != config.model_type:  # of its text part alone
                model = AutoModelForImageTextToText.from_config(config)
            model.save_pretrained(folder)
    write_config(folder, model_type, settings)
    for file in (folder.parent / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def run(model_types: list[str], *, home: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train every type with packed rows and without, printing and yielding what comes of each."""
    prepare(home)
    rows = variants(model_types)
    for number, (name, (model_type, settings)) in enumerate(rows.items(), 1):
        began = time.monotonic()
        save_tiny(home / "model", model_type, settings)
        found = {kind: outcome(home, rows=kind) for kind in ROWS}
        shutil.rmtree(home / "model")
        shutil.rmtree(home / "out", ignore_errors=True)
        text = "; ".join(f"{kind}: {result}" for kind, result in found.items())
        seconds = time.monotonic() - began
        sys.stderr.write(f"{number}/{len(rows)} {name}, {seconds:.1f} s: {text}\n")
        yield name, found


def main() -> None:
    """Train the types that are named, or all, and put what came of each into the record."""
    from attnimg import pipeline

    os.environ.update(QUIET)
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--proofs", action="store_true", help="prove the kernels too, an hour")
    options = parser.parse_args()
    if not options.proofs:  # the kernels are the same for all, and tested elsewhere
        pipeline.verify_plan = lambda plan, task, report: (plan, ())
    keep = options.types and options.out.exists()
    types = json.loads(options.out.read_text())["types"] if keep else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, found in run(options.types or causal_types(), home=Path(folder)):
            types[name] = found
            record = {"transformers": metadata.version("transformers"),
                      "types": dict(sorted(types.items()))}  # fmt: skip
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
