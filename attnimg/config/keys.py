"""Answer the keys of axolotl that the schema does not have, from data/keys.toml."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal

from attnimg.config.attention import LEGACY
from attnimg.config.schema import Config, DatasetSpec, make_error
from attnimg.facts import Finding

# Computed from the backend; a config can't set them.
COMPUTED = ("attn_supports_packing", "attn_uses_flash_lib", "attn_needs_dtype_cast")
# Keys of the schema that are also in data/keys.toml, which refuses them after their own rules. That
# file has no other key of the schema, so most configs can be checked without reading it.
IN_SCHEMA = frozenset({"rl", "context_parallel_size", "scaling_softmax"})
# Flag -> the value of expert_backend that means the same.
_EXPERT_KERNELS = {"use_scattermoe": "scattermoe", "use_sonicmoe": "sonicmoe"}


Answer = Literal["done-otherwise", "hint-not-used", "refused"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyAnswer:
    """What happens to a key of axolotl that the schema does not have.

    Attributes:
        answer: accepted with a warning (done-otherwise, hint-not-used), or refused.
        reason: by what it is done, what it would have saved, or why it is refused.
        do: what the user can do.
        accepts: values without effect, which are accepted in silence.
        means: values that have a meaning, though they turn other keys off, such as false.
    """

    answer: Answer
    reason: str
    do: str
    accepts: tuple[Any, ...] = ()
    means: tuple[Any, ...] = ()

    def applies(self, value: object) -> bool:
        """Return whether a value requests something; null, false, 0 and empty ones rarely do."""
        return value in self.means or (bool(value) and value not in self.accepts)


@cache
def key_answers() -> dict[str, KeyAnswer]:
    """Return the answer to each top-level key of axolotl that the schema does not have."""
    accepts, means = _table()["accepts"], _table()["means"]
    return {
        key: _answer(group, tuple(accepts.get(key, ())), tuple(means.get(key, ())))
        for group in _table()["group"]
        for key in group["keys"]
    }


@cache
def plugin_answers() -> dict[str, KeyAnswer]:
    """Return the answer to each of axolotl's plugins, by the name of its class."""
    return {name: _answer(group) for group in _table()["plugin"] for name in group["names"]}


def allowed_values(key: str) -> tuple[str, ...]:
    """Return the values that a key of axolotl may have; none where any may be."""
    return tuple(_table()["allowed"].get(key, ()))


def allowed_options(key: str) -> tuple[str, ...]:
    """Return the names that the mapping of a key of axolotl may have; none where any may be."""
    return tuple(_table()["options"].get(key, ()))


def other_values(key: str) -> tuple[str, ...]:
    """Return the values of a key that axolotl has and the schema does not."""
    return tuple(_table()["values"].get(key, ()))


@cache
def dataset_key_answers() -> dict[str, KeyAnswer]:
    """Return the answer to each key of a dataset entry that the schema does not have."""
    table = _table()["dataset"]
    return dict.fromkeys(table["keys"], _answer({"answer": "refused", **table}))


def _answer(
    group: dict[str, Any], accepts: tuple[Any, ...] = (), means: tuple[Any, ...] = ()
) -> KeyAnswer:
    return KeyAnswer(
        answer=group["answer"],
        reason=group["reason"],
        do=group["do"],
        accepts=accepts,
        means=means,
    )


def nearest_key(key: str, *, dataset: bool = False) -> str | None:
    """Return the known key that is most similar to `key`; None when none is similar."""
    name = key.strip().lower()
    if not dataset and (synonym := _table()["synonyms"].get(name)):
        return str(synonym)
    fields = DatasetSpec.model_fields if dataset else {**Config.model_fields, **LEGACY}
    others = dataset_key_answers() if dataset else key_answers()
    # Implemented keys come first, so that they are suggested if two keys are equally similar.
    for known in (fields, others):
        if matches := get_close_matches(name, known, n=1, cutoff=0.75):
            return matches[0]
    return None


def expert_kernel_errors(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield an error for each flag that contradicts expert_backend, or else the other flag.

    They choose a kernel for mixtures of experts. attnimg uses none of them, but the author of a
    config that axolotl refuses can't have trained with it. A flag that is false contradicts
    nothing: expert_backend turns it on.
    Source: axolotl 0.19.0, integrations/kernels/args.py, _canonicalize_expert_backend and
    check_mutually_exclusive (2026-11-27).

    Args:
        values: the keys of the config, as they are written.
    """
    on = [flag for flag in _EXPERT_KERNELS if values.get(flag) in (True, 1)]
    backend = values.get("expert_backend")
    if backend is None:
        if len(on) > 1:
            why = f"found {on[0]} and {on[1]}, two kernels for the same layers; needed one of them"
            yield make_error("bad-value", on[1], f"{on[1]} contradicts {on[0]}", why,
                             f"keep {on[0]} or {on[1]}")  # fmt: skip
        return
    name = str(backend).lower()
    for flag in on:
        kernel = _EXPERT_KERNELS[flag]
        if name in allowed_values("expert_backend") and name != kernel:
            why = f"found expert_backend: {name} and {flag}: true, which means {kernel}; "
            why += "axolotl refuses both together"
            yield make_error("bad-value", flag, f"{flag} contradicts expert_backend", why,
                             f"keep expert_backend or {flag}")  # fmt: skip


@cache
def _table() -> dict[str, Any]:
    from attnimg.files import read_data  # here, because most configs are checked without it

    return read_data("keys.toml")
