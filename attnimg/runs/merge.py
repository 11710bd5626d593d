"""Merge an adapter into its base model: load, merge and write shard by shard, compare logits.

The merged weights are written to a temporary folder. It gets its final name once the merged model,
loaded from its files, has the same logits as the adapter on its base model. Memory holds the base
model, one shard and, for a quantized base model, one dequantized layer.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, get_args

from attnimg.errors import AttnimgError
from attnimg.facts import DType
from attnimg.run_facts import RunContext
from attnimg.runs.folder import ADAPTER_CONFIG, CONFIG_BYTES, RunFolder, read_json
from attnimg.selection.model_types import find_quantization, quantization_method
from attnimg.train.checkpoint import flush, set_default_permissions, write_errors
from attnimg.train.model_files import (
    copy_processor_files,
    find_model_folder,
    list_tokenizer_files,
    most_common_dtype,
)
from attnimg.train.records import package_versions

if TYPE_CHECKING:
    import torch

    from attnimg.runs.logits import LogitsComparison

RECORD_FILE = "merge.json"

# In a folder that a merge has not finished. Folders without it are never removed.
_MARKER = ".attnimg-merge"

# Quantizations whose weights PEFT cannot dequantize.
# Source: peft 0.21.2, utils/integrations.py, dequantize_module_weight (2026-11-27).
_NOT_DEQUANTIZED = frozenset({"gptq", "awq", "aqlm"})

# Source: peft 0.21.2, utils/peft_types.py and PeftConfig.is_prompt_learning; the tuner of
# ADAPTION_PROMPT has no merge either (2026-11-27).
_WITHOUT_WEIGHTS = frozenset(
    {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT",
     "ADAPTION_PROMPT"}
)  # fmt: skip


class MergeReport(Protocol):
    """The interface to which a merge reports its progress."""

    def log(self, text: str) -> None:
        """Report one line."""

    def advance(self, task: str, done: int, total: int) -> None:
        """Report how much of a task is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """A merged model.

    Attributes:
        folder: the folder with the model.
        base_model: the base model, by the name in the config.
        adapter: the folder of the adapter.
        dtype: of its weights.
        dequantized: the quantization of the base model whose weights were dequantized; None if it
            is not quantized.
        size: number of bytes of its weights.
        files: the written files, weights first.
        logits: the comparison with the adapter's logits.
        seconds: how long the merge took.
    """

    folder: Path
    base_model: str
    adapter: Path
    dtype: str
    dequantized: str | None
    size: int
    files: tuple[str, ...]
    logits: LogitsComparison
    seconds: float


def merge(
    run: RunFolder, *, output: Path, dtype: str | None, shard_bytes: int, report: MergeReport
) -> Merged:
    """Merge a run's adapter into its base model, and write the merged model.

    Args:
        run: as `find_run` returns it.
        output: a folder that does not exist, or is empty.
        dtype: of the merged weights; None for that of the base model's files.
        shard_bytes: the largest size of a weight file.
        report: receives the progress.

    Raises:
        AttnimgError: the run has no adapter (nothing-to-merge), it can't be merged (not-mergeable),
            the output folder is in use (output-dir-not-empty), the disk is full (disk-full), or the
            merged model differs from the adapter (merge-differs); nothing is left in `output`.
    """
    began = time.monotonic()
    stored = _require_mergeable(run)
    output = _require_free_name(output)
    saved = _choose_dtype(run, dtype, quantized=stored is not None)
    with _staging_folder(output) as staging:
        with write_errors(staging, kept="nothing was merged", do="free space, and run it again"):
            adapter, base, shape = _write_merged(
                run, staging, dtype=saved, shard_bytes=shard_bytes, report=report
            )
            gc.collect()
            _copy_other_files(run, staging, shape)
        report.log("comparing the logits of the merged model with the adapter's")
        found = _compare(run, staging, dtype=saved, adapter=adapter, base=base, stored=stored)
        if not found.agrees:
            raise _differs(found, dtype=saved)
        weights = sorted(path.name for path in staging.glob("*.safetensors"))
        result = Merged(
            folder=output,
            base_model=str(run.config.base_model),
            adapter=run.folder,
            dtype=saved,
            dequantized=stored,
            size=sum((staging / name).stat().st_size for name in weights),
            files=(*weights, *_other_names(staging, weights), RECORD_FILE),
            logits=found,
            seconds=round(time.monotonic() - began, 1),
        )  # fmt: skip
        with write_errors(staging, kept="nothing was merged", do="free space, and run it again"):
            _write_record(staging / RECORD_FILE, result)
            set_default_permissions(staging)
            for path in (*staging.iterdir(), staging):
                flush(path)
            _require_free_name(output)
            if output.is_dir():
                output.rmdir()
            staging.rename(output)
            (output / _MARKER).unlink()
    return result


def _other_names(staging: Path, weights: list[str]) -> list[str]:
    """Return the names of the merged model's files that are not weights."""
    names = {path.name for path in staging.iterdir()}
    return sorted(names - {*weights, _MARKER})


def _require_mergeable(run: RunFolder) -> str | None:
    """Return the quantization of the base model, None without one; raise if it can't be merged."""
    config = run.config
    if run.kind == "model":
        raise AttnimgError(
            f"{run.folder} has no adapter to merge",
            why="it has a whole model: all weights were trained, or the adapter is merged",
            do=f"use {run.folder} as it is, with from_pretrained",
            code="nothing-to-merge",
        )
    if config.reinit_weights:
        raise _not_mergeable(
            "its base model has random weights (reinit_weights), which were not saved",
            do="train again without reinit_weights, or without an adapter",
        )
    if config.quantize_moe_experts:
        raise _not_mergeable(
            "quantize_moe_experts quantized the base model's experts, which PEFT cannot dequantize",
            do=f"load {config.base_model} and the adapter with PEFT, without merging",
        )
    adapter = read_json(run.folder / ADAPTER_CONFIG, CONFIG_BYTES)
    if (kind := str(adapter.get("peft_type"))) in _WITHOUT_WEIGHTS:
        raise _not_mergeable(
            f"its peft_type {kind} adds vectors to the input, and changes no weight",
            do=f"load {config.base_model} and the adapter with PEFT, without merging",
        )
    if adapter.get("layer_replication"):
        raise _not_mergeable(
            "its layer_replication uses the weights of a layer several times, with other adapters",
            do=f"load {config.base_model} and the adapter with PEFT, without merging",
        )
    folder = find_model_folder(config.base_model, config, containing="config.json")
    raw = read_json(folder / "config.json", CONFIG_BYTES) if folder else {}
    stored = find_quantization(raw)
    method = quantization_method(stored) if stored is not None else None
    if method in _NOT_DEQUANTIZED:
        raise _not_mergeable(
            f"its base model is quantized by {method}, which PEFT cannot dequantize",
            do=f"load {config.base_model} and the adapter with PEFT, without merging",
        )
    if config.load_in_8bit:
        return "bitsandbytes_8bit"
    return "bitsandbytes_4bit" if config.load_in_4bit or config.adapter == "qlora" else method


def _not_mergeable(why: str, *, do: str) -> AttnimgError:
    what = "the adapter can't be merged into its base model"
    return AttnimgError(what, why=why, do=do, code="not-mergeable")


def _require_free_name(output: Path) -> Path:
    """Return the absolute path of the output, without symbolic links.

    Raises:
        AttnimgError: it is a file or a folder with files (output-dir-not-empty), or an empty folder
            that can't be replaced (output-dir).
    """
    if not os.path.lexists(output):
        return Path(os.path.realpath(output))
    names = sorted(entry.name for entry in output.iterdir()) if output.is_dir() else []
    if names or not output.is_dir():
        merged = f"; its {RECORD_FILE} is from an earlier merge" if RECORD_FILE in names else ""
        raise AttnimgError(
            f"{output} is in use",
            why=f"found {', '.join(names[:4])}{merged}; it is not overwritten"
            if names
            else "found a file, needed a folder that does not exist",
            do="remove it, or pass --output with another folder",
            code="output-dir-not-empty",
        )
    real = Path(os.path.realpath(output))
    if os.path.ismount(real) or real == Path.cwd():
        found = "a mount point" if os.path.ismount(real) else "the current folder"
        raise AttnimgError(
            f"{output} can't be replaced by the merged model",
            why=f"found {found}; the merge writes a folder beside it, and renames that at the end",
            do=f"pass --output {output / 'merged'}",
            code="output-dir",
        )
    return real


def _choose_dtype(run: RunFolder, dtype: str | None, *, quantized: bool) -> DType:
    """Return the dtype of the merged weights.

    Weights of a quantized base model have the precision in which training dequantized them.
    """
    allowed = get_args(DType)
    if dtype is not None:
        return cast("DType", dtype)
    trained = (run.receipt or {}).get("dtype")
    if quantized and trained in allowed:
        return cast("DType", trained)
    folder = find_model_folder(run.config.base_model, run.config, containing="config.json")
    found = most_common_dtype(folder) if folder else None
    return cast("DType", found) if found in allowed else "float32"


@contextmanager
def _staging_folder(output: Path) -> Iterator[Path]:
    """Create and lock the folder in which a merge is written; remove it if the block raises.

    Raises:
        AttnimgError: another merge writes to `output` (output-dir-busy), or no folder can be
            created beside it (output-dir).
    """
    prefix = f".{output.name}.partial-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output, prefix)
        # mkdtemp would make a folder that only this user may read.
        staging = output.with_name(prefix + secrets.token_hex(4))
        staging.mkdir()
        handle = _lock(staging)
    except OSError as error:
        raise AttnimgError(
            f"{output} can't be written",
            why=f"{error.filename or output.parent}: {error.strerror}",
            do="pass --output with a folder that this user may write to",
            code="output-dir",
        ) from error
    try:
        # Locked before it is marked: a marked folder without a lock is a leftover.
        (staging / _MARKER).touch()
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _remove_leftovers(output: Path, prefix: str) -> None:
    """Remove the folders of merges that were killed.

    Raises:
        AttnimgError: another merge writes to one of them (output-dir-busy).
    """
    for path in output.parent.iterdir():
        if not path.name.startswith(prefix) or path.is_symlink() or not (path / _MARKER).is_file():
            continue
        try:
            handle = _lock(path)
        except BlockingIOError:
            raise AttnimgError(
                f"another merge writes to {output}",
                why=f"{path} is locked by it",
                do="wait for it, or pass --output with another folder",
                code="output-dir-busy",
            ) from None
        try:
            shutil.rmtree(path)
        finally:
            os.close(handle)


def _lock(folder: Path) -> int:
    """Return a locked file descriptor of a folder; BlockingIOError if another process has it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _write_merged(
    run: RunFolder, folder: Path, *, dtype: DType, shard_bytes: int, report: MergeReport
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Write config and merged weights.

    Returns:
        The logits with the adapter, those without, and the config as a dictionary.
    """
    from attnimg.runs.logits import compute_logits, sample_ids
    from attnimg.runs.merged_weights import Shards, merge_weights, why_not_mergeable
    from attnimg.runs.weights import load_trained
    from attnimg.train.tokenizer import load_tokenizer

    config = run.loading_config
    _require_space(run, folder, dtype=dtype)
    report.log(f"loading {config.base_model} and the adapter in {run.folder}")
    trained = (run.receipt or {}).get("dtype")
    loaded = trained if _is_quantized_by_run(run) and trained in get_args(DType) else dtype
    model = load_trained(
        run,
        tokens=len(load_tokenizer(config, log=lambda _: None)),
        implementation="eager",
        context=_plain_context(cast("DType", loaded)),
        needs_dtype_cast=False,
        log=report.log,
    )
    if (why := why_not_mergeable(model)) is not None:
        raise _not_mergeable(
            why, do=f"load {config.base_model} and the adapter with PEFT, without merging"
        )
    ids = sample_ids(len(model.get_input_embeddings().weight))
    adapter = compute_logits(model, ids)
    with model.disable_adapter():
        base = compute_logits(model, ids)
    shards = Shards(folder, shard_bytes)
    merged = merge_weights(model, dtype=dtype)
    total = sum(_count_bytes(tensor, dtype) for tensor in merged.model.state_dict().values())
    for name, tensor in merged.tensors():
        shards.add(name, tensor)
        report.advance("merging", min(shards.written, total), total)
    shards.finish()
    report.advance("merging", total, total)
    return adapter, base, _write_config(merged.model, folder, dtype=dtype)


def _is_quantized_by_run(run: RunFolder) -> bool:
    """Return whether bitsandbytes quantizes the base model while it is loaded."""
    config = run.config
    return bool(config.load_in_4bit or config.load_in_8bit or config.adapter == "qlora")


def _plain_context(dtype: DType) -> RunContext:
    """Return the context of calls with plain rows, without autocast."""
    from attnimg.runs.logits import ROWS, TOKENS

    return RunContext(
        dtype=dtype, autocast=None, packing=False, padding_free=False, rows=ROWS,
        sequence_len=TOKENS, compiled=False, checkpointing=False, seq_idx=False,
    )  # fmt: skip


def _require_space(run: RunFolder, folder: Path, *, dtype: DType) -> None:
    """Raise if the merged weights do not fit on the disk.

    Raises:
        AttnimgError: code disk-full.
    """
    from attnimg.train.model import load_without_weights

    model = load_without_weights(run.config)
    if model is None:
        return
    needed = sum(_count_bytes(tensor, dtype) for tensor in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise AttnimgError(
            "the disk has too little space for the merged model",
            why=f"found {size_text(free)} free in {folder.parent}; needed {size_text(needed)} "
            f"for its weights in {dtype}",
            do="free space, or pass --output with a folder on another disk",
            code="disk-full",
        )


def size_text(size: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _count_bytes(tensor: Any, dtype: DType) -> int:
    import torch

    floating = tensor.is_floating_point()
    size = getattr(torch, dtype).itemsize if floating else tensor.element_size()
    return int(tensor.numel() * size)


def _write_config(model: Any, folder: Path, *, dtype: DType) -> dict[str, Any]:
    """Write the config.json of a merged model; return its content."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    content: dict[str, Any] = config.to_dict()
    return content


def _copy_other_files(run: RunFolder, folder: Path, shape: Any) -> None:
    """Copy tokenizer, chat template, generation config, processor and the model's own code."""
    config = run.config
    base = find_model_folder(config.base_model, config, containing="config.json")
    assert base is not None
    named = config.tokenizer_config
    own = run.folder if (run.folder / "tokenizer_config.json").is_file() else base
    if own is base and named:
        own = find_model_folder(named, config, containing="tokenizer_config.json") or base
    for path in list_tokenizer_files(own):
        target = folder / path.relative_to(own)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    for path in (base / "generation_config.json", *base.glob("*.py")):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    copy_processor_files(config, shape, folder)


def _compare(
    run: RunFolder,
    folder: Path,
    *,
    dtype: DType,
    adapter: torch.Tensor,
    base: torch.Tensor,
    stored: str | None,
) -> LogitsComparison:
    """Load the merged model from its files, and compare its logits."""
    from attnimg.runs.logits import (
        TOLERANCE_8BIT,
        TOLERANCES,
        compare_logits,
        compute_logits,
        sample_ids,
    )
    from attnimg.train.model import load_base

    changes = {"base_model": str(folder), "tokenizer_config": None, "lora_modules_to_save": None}
    config = run.loading_config.model_copy(update=changes)
    cleared = RunFolder(folder=folder, kind="model", config=config, receipt=None).loading_config
    cleared = cleared.model_copy(update={"adapter": None, "bnb_config_kwargs": None})
    model = load_base(cleared, tokens=0, implementation="eager", dtype=dtype).eval()
    ids = sample_ids(len(model.get_input_embeddings().weight))
    tolerance = TOLERANCES[dtype]
    if stored == "bitsandbytes_8bit":
        tolerance = max(tolerance, TOLERANCE_8BIT)
    merged = compute_logits(model, ids)
    return compare_logits(merged, adapter=adapter, base=base, tolerance=tolerance)


def _differs(found: LogitsComparison, *, dtype: str) -> AttnimgError:
    """Return the error for a merged model that does not compute what the adapter computes."""
    why = f"the logits of {found.tokens} tokens differ by {found.difference:.1e} (relative); "
    why += f"allowed {found.tolerance:.0e} with weights in {dtype}"
    if found.kept is not None:
        why += (
            f"\nthe merged model has {found.kept:.0%} of the adapter's effect; needed 90 to 110 %"
        )
    finer = dtype != "float32"
    return AttnimgError(
        "the merged model differs from the adapter on its base model, and was removed",
        why=why,
        do=f"pass --dtype float32: {dtype} rounds the merged weights"
        if finer
        else "use the adapter without merging it, and report this to attnimg",
        code="merge-differs",
        exit_code=1,
    )


def _write_record(path: Path, result: Merged) -> None:
    """Write the record of a merge: what was merged, and how much the logits differ."""
    values = asdict(result) | {"folder": None, "adapter": str(result.adapter)}
    del values["folder"]
    values["versions"] = package_versions()
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
