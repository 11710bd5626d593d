"""Find the changes of a config with which a run fits, those with the least effect first.

The order: recompute activations (slower, the same result), smaller batches with more accumulation
(the same tokens in a step), activations in CPU memory, an optimizer with 8-bit states, weights in 4
bits, an adapter instead of all weights, and shorter rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from attnimg.config.schema import Config, offloading_mode
from attnimg.memory.forecast import Forecast

Values = dict[str, Any]

# The cost of each kind of change: a set of changes is tried in the order of their sum.
_CHECKPOINTING, _BATCH, _OFFLOAD, _OPTIMIZER, _FOUR_BITS, _ADAPTER, _LENGTH = 1, 2, 4, 8, 16, 32, 64
_8BIT = {
    "adamw_torch": "adamw_8bit", "adamw_torch_fused": "adamw_8bit", "paged_adamw": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_8bit", "lion_32bit": "lion_8bit",
    "paged_lion_32bit": "paged_lion_8bit",
}  # fmt: skip
_SHORTEST = 128
# The number of changes that are listed.
LIMIT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigChange:
    """A change of the config.

    Attributes:
        values: key -> value to set; None removes the key.
        bytes: the high end of the forecast with it.
    """

    values: Mapping[str, Any]
    bytes: int


def find_changes(
    config: Config,
    forecast: Callable[[Config], Forecast],
    *,
    available: int,
    is_valid: Callable[[Mapping[str, Any]], bool],
    cpu: bool,
) -> tuple[ConfigChange, ...]:
    """Return up to three changes with which the run fits, those with the least effect first.

    Args:
        config: the validated run.
        forecast: returns the forecast of a config.
        available: bytes of the device.
        is_valid: whether `check` accepts the config with these values set.
        cpu: whether the run is on a CPU, where activations are not offloaded.
    """
    found: list[ConfigChange] = []
    for values in _candidates(config, cpu=cpu):
        if any(_includes(values, change.values) for change in found):
            continue
        after = forecast(config.model_copy(update=values))
        if after.parts and not after.why and after.high <= available and is_valid(values):
            found.append(ConfigChange(values=values, bytes=after.high))
            if len(found) == LIMIT:
                break
    return tuple(found)


def _includes(values: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether values include all changes of another set."""
    known = dict(values)
    if known.get("gradient_checkpointing") == "offload":
        known["gradient_checkpointing"] = True
    return other.items() <= known.items() or other.items() <= values.items()


def _candidates(config: Config, *, cpu: bool) -> Iterator[Values]:
    """Yield sets of values in the order of their cost, the sum of the costs of their changes."""
    choices = (
        [(0, {}), *_recompute(config, cpu=cpu)],
        [(0, {}), *_smaller_batches(config)],
        [(0, {}), *_smaller_states(config)],
        [(0, {}), *_frozen_weights(config)],
        [(0, {}), *_shorter_rows(config)],
    )
    sets = []
    for chosen in product(*choices):
        cost = sum(each for each, _ in chosen)
        values: Values = {}
        for _, more in chosen:
            values |= more
        if values:
            sets.append((cost, len(values), values))
    for _, _, values in sorted(sets, key=lambda entry: entry[:2]):
        yield values


def _recompute(config: Config, *, cpu: bool) -> Iterator[tuple[float, Values]]:
    if not config.gradient_checkpointing:
        yield _CHECKPOINTING, {"gradient_checkpointing": True}
    if offloading_mode(config) is None and not cpu:
        yield _OFFLOAD, {"gradient_checkpointing": "offload"}


def _smaller_batches(config: Config) -> Iterator[tuple[float, Values]]:
    """Yield smaller batches with the same number of rows in a step."""
    rows = config.micro_batch_size
    smaller = [n for n in range(rows - 1, 0, -1) if rows % n == 0]
    for number, size in enumerate(smaller):
        steps = config.gradient_accumulation_steps * rows // size
        values: Values = {"micro_batch_size": size, "gradient_accumulation_steps": steps}
        if config.eval_batch_size is not None and config.eval_batch_size > size:
            values["eval_batch_size"] = size
        yield _BATCH + number / len(smaller), values


def _smaller_states(config: Config) -> Iterator[tuple[float, Values]]:
    if (name := _8BIT.get(config.optimizer)) is not None:
        yield _OPTIMIZER, {"optimizer": name}


def _frozen_weights(config: Config) -> Iterator[tuple[float, Values]]:
    if config.adapter == "lora" and not (config.load_in_8bit or config.load_in_4bit):
        yield _FOUR_BITS, {"adapter": "qlora", "load_in_4bit": True}
    elif config.adapter is None and not config.unfrozen_parameters:
        targets = {"lora_target_linear": True, "lora_r": 16}
        yield _ADAPTER, {"adapter": "lora", **targets}
        yield _ADAPTER + _FOUR_BITS, {"adapter": "qlora", "load_in_4bit": True, **targets}


def _shorter_rows(config: Config) -> Iterator[tuple[float, Values]]:
    length, cost = config.sequence_len // 2, _LENGTH
    while length >= _SHORTEST:
        yield cost, {"sequence_len": length}
        length, cost = length // 2, cost * 2
