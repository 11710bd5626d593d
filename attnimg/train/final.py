"""Leave the trained model in output_dir, as plain transformers or peft loads it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from attnimg.config.schema import Config
from attnimg.train import checkpoint as checkpoints
from attnimg.train.disk import writing
from attnimg.train.saved_model import correct_saved_config, restore_loaded_dtypes
from attnimg.train.towers import keep_processor

# What Trainer writes beside a model that only Trainer reads.
NOT_THE_MODEL = ("training_args.bin",)


def save_final(engine: Any, config: Config, folder: Path) -> list[Path]:
    """Write model and tokenizer aside, then move them into `folder` file by file.

    Args:
        engine: after training; every process calls this, since gathering weights is collective.
        config: the validated run.
        folder: output_dir.

    Returns:
        The files, weights first; empty on every process but the first.

    Raises:
        AttnimgError: the disk is full; the checkpoints are untouched (disk-full).
    """
    aside = folder / checkpoints.PARTIAL / "model"
    try:
        with writing(aside, kept="the checkpoints are kept"):
            restore_loaded_dtypes(engine.model)
            engine.save_model(str(aside))
            if not engine.is_world_process_zero():
                return []
            correct_saved_config(aside, engine.loaded_config)
            keep_processor(config, engine.loaded_config, aside)
            names = _move_into(folder, aside)
    finally:
        if engine.is_world_process_zero():
            shutil.rmtree(folder / checkpoints.PARTIAL, ignore_errors=True)
    return [folder / name for name in reversed(names)]


def _move_into(folder: Path, aside: Path) -> list[str]:
    """Move the finished files, weights last: a folder that has them is whole."""
    for name in NOT_THE_MODEL:
        (aside / name).unlink(missing_ok=True)
    checkpoints.open_to_others(aside)
    names = sorted((p.name for p in aside.iterdir()), key=lambda name: name.endswith("safetensors"))
    for name in names:
        (aside / name).replace(folder / name)
    return names
