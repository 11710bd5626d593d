"""What generation with the trained model needs to know: its chat template, and where it stops."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from attnimg.config.schema import Config, entries, is_chat
from attnimg.train.collate import NO_LOSS
from attnimg.train.data.chat_templates import choose_chat_template

# Documents that are looked at for the token that ends an answer.
DOCUMENTS = 100


def use_trained_template(config: Config, tokenizer: Any) -> list[str]:
    """Set a tokenizer's chat template to the one that wrote the training data, to be saved so.

    Generation would prompt the model otherwise than it was trained. axolotl sets it too.
    Source: axolotl 0.18.0, loaders/tokenizer.py, chat_template (2026-11-27)

    Returns:
        A warning where the data were written with several templates.
    """
    found = {
        key: choose_chat_template(config, tokenizer, spec=spec, key=key)
        for key, spec, trains in entries(config)
        if trains and is_chat(spec)
    }
    if not found:
        return []
    key = next(iter(found))
    if config.chat_template or config.chat_template_jinja:
        own = choose_chat_template(config, tokenizer)
        key = next((name for name, template in found.items() if template == own), key)
    tokenizer.chat_template = found[key]
    if all(template == found[key] for template in found.values()):
        return []
    return [
        "the datasets are written with different chat templates; the tokenizer saved with the "
        f"model has that of {key}"
    ]


def stop_notes(documents: Any, tokenizer: Any, model: Any) -> list[str]:
    """Return a warning where most documents end with a token that generation does not stop at.

    Args:
        documents: what is trained on, with a column labels.
        tokenizer: as it is saved; its end token is one of those that stop generation.
        model: as it is loaded; its generation config may name others.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    ends = Counter(
        next(label for label in reversed(labels) if label != NO_LOSS)
        for labels in documents.select(range(min(DOCUMENTS, len(documents))))["labels"]
    )
    end = ends.most_common(1)[0][0]
    if end in stops or end not in tokenizer.added_tokens_decoder:
        return []
    token = tokenizer.convert_ids_to_tokens(end)
    names = " or ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(stops))
    return [
        f"most documents end with {token!r}, and the saved model will stop at "
        f"{names or 'no token'} alone: set special_tokens: {{eos_token: {json.dumps(token)}}}"
    ]
