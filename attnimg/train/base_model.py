"""Judge a base model by its config.json and the headers of its weights, before any is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Finding, Machine
from attnimg.task import model_file
from attnimg.train.causal import require_trainable
from attnimg.train.pickled_weights import require_safetensors
from attnimg.train.positions import judge_positions
from attnimg.train.quantized import judge_quantization, require_known_weights
from attnimg.train.towers import judge_towers


def judge_base_model(
    config: Config, raw: Mapping[str, Any], machine: Machine
) -> tuple[list[AttnimgError], list[Finding]]:
    """Return every error and warning on a base model, without its attention.

    Args:
        config: the validated run.
        raw: the model's config.json.
        machine: its packages count; None of them assumes that all are installed.

    Returns:
        The errors, each of which ends the run, and the warnings.
    """
    path = model_file(config)
    return judge_files(
        config, raw, packages=machine.packages, folder=path.parent if path is not None else None
    )


def judge_files(
    config: Config,
    raw: Mapping[str, Any],
    *,
    packages: Mapping[str, str] | None,
    folder: Path | None,
) -> tuple[list[AttnimgError], list[Finding]]:
    """Return the errors and warnings of judge_base_model.

    Args:
        config: the validated run.
        raw: the model's config.json.
        packages: the installed distributions; None assumes that all are.
        folder: the folder of its weights; None where they are not on this machine.
    """

    def known_weights() -> None:
        if folder is not None:
            local = Path(config.base_model or "").expanduser().is_dir()
            hub = None if local else config.base_model
            require_safetensors(folder, key="base_model", hub=hub)
            require_known_weights(config, folder, raw)

    checks: tuple[Callable[[], Finding | None], ...] = (
        lambda: require_trainable(config, raw, packages=packages),
        lambda: judge_quantization(config, raw, packages=packages),
        known_weights,
        lambda: judge_positions(config, raw),
        lambda: judge_towers(config, raw),
    )
    errors, warnings = [], []
    for check in checks:
        try:
            found = check()
        except AttnimgError as error:
            errors.append(error)
        else:
            warnings += [found] if found else []
    return errors, warnings
