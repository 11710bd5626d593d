"""Load the tokenizer and give it the tokens the config asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.new_tokens import has_embedding, may_add_pad_token, require_trained_tokens


def load_tokenizer(config: Config, *, say: Callable[[str], None]) -> Any:
    """Load the tokenizer of `base_model`, with special_tokens, tokens and eot_tokens added.

    Args:
        config: the validated run.
        say: takes a sentence a person should read, such as which token pads.

    Returns:
        A transformers tokenizer that has a pad token.

    Raises:
        AttnimgError: it can't be loaded (bad-model), or an adapter would leave added tokens
            untrained (bad-value).
    """
    source = config.tokenizer_config or config.base_model or ""
    tokenizer = _load(config, source)
    known = set(tokenizer.get_vocab())
    specials = {name: token for name, token in (config.special_tokens or {}).items() if token}
    extra = specials.pop("additional_special_tokens", [])
    if "pad_token" in specials and not may_add_pad_token(
        config, tokenizer, str(specials["pad_token"])
    ):
        say(
            f"special_tokens: pad_token {specials.pop('pad_token')!r} is not added: the embeddings "
            f"have no row for it, and adapter: {config.adapter} does not add one"
        )
    tokenizer.add_special_tokens({name: str(token) for name, token in specials.items()})
    if extra:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": list(extra)}, replace_extra_special_tokens=False
        )
    tokenizer.add_tokens(list(config.tokens or []))
    _require_known(tokenizer, config.eot_tokens or [])
    others = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, *extra}
    pad_alone = {tokenizer.pad_token} - others - set(config.tokens or [])
    require_trained_tokens(config, set(tokenizer.get_vocab()) - known - pad_alone)
    if not has_embedding(config, tokenizer.pad_token_id):
        lacks = "the tokenizer has no pad token"
        if tokenizer.pad_token is not None:
            lacks = f"the model has no embedding for {tokenizer.pad_token!r}"
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        say(
            f"{lacks}; {tokenizer.pad_token!r} pads "
            "(padding carries no loss and is not attended to)"
        )
    if tokenizer.pad_token is None:
        first = json.dumps(tokenizer.convert_ids_to_tokens(0))
        raise AttnimgError(
            "the tokenizer has no token to pad with",
            why=f"found no pad, unk or eos token in the tokenizer of {source}; one is needed",
            do=f"set special_tokens: {{pad_token: {first}}}",
            code="bad-model",
            key="special_tokens",
        )
    return tokenizer


def _load(config: Config, source: str) -> Any:
    """Load by name; what transformers raises becomes an error a person can use."""
    import transformers

    name = config.tokenizer_type or "AutoTokenizer"
    loader = getattr(transformers, name, None)
    if loader is None or not hasattr(loader, "from_pretrained"):
        raise AttnimgError(
            f"transformers has no tokenizer named {name}",
            why=f"found tokenizer_type: {name}; needed a class of transformers "
            f"{transformers.__version__}",
            do="remove tokenizer_type: AutoTokenizer finds the right one",
            code="bad-value",
            key="tokenizer_type",
        )
    try:
        return loader.from_pretrained(
            source,
            revision=config.revision_of_model,
            trust_remote_code=bool(config.trust_remote_code),
        )
    except (
        OSError, ValueError, ImportError, LookupError, RuntimeError, TypeError, AttributeError,
        AssertionError,
    ) as error:  # fmt: skip
        raise AttnimgError(
            f"no tokenizer could be loaded from {source}",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            do="put the tokenizer's files beside the model, or set tokenizer_config to its folder",
            code="bad-model",
            key="tokenizer_config" if config.tokenizer_config else "base_model",
        ) from error


def _require_known(tokenizer: Any, eot_tokens: list[str]) -> None:
    """Refuse an end-of-turn token that would be cut into several."""
    for token in eot_tokens:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise AttnimgError(
                f"eot_tokens: {token!r} is not one token",
                why=f"the tokenizer makes {len(ids)} tokens of it; needed 1",
                do=f"add it with tokens: [{token!r}], or name a token the tokenizer has",
                code="bad-value",
                key="eot_tokens",
            )
