"""Find trained weights by a run's folder, a checkpoint in it, or the run's config.

Folders that other programs wrote are accepted too: a PEFT adapter that names its base model, or a
whole model. They have no receipt, so their training config is not known.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from attnimg import config as configs
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.files import read_regular
from attnimg.selection.model_config import may_be_path, missing_folder
from attnimg.train.check import require_unlocked
from attnimg.train.checkpoint import is_checkpoint_name, list_checkpoints
from attnimg.train.intact import find_damage, find_newest_intact
from attnimg.train.model_files import check_safetensors, hash_model, list_weight_files
from attnimg.train.records import RECEIPT_FILE

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys that change the base model; full fine-tuning saves the changed config and weights.
_APPLIED_KEYS = (
    "revision_of_model", "overrides_of_model_config", "reinit_weights", "unfrozen_parameters",
    "model_quantization_config", "model_quantization_config_kwargs", "load_in_4bit", "load_in_8bit",
    "resize_token_embeddings_to_32x", "shrink_embeddings",
)  # fmt: skip

# Keys of training that a finished run does not need, with values that turn them off.
WITHOUT_TRAINING: dict[str, Any] = {
    "learning_rate": 1.0, "optimizer": "adamw_torch", "lr_scheduler": "constant",
    "save_strategy": "no", "eval_strategy": "no", "attn_check_steps": 0,
    **dict.fromkeys(
        ("lr_scheduler_kwargs", "cosine_min_lr_ratio", "eta_min", "gradient_checkpointing",
         "activation_offloading", "torch_compile", "eval_steps", "evals_per_epoch", "save_steps",
         "saves_per_epoch", "load_best_model_at_end", "early_stopping_patience", "fsdp",
         "fsdp_config", "deepspeed", "hub_model_id", "neftune_noise_alpha", "liger_rope",
         "liger_rms_norm", "liger_glu_activation", "liger_swiglu", "liger_layer_norm")
    ),
}  # fmt: skip

# The largest files that are read, in bytes; a receipt is large because it has the run's proofs.
_RECEIPT_BYTES, CONFIG_BYTES = 256 << 20, 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """Trained weights, and what is known about the run that trained them.

    Attributes:
        folder: the folder with the weights: output_dir, a checkpoint, or that of another program.
        kind: "adapter" if the folder has an adapter, "model" if it has a whole model.
        config: the run's config as it was trained, with the base model to use now; of another
            program's folder, only base_model and adapter are known.
        receipt: the content of receipt.json; None for another program's folder.
        checkpoints: the complete checkpoints in output_dir, lowest step first.
        notes: what the user should know about the folder.
    """

    folder: Path
    kind: Literal["adapter", "model"]
    config: Config
    receipt: Mapping[str, Any] | None
    checkpoints: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def loading_config(self) -> Config:
        """Return the config that loads the weights in one process, with the folder's tokenizer."""
        changes: dict[str, Any] = dict.fromkeys(("fsdp", "fsdp_config", "deepspeed"))
        if (self.folder / "tokenizer_config.json").is_file():
            changes["tokenizer_config"] = str(self.folder)
        if self.kind == "model":
            changes |= dict.fromkeys(_APPLIED_KEYS) | {"base_model": str(self.folder)}
        return self.config.model_copy(update=changes)


def find_run(argument: str, *, command: str, base_model: str | None = None) -> RunFolder:
    """Return the trained weights that an argument names, after checking their files.

    Args:
        argument: a folder, or the config file of a run.
        command: the command that gets the argument, for advice.
        base_model: the folder or hub name of the base model, if it is not where it was in training.

    Raises:
        AttnimgError: there is no such run (no-run), it is not finished (run-not-finished), its
            files are damaged (damaged-run), or its base model is missing or differs
            (base-model-differs).
    """
    config, folder = locate(argument)
    run = _read_folder(folder, argument=argument, command=command, written=config)
    if base_model is not None:
        run = replace(run, config=run.config.model_copy(update={"base_model": base_model}))
    _require_weights(run)
    if run.kind == "adapter":
        require_base(run, command=command)
    return run


def locate(argument: str) -> tuple[Config | None, Path]:
    """Return the config and the output_dir of a config file; of a folder, None and the folder.

    Raises:
        AttnimgError: there is no such file or folder (no-run), or the config has an error.
    """
    path = Path(argument).expanduser()
    if path.is_dir():
        # "." and ".." do not have the name of a checkpoint.
        return None, path if path.name not in ("", "..") else path.resolve()
    if not path.exists():
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        raise _no_run(
            f"there is no folder or config {argument}",
            why=f"looked for {path.absolute()}",
            do=f"correct the path: {path.parent / near[0]} exists"
            if near
            else "correct the path; a relative path starts at the current folder",
        )
    checked = configs.check_file(argument)
    for error in checked.errors:
        raise AttnimgError(error.what, why=error.why, do=error.do, code=error.code, key=error.key)
    assert checked.config is not None
    return checked.config, Path(checked.config.output_dir).expanduser()


def has_receipt(folder: Path) -> bool:
    """Return whether a folder is the output_dir of a run."""
    return (folder / RECEIPT_FILE).is_file()


def _read_folder(folder: Path, *, argument: str, command: str, written: Config | None) -> RunFolder:
    """Return what is known of a folder, from its receipt or from that of the run around it."""
    is_checkpoint = is_checkpoint_name(folder.name)
    if is_checkpoint and not has_receipt(folder):
        _require_intact(folder)
    if has_receipt(folder):
        receipt = _read_receipt(folder)
        _require_finished(folder, receipt, command=command)
        return _of_run(folder, receipt, checkpoints=list_checkpoints(folder))
    if written is None and is_checkpoint and has_receipt(folder.parent):
        receipt = _read_receipt(folder.parent)
        return _of_run(folder, receipt, checkpoints=list_checkpoints(folder.parent))
    if written is not None:
        exists = f"{folder} has no {RECEIPT_FILE}" if folder.is_dir() else f"{folder} is missing"
        raise _no_run(
            f"{argument} has not been trained",
            why=f"found output_dir {written.output_dir}: {exists}",
            do=f"run attnimg train {argument}",
        )
    return _of_other_program(folder)


def _of_run(folder: Path, receipt: Mapping[str, Any], *, checkpoints: list[Path]) -> RunFolder:
    """Return the weights in a run's folder, with the config in its receipt."""
    try:
        config = Config.model_validate(receipt["config"])
    except (KeyError, ValidationError) as error:
        text = str(error).splitlines()
        raise AttnimgError(
            f"the receipt of {folder} can't be used",
            why=f"this version of attnimg does not accept its config: {' '.join(text[:3])}",
            do="use the version of attnimg in the receipt's versions.attnimg",
            code="damaged-run",
        ) from error
    return RunFolder(
        folder=folder,
        kind="adapter" if config.adapter else "model",
        config=config,
        receipt=receipt,
        checkpoints=tuple(checkpoints),
    )


def _of_other_program(folder: Path) -> RunFolder:
    """Return the weights in a folder without a receipt: a PEFT adapter, or a model."""
    note = f"{folder} has no {RECEIPT_FILE}: its training config is unknown"
    if (folder / ADAPTER_CONFIG).is_file():
        settings = read_json(folder / ADAPTER_CONFIG, CONFIG_BYTES)
        base, saved = settings.get("base_model_name_or_path"), settings.get("modules_to_save")
        config = Config(
            base_model=base if isinstance(base, str) and base else None,
            adapter="lora",
            lora_modules_to_save=saved if isinstance(saved, list) and saved else None,
        )
        return RunFolder(folder=folder, kind="adapter", config=config, receipt=None, notes=(note,))
    if (folder / "config.json").is_file():
        config = Config(base_model=str(folder))
        return RunFolder(folder=folder, kind="model", config=config, receipt=None, notes=(note,))
    found = list_checkpoints(folder)
    raise _no_run(
        f"{folder} has no trained model",
        why=f"found {', '.join(_names(folder)[:6]) or 'nothing'}\n"
        f"needed {RECEIPT_FILE} of a run, {ADAPTER_CONFIG} or config.json",
        do=f"name a checkpoint: {found[-1]}" if found else "name the output_dir of a run",
    )


def _require_finished(folder: Path, receipt: Mapping[str, Any], *, command: str) -> None:
    """Raise unless a run has ended with a trained model; name its newest intact checkpoint."""
    status = receipt.get("status")
    if status == "done":
        return
    if status == "running":
        require_unlocked(folder)
        status = "killed"
    newest, damaged = find_newest_intact(list_checkpoints(folder))
    found = "no checkpoint" if newest is None else f"{newest.name}, the newest intact checkpoint"
    broken = f"; {', '.join(path.name for path in damaged)} damaged" if damaged else ""
    raise AttnimgError(
        f"the run in {folder} is not finished",
        why=f"found status {status} in its {RECEIPT_FILE}, and {found}{broken}",
        do=f"run attnimg {command} {newest}\nor finish it with attnimg train CONFIG "
        "resume_from_checkpoint=true"
        if newest
        else "train it again",
        code="run-not-finished",
    )


def _require_intact(checkpoint: Path) -> None:
    """Raise if any file of a checkpoint is damaged, also its receipt or the optimizer's state."""
    if damage := find_damage(checkpoint):
        others = [path for path in list_checkpoints(checkpoint.parent) if path != checkpoint]
        newest, _ = find_newest_intact(others)
        raise AttnimgError(
            f"{checkpoint} is damaged",
            why="\n".join(damage[:8]),
            do=f"use {newest}, the newest intact one"
            if newest
            else f"copy {checkpoint.name} again from where it was written",
            code="damaged-checkpoint",
        )


def _require_weights(run: RunFolder) -> None:
    """Raise if weights are missing, cut off, or differ in kind from what the run trained."""
    folder = run.folder
    files = [folder / ADAPTER_WEIGHTS] if run.kind == "adapter" else list_weight_files(folder)
    needed = ADAPTER_CONFIG if run.kind == "adapter" else "config.json"
    listed = {Path(name).name for name in (run.receipt or {}).get("files") or ()}
    if folder.name.startswith("checkpoint-"):
        listed = set()
    names = {path.name for path in files} | {needed}
    names |= {name for name in listed if name.endswith(".safetensors")}
    damage = [f"{name}: it is missing" for name in sorted(names) if not (folder / name).exists()]
    for file in files:
        if file.exists():
            damage += [f"{file.name}: {text}" for text in check_safetensors(file)]
    if not files:
        damage.append("found no weights in safetensors")
    if damage:
        raise AttnimgError(
            f"the trained weights in {folder} are damaged",
            why="\n".join(damage[:8]),
            do=f"use the checkpoint {run.checkpoints[-1]}, or copy the folder again"
            if run.checkpoints and run.checkpoints[-1] != folder
            else "copy the folder again from where it was written",
            code="damaged-run",
        )


def require_base(run: RunFolder, *, command: str) -> None:
    """Raise unless the base model of a run is on this machine, unchanged since training.

    find_run checks it for an adapter; of a whole model, only some commands need the base model.

    Raises:
        AttnimgError: code base-model-differs.
    """
    base = run.config.base_model
    now = hash_model(run.config) if base else None
    identity = (run.receipt or {}).get("identity") or {}
    before = identity.get("model")
    do = f"run attnimg {command} with --base-model and the folder of the model"
    if now is None:
        is_hub = base is not None and missing_folder(base) is None
        download = f"run hf download {base}"
        if is_hub and may_be_path(str(base)):
            do += f"; if {base} is a name on the hub, {download}"
        elif is_hub:
            do = f"{download}, or {do[4:]}"
        raise AttnimgError(
            f"the base model of {run.folder} is not on this machine",
            why=f"looked for {base or 'nothing: ' + ADAPTER_CONFIG + ' names no base model'}; "
            "needed config.json and all weights",
            do=do,
            code="base-model-differs",
            key="base_model",
        )
    if before is None:
        return
    files = before["files"]
    changed = sorted(
        name
        for name in files.keys() | now["files"].keys()
        if files.get(name) != now["files"].get(name)
    )
    if changed:
        texts = [
            f"{name}: found SHA-256 {now['files'].get(name, 'missing')[:12]}, needed "
            f"{files.get(name, 'missing')[:12]}"
            for name in changed[:4]
        ]
        raise AttnimgError(
            f"{base} is not the base model of {run.folder}",
            why="\n".join(texts),
            do=do,
            code="base-model-differs",
            key="base_model",
        )


def _read_receipt(folder: Path) -> Mapping[str, Any]:
    """Return a run's receipt.

    Raises:
        AttnimgError: it can't be read, or a value of it has another type (damaged-run).
    """
    path = folder / RECEIPT_FILE
    receipt = read_json(path, _RECEIPT_BYTES)
    try:
        _Receipt.model_validate(receipt, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(map(str, found["loc"]))
        raise _unreadable(path, why=f"{place}: {found['msg']}") from error
    return receipt


class _Model(BaseModel):
    """The base model in a receipt."""

    files: dict[str, str]


class _Identity(BaseModel):
    """What a receipt's identity must have, where it is present."""

    model: _Model | None = None


class _Source(BaseModel):
    """A data set in a receipt."""

    key: str
    path: str | None = None


class _Receipt(BaseModel):
    """The values of a receipt that are read, other than its config."""

    status: str | None = None
    dtype: str | None = None
    identity: _Identity | None = None
    files: list[str] | None = None
    data: list[_Source] | None = None


def read_json(path: Path, at_most: int) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        AttnimgError: code damaged-run.
    """
    try:
        content = json.loads(read_regular(path, at_most=at_most))
        if not isinstance(content, dict):
            raise ValueError(f"found a JSON {type(content).__name__}, needed an object")
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, why=getattr(error, "strerror", None) or str(error)[:200]) from error
    return content


def _unreadable(path: Path, *, why: str) -> AttnimgError:
    return AttnimgError(
        f"{path} can't be read",
        why=why,
        do="copy the folder again from where it was written",
        code="damaged-run",
    )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def _no_run(what: str, *, why: str, do: str) -> AttnimgError:
    return AttnimgError(what, why=why, do=do, code="no-run")
