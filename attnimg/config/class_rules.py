"""Check the classes of transformers that a config names, by the lists of `make classes`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from difflib import get_close_matches

from attnimg.config.dataset_rules import Rule, bad_value
from attnimg.config.schema import Config, make_error
from attnimg.facts import Finding

# The class that chooses the model's class by the type in its config.json.
DEFAULT = "AutoModelForCausalLM"
# The last two also load models with image input.
AUTO_CLASSES = frozenset({DEFAULT, "AutoModelForImageTextToText", "AutoModelForMultimodalLM"})
_AUTO_TOKENIZER = "AutoTokenizer"


def _model_class(config: Config) -> Iterator[Finding]:
    """Yield an error unless model_type is a class of causal language models."""
    key, name = "model_type", config.model_type
    if name is None or name in AUTO_CLASSES or name in (known := _causal_classes()):
        return
    similar = _similar(name, known)
    yield make_error(
        "not-causal-lm", key, f"{key}: {name} is not a causal language model",
        f"found: a class of another task, or of none in transformers{similar}\n"
        "needed: a class of transformers that predicts each token from those before it",
        f"remove {key}: {DEFAULT} finds the right class",
    )  # fmt: skip


def _tokenizer_class(config: Config) -> Iterator[Finding]:
    """Yield an error unless tokenizer_type is a class of tokenizers."""
    key, name = "tokenizer_type", config.tokenizer_type
    if name in (None, _AUTO_TOKENIZER) or _is_tokenizer(name := str(name)):
        return
    similar = _similar(name, _tokenizer_classes())
    yield bad_value(key, f"transformers has no tokenizer {name}",
                     f"needed the class of a tokenizer{similar}",
                     f"remove {key}: {_AUTO_TOKENIZER} finds the right one")  # fmt: skip


def _is_tokenizer(name: str) -> bool:
    """Return whether transformers has a tokenizer of this name, or one without Fast at its end."""
    return bool({name, name.removesuffix("Fast")} & _tokenizer_classes())


def _causal_classes() -> set[str]:
    from attnimg.files import read_data  # here, because few configs need it

    found = read_data("causal_types.toml")
    tables = ("causal", "with_other_inputs", "multimodal")
    return {name for table in tables for name in found[table].values()}


def _tokenizer_classes() -> set[str]:
    from attnimg.files import read_data  # here, because few configs need it

    return {*read_data("tokenizer_classes.toml")["names"]}


def _similar(name: str, known: Collection[str]) -> str:
    """Return a remark on the class with the most similar name; "" where none is similar."""
    found = get_close_matches(name, sorted(known), n=1, cutoff=0.8)
    return f"; there is {found[0]}" if found else ""


CLASS_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (_model_class, ("model_type",)),
    (_tokenizer_class, ("tokenizer_type",)),
)
