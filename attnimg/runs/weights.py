"""Load the trained weights of a run as it trained them: base model, adapter, tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from attnimg.run_facts import RunContext
from attnimg.runs.folder import RunFolder
from attnimg.train.lora import freeze_other_parts
from attnimg.train.model import (
    cast_embeddings_and_norms,
    keeps_float32,
    load_base,
    move_to_gpu,
)


def load_trained(
    run: RunFolder,
    *,
    tokens: int,
    implementation: str,
    context: RunContext,
    needs_dtype_cast: bool,
    trainable: bool = False,
    log: Callable[[str], None] | None = None,
) -> Any:
    """Load a run's weights in evaluation mode, in the precision of training.

    Args:
        run: as `find_run` returns it.
        tokens: the number of tokens in the tokenizer.
        implementation: transformers' name of an attention.
        context: how the model will be called; decides the precision of the weights.
        needs_dtype_cast: whether the backend takes q, k, v in that precision only.
        trainable: whether the adapter's weights have gradients.
        log: prints a line.

    Returns:
        A transformers model, or a PEFT model around it.

    Raises:
        AttnimgError: the weights can't be loaded (bad-model), or the adapter does not fit
            (damaged-run).
    """
    config = run.loading_config
    model = load_base(
        config, tokens=tokens, implementation=implementation, dtype=context.dtype, log=log
    )
    if keeps_float32(config, context=context, needs_dtype_cast=needs_dtype_cast):
        cast_embeddings_and_norms(model)
    if run.kind == "adapter":
        freeze_other_parts(model)
        model = load_adapter(model, run.folder, trainable=trainable)
    move_to_gpu(model, config)
    return model.eval()


def load_adapter(model: Any, folder: Path, *, trainable: bool) -> Any:
    """Return a PEFT model with the adapter of a folder on a base model.

    Raises:
        AttnimgError: the adapter does not fit the model, or has another number of weights.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _does_not_fit(folder, why=" ".join(str(error).split())[:400]) from error
    texts = [str(warning.message) for warning in raised]
    if missing := [text for text in texts if "missing adapter keys" in text]:
        raise _does_not_fit(folder, why=" ".join(missing[0].split())[:400])
    return adapted


def _does_not_fit(folder: Path, *, why: str) -> AttnimgError:
    return AttnimgError(
        f"the adapter in {folder} does not fit its base model",
        why=why,
        do="pass --base-model with the folder of the model that the adapter was trained on",
        code="damaged-run",
    )
