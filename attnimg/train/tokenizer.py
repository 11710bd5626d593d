"""Load the tokenizer with the config's tokens added, and check the settings saved with the model.

Each new token in the data must have a trained embedding, but an adapter freezes the embeddings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import distributions
from typing import Any

from attnimg.config.schema import Config, dataset_entries, is_chat
from attnimg.errors import AttnimgError, bad_value, counted
from attnimg.train.data import choose_chat_template
from attnimg.train.lora import untrained_embeddings
from attnimg.train.model import find_class, load_model_config, load_without_weights
from attnimg.train.rows import NO_LOSS

# Number of documents in which to look for the token that ends an answer.
DOCUMENTS = 100

_RENAMED = "added_tokens_overrides"
# The order in which special tokens are added.
_SPECIAL_ORDER = (
    "bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token",
)  # fmt: skip


def load_tokenizer(config: Config, *, log: Callable[[str], None]) -> Any:
    """Load the tokenizer of `base_model`, with special_tokens, tokens and eot_tokens added.

    Args:
        config: the validated run.
        log: prints a line, for example which token is used for padding.

    Returns:
        A transformers tokenizer that has a pad token.

    Raises:
        AttnimgError: it can't be loaded (bad-model), or an adapter would leave added tokens
            untrained (bad-value), or added_tokens_overrides renames others (bad-value).
    """
    source = config.tokenizer_config or config.base_model or ""
    if config.tokenizer_use_mistral_common:
        return _load_mistral(config, source)
    tokenizer = _load(config, source)
    if config.added_tokens_overrides:
        _rename_tokens(tokenizer, config.added_tokens_overrides)
    if config.tokenizer_legacy is not None and not hasattr(tokenizer, "legacy"):
        kind = type(tokenizer).__name__
        log(f"warning: tokenizer_legacy has no effect: {kind} has no such setting")
    known = set(tokenizer.get_vocab())
    special_tokens = {name: token for name, token in (config.special_tokens or {}).items() if token}
    extra = special_tokens.pop("additional_special_tokens", [])
    if "pad_token" in special_tokens and not may_add_pad_token(
        config, tokenizer, str(special_tokens["pad_token"])
    ):
        log(
            f"special_tokens: pad_token {special_tokens.pop('pad_token')!r} is not added: the "
            f"embeddings have no row for it, and adapter: {config.adapter} does not add one"
        )
    _add_tokens(tokenizer, special_tokens, config.tokens or [], extra)
    _require_single_tokens(tokenizer, config.eot_tokens or [])
    others = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, *extra}
    pad_alone = {tokenizer.pad_token} - others - set(config.tokens or [])
    require_trained_tokens(config, set(tokenizer.get_vocab()) - known - pad_alone)
    if not has_embedding(config, tokenizer.pad_token_id):
        reason = "the tokenizer has no pad token"
        if tokenizer.pad_token is not None:
            reason = f"the model has no embedding for {tokenizer.pad_token!r}"
        # A tokenizer's class may add an unk token of its own, for which there is no row either.
        present = [token for token in (tokenizer.unk_token, tokenizer.eos_token) if token]
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in present}
        tokenizer.pad_token = next((t for t, i in ids.items() if has_embedding(config, i)), None)
        if tokenizer.pad_token is not None:
            log(
                f"{reason}; {tokenizer.pad_token!r} is used for padding "
                "(padding carries no loss and is not attended to)"
            )
    if tokenizer.pad_token is None:
        first = json.dumps(tokenizer.convert_ids_to_tokens(0))
        raise AttnimgError(
            "the tokenizer has no token for padding",
            why=f"found no pad, unk or eos token in the tokenizer of {source}; one is needed",
            do=f"set special_tokens: {{pad_token: {first}}}",
            code="bad-model",
            key="special_tokens",
        )
    return tokenizer


def _add_tokens(
    tokenizer: Any, special: Mapping[Any, Any], tokens: Iterable[str], extra: Iterable[str]
) -> None:
    """Add tokens in axolotl's order, which decides their ids, and with its flags.

    Texts are searched for them before they are normalized: otherwise "<New>" would also be found
    in "<new>" by a tokenizer without capitals, and Llama's would not mark the beginning of the
    word that follows a token.
    Source: axolotl 0.19.0, loaders/tokenizer.py, load_tokenizer; utils/schemas/model.py,
    SpecialTokensConfig, from which the order of names follows (2026-11-28)

    Args:
        tokenizer: of transformers.
        special: name -> special token.
        tokens: the key tokens.
        extra: additional special tokens.
    """
    from transformers import AddedToken

    def added(text: str, *, special: bool = False) -> Any:
        return AddedToken(text, rstrip=False, lstrip=False, normalized=False, special=special)

    for name in sorted(special, key=_SPECIAL_ORDER.index):
        tokenizer.add_special_tokens({name: added(str(special[name]), special=True)})
    tokenizer.add_tokens([added(text) for text in tokens])
    if extra := list(extra):
        tokenizer.add_tokens([added(text, special=True) for text in extra], special_tokens=True)
        tokenizer.add_special_tokens(
            {"extra_special_tokens": extra}, replace_extra_special_tokens=False
        )


def _load(config: Config, source: str) -> Any:
    """Load a tokenizer."""
    with _tokenizer_errors(config, source):
        loader = find_class("tokenizer_type", config.tokenizer_type, default="AutoTokenizer")
        return loader.from_pretrained(
            source,
            revision=config.revision_of_model,
            trust_remote_code=bool(config.trust_remote_code),
            **({} if config.tokenizer_legacy is None else {"legacy": config.tokenizer_legacy}),
        )


@contextmanager
def _tokenizer_errors(config: Config, source: str) -> Iterator[None]:
    """Turn errors that transformers raises while it loads a tokenizer into an AttnimgError."""
    try:
        yield
    except AttnimgError:
        raise
    # A tokenizer of the hub may raise anything; tokenizers raises Exception itself for a bad file.
    except Exception as error:
        do = "put the tokenizer's files beside the model, or set tokenizer_config to its folder"
        if isinstance(error, ImportError):
            do = "install the packages that it names"
        raise AttnimgError(
            f"no tokenizer could be loaded from {source}",
            why=next(filter(str.strip, str(error).splitlines()), type(error).__name__),
            do=do,
            code="bad-model",
            key="tokenizer_config" if config.tokenizer_config else "base_model",
        ) from error


def _load_mistral(config: Config, source: str) -> Any:
    """Load the tokenizer of mistral-common, to which no tokens can be added.

    Source: axolotl 0.19.0, utils/mistral/mistral_tokenizer.py (2026-11-27)
    """
    from transformers import MistralCommonBackend
    from transformers.utils import import_utils

    needed = import_utils.MISTRAL_COMMON_MIN_VERSION
    if not import_utils.is_mistral_common_available():
        found = next((d.version for d in distributions(name="mistral-common")), "no such package")
        raise AttnimgError(
            "tokenizer_use_mistral_common needs mistral-common",
            why=f"found {found}; needed {needed} or later",
            do=f"pip install 'mistral-common>={needed}', or remove tokenizer_use_mistral_common",
            code="not-installed",
            key="tokenizer_use_mistral_common",
        )
    arguments = {"revision": config.revision_of_model} if config.revision_of_model else {}
    with _tokenizer_errors(config, source):
        return MistralCommonBackend.from_pretrained(source, mode="finetuning", **arguments)


def _rename_tokens(tokenizer: Any, names: Mapping[int, str]) -> None:
    """Rename added tokens of a tokenizer; their ids stay the same.

    Source: axolotl 0.19.0, loaders/tokenizer.py, modify_tokenizer_files (2026-11-27)

    Args:
        tokenizer: a fast tokenizer of transformers.
        names: id of a token -> its new name.

    Raises:
        AttnimgError: code bad-value.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    special = {str(token) for token in tokenizer.special_tokens_map.values()}
    vocabulary = state["model"].get("vocab")
    for number, name in names.items():
        old = added[number]["content"] if number in added else None
        if old is None or old in special:
            raise _not_free(number, old, [n for n in added if added[n]["content"] not in special])
        if name != old and name in tokenizer.get_vocab():
            raise bad_value(
                _RENAMED,
                f"{_RENAMED}: the tokenizer has a token {name!r} already",
                why=f"found it as {tokenizer.convert_tokens_to_ids(name)}; needed a new name",
                do=f"write another name for {number} in {_RENAMED}",
            )
        added[number]["content"] = name
        if isinstance(vocabulary, dict) and vocabulary.get(old) == number:
            vocabulary[name] = vocabulary.pop(old)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _not_free(number: int, old: str | None, free: list[int]) -> AttnimgError:
    found = (
        "no added token with that id"
        if old is None
        else f"{old!r}, which is used as a special token"
    )
    shown = f"{min(free)} to {max(free)}" if free else "none"
    return bad_value(
        _RENAMED,
        f"{_RENAMED}: token {number} can't be renamed",
        why=f"found {found}; added tokens that can be renamed: {shown}",
        do=f"correct or remove {number} in {_RENAMED}",
    )


def _require_single_tokens(tokenizer: Any, eot_tokens: list[str]) -> None:
    """Raise for an end-of-turn text that is not a single token."""
    for token in eot_tokens:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise AttnimgError(
                f"eot_tokens: {token!r} is not one token",
                why=f"the tokenizer splits it into {len(ids)} tokens; needed 1",
                do=f"add it with tokens: [{token!r}], or name a token the tokenizer has",
                code="bad-value",
                key="eot_tokens",
            )


def may_add_pad_token(config: Config, tokenizer: Any, token: str) -> bool:
    """Return whether a pad token may be added to the tokenizer.

    Padding has no loss and is not attended to, so an existing token works as well. With a new row
    for it, the adapter would load only on a base model with resized embeddings.
    """
    return token in tokenizer.get_vocab() or has_embedding(config, len(tokenizer))


def has_embedding(config: Config, token_id: int | None) -> bool:
    """Return whether the trained model will have an embedding for a token."""
    if token_id is None or not config.adapter:
        return token_id is not None
    if token_id < vocabulary_size(config):
        return True
    return token_id < embedding_count(config) or not find_untrained_embeddings(config)


def vocabulary_size(config: Config) -> int:
    """Return vocab_size of config.json, the minimum of embedding rows; 0 if there is none."""
    try:
        return int(load_model_config(config).get_text_config().vocab_size)
    except (AttributeError, ValueError):  # no such field, or several text models
        return 0


def embedding_count(config: Config) -> int:
    """Return how many rows the model's embeddings have."""
    model = load_without_weights(config)
    return vocabulary_size(config) if model is None else len(model.get_input_embeddings().weight)


def find_untrained_embeddings(config: Config) -> list[str]:
    """Return the embeddings that lora_modules_to_save lacks for new tokens to be trained."""
    if not config.adapter:
        return []
    model = load_without_weights(config)
    if model is None:
        return [] if config.lora_modules_to_save else ["embed_tokens", "lm_head"]
    return untrained_embeddings(model, config)


def require_trained_tokens(config: Config, added: Iterable[str]) -> None:
    """Raise if an adapter would leave the embeddings of new tokens untrained.

    Raises:
        AttnimgError: code bad-value, with the modules to save.
    """
    tokens = sorted(added)
    if tokens and (missing := find_untrained_embeddings(config)):
        raise _untrained_error(
            config, tokens, missing, f"{counted(len(tokens), 'new token')} would not be trained"
        )


def require_embeddings(config: Config, splits: Iterable[Any], tokenizer: Any) -> None:
    """Raise if documents have tokens without an embedding, and the adapter adds none.

    Args:
        config: the validated run.
        splits: datasets with a column input_ids; None for one that the run does not have.
        tokenizer: as `load_tokenizer` returns it.

    Raises:
        AttnimgError: code bad-value, with the modules to save.
    """
    if not config.adapter or len(tokenizer) <= vocabulary_size(config):
        return
    rows = embedding_count(config)
    missing = find_untrained_embeddings(config)
    unknown = {} if not missing else {
        number: tokenizer.convert_ids_to_tokens(number)
        for split in splits
        if split is not None
        for number in _ids_from(split, rows)
    }  # fmt: skip
    if unknown:
        raise _untrained_error(
            config,
            [unknown[number] for number in sorted(unknown)],
            missing,
            f"the documents have {counted(len(unknown), 'token')} without an embedding in the "
            "model",
        )


def _ids_from(split: Any, rows: int) -> set[int]:
    """Return the token ids of a dataset that are `rows` or above."""
    import pyarrow.compute as pc

    found: set[int] = set()
    for chunk in split.with_format("arrow").data.column("input_ids").chunks:
        ids = chunk.flatten()
        found.update(pc.unique(pc.filter(ids, pc.greater_equal(ids, rows))).to_pylist())
    return found


def _untrained_error(
    config: Config, tokens: list[str], missing: list[str], what: str
) -> AttnimgError:
    saved = ", ".join((*(config.lora_modules_to_save or ()), *missing))
    return AttnimgError(
        f"{what}: {', '.join(tokens[:5])}",
        why=f"adapter: {config.adapter} freezes the embeddings, and lora_modules_to_save does not "
        f"name {' and '.join(missing)}",
        do=f"set lora_modules_to_save: [{saved}]",
        code="bad-value",
        key="lora_modules_to_save",
    )


def use_trained_template(config: Config, tokenizer: Any) -> list[str]:
    """Set the tokenizer's chat template to that of the training data, so that it is saved.

    With another template, generation would prompt the model differently from training. axolotl sets
    it too.
    Source: axolotl 0.18.0, loaders/tokenizer.py, chat_template (2026-11-27)

    Returns:
        A warning if the data were rendered with several templates.
    """
    if config.tokenizer_use_mistral_common:  # it has no template
        return []
    found = {
        key: choose_chat_template(config, tokenizer, spec=spec, key=key)
        for key, spec, trains in dataset_entries(config)
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
        "the datasets use different chat templates; the tokenizer saved with the model has "
        f"that of {key}"
    ]


def end_token_notes(documents: Any, tokenizer: Any, model: Any) -> list[str]:
    """Return a warning if most documents end with a token at which generation does not stop.

    Args:
        documents: the training documents, with a column labels.
        tokenizer: the tokenizer as it is saved; generation stops at its end token.
        model: the loaded model; its generation config may name other end tokens.
    """
    eos = getattr(model.generation_config, "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    last_tokens = Counter(
        next(label for label in reversed(labels) if label != NO_LOSS)
        for labels in documents.select(range(min(DOCUMENTS, len(documents))))["labels"]
    )
    end = last_tokens.most_common(1)[0][0]
    known = tokenizer.added_tokens_decoder
    if end in stops or callable(known) or end not in known:  # mistral-common has no such list
        return []
    token = tokenizer.convert_ids_to_tokens(end)
    names = " or ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(stops))
    return [
        f"most documents end with {token!r}, and the saved model will stop at "
        f"{names or 'no token'} only: set special_tokens: {{eos_token: {json.dumps(token)}}}"
    ]
