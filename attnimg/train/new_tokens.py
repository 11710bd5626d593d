"""Refuse tokens that an adapter would leave untrained: they have no row in the embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.lora_targets import untrained_embeddings
from attnimg.train.model import load_model_config, load_without_weights


def vocabulary(config: Config) -> int:
    """Return vocab_size of config.json, the least that the embeddings hold; 0 without one."""
    try:
        return int(load_model_config(config).get_text_config().vocab_size)
    except (AttributeError, ValueError):  # no such field, or several text models
        return 0


def embedding_count(config: Config) -> int:
    """Return how many rows the model's embeddings have."""
    model = load_without_weights(config)
    return vocabulary(config) if model is None else len(model.get_input_embeddings().weight)


def untrained(config: Config) -> list[str]:
    """Return the embeddings that lora_modules_to_save lacks for new tokens to be trained."""
    if not config.adapter:
        return []
    model = load_without_weights(config)
    if model is None:
        return [] if config.lora_modules_to_save else ["embed_tokens", "lm_head"]
    return untrained_embeddings(model, config)


def may_add_pad_token(config: Config, tokenizer: Any, wanted: str) -> bool:
    """Return whether a pad token may be added to the tokenizer.

    Padding has no loss and is not attended to, so an existing token can pad as well. With a new row
    for it, the adapter would load only on a base model whose embeddings were resized first.
    """
    if not config.adapter or wanted in tokenizer.get_vocab():
        return True
    if len(tokenizer) < vocabulary(config):
        return True
    return len(tokenizer) < embedding_count(config) or not untrained(config)


def has_embedding(config: Config, token_id: int | None) -> bool:
    """Return whether the trained model will have an embedding for a token."""
    if token_id is None or not config.adapter:
        return token_id is not None
    if token_id < vocabulary(config):
        return True
    return token_id < embedding_count(config) or not untrained(config)


def require_trained_tokens(config: Config, added: Iterable[str]) -> None:
    """Raise where an adapter would leave the embeddings of new tokens untrained.

    Raises:
        AttnimgError: code bad-value, with the modules to save.
    """
    tokens = sorted(added)
    if tokens and (lacking := untrained(config)):
        raise _untrained(
            config, tokens, lacking, f"{len(tokens)} new token(s) would never be trained"
        )


def require_embeddings(config: Config, splits: Iterable[Any], tokenizer: Any) -> None:
    """Raise where documents have tokens without an embedding, and the adapter adds none.

    Args:
        config: the validated run.
        splits: datasets with a column input_ids; None for one that the run does not have.
        tokenizer: as `load_tokenizer` returns it.

    Raises:
        AttnimgError: code bad-value, with the modules to save.
    """
    if not config.adapter or len(tokenizer) <= vocabulary(config):
        return
    rows = embedding_count(config)
    lacking = untrained(config)
    beyond = {} if not lacking else {
        number: tokenizer.convert_ids_to_tokens(number)
        for split in splits
        if split is not None
        for number in _ids_from(split, rows)
    }  # fmt: skip
    if beyond:
        raise _untrained(
            config,
            [beyond[number] for number in sorted(beyond)],
            lacking,
            f"the documents hold {len(beyond)} token(s) that the model has no embedding for",
        )


def _ids_from(split: Any, rows: int) -> set[int]:
    """Return the token ids of a dataset that are `rows` or above."""
    import pyarrow.compute as pc

    found: set[int] = set()
    for chunk in split.with_format("arrow").data.column("input_ids").chunks:
        ids = chunk.flatten()
        found.update(pc.unique(pc.filter(ids, pc.greater_equal(ids, rows))).to_pylist())
    return found


def _untrained(config: Config, tokens: list[str], lacking: list[str], what: str) -> AttnimgError:
    saved = ", ".join((*(config.lora_modules_to_save or ()), *lacking))
    return AttnimgError(
        f"{what}: {', '.join(tokens[:5])}",
        why=f"adapter: {config.adapter} freezes the embeddings, and lora_modules_to_save does not "
        f"name {' and '.join(lacking)}",
        do=f"set lora_modules_to_save: [{saved}]",
        code="bad-value",
        key="lora_modules_to_save",
    )
