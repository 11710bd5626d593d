"""Load the tokenizer and give it the tokens the config asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnimg.errors import AttnimgError
from attnimg.schema import Config


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
    tokenizer.add_special_tokens({name: str(token) for name, token in specials.items()})
    if extra:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": list(extra)}, replace_extra_special_tokens=False
        )
    tokenizer.add_tokens(list(config.tokens or []))
    _require_known(tokenizer, config.eot_tokens or [])
    _require_trained(config, sorted(set(tokenizer.get_vocab()) - known))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        say(
            f"the tokenizer has no pad token; {tokenizer.pad_token!r} pads "
            "(padding carries no loss and is not attended to)"
        )
    if tokenizer.pad_token is None:
        raise AttnimgError(
            "the tokenizer has no token to pad with",
            why=f"found no pad, unk or eos token in the tokenizer of {source}; one is needed",
            do='set special_tokens: {pad_token: "<pad>"}',
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
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
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


def _require_trained(config: Config, added: list[str]) -> None:
    """Refuse new tokens under an adapter that leaves their embeddings as they were born."""
    if not added or not config.adapter:
        return
    saved = config.lora_modules_to_save or []
    if any("emb" in name or name in ("wte", "lm_head") for name in saved):
        return
    raise AttnimgError(
        f"{len(added)} new token(s) would never be trained: {', '.join(added[:5])}",
        why=f"adapter: {config.adapter} freezes the embeddings, and lora_modules_to_save does not "
        "name them",
        do="set lora_modules_to_save: [embed_tokens, lm_head]",
        code="bad-value",
        key="lora_modules_to_save",
    )
