"""What kind each layer of a model is: full attention, sliding, or no softmax attention at all."""

from __future__ import annotations

from collections import Counter

from attnimg.select.problem.families import Family, Pattern
from attnimg.select.problem.fields import Fields

FULL = frozenset({"full_attention", "attention", "global", "hybrid"})
SLIDING = frozenset({"sliding_attention", "sliding_window", "local"})
CHUNKED = frozenset({"chunked_attention"})
# Layers that no attention backend has to do with.
OTHER = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"})

_MAX_LAYERS = 10_000  # a thousand times that would fill the memory, and is a typo


def layer_kinds(fields: Fields, family: Family) -> list[str]:
    """Name the kind of each layer, first to last.

    Raises:
        AttnimgError: the lists in the config do not have one entry a layer (code "bad-model").
    """
    count = fields.whole("num_hidden_layers") or 0
    if count > _MAX_LAYERS:
        raise fields.refusal("num_hidden_layers", count, needed=f"at most {_MAX_LAYERS}")
    # Families with one window for all layers do not look at layer_types.
    listed = fields.names("layer_types") if family.window == "sliding layers" else None
    if listed is None:
        kinds = _from_pattern(fields, family, count=count)
    elif len(listed) != count:
        raise fields.wrong_length("layer_types", len(listed), count=count)
    else:
        kinds = list(listed)
    if family.last_full:
        kinds[-1] = "full_attention"
    return kinds


def remarks_on(kinds: list[str], fields: Fields) -> list[str]:
    """Say in sentences what a LayerGroup cannot carry."""
    remarks = []
    counts = Counter(kinds)
    if chunked := sum(counts[kind] for kind in CHUNKED):
        size = fields.whole("attention_chunk_size")
        remarks.append(
            f"{chunked} of {len(kinds)} layers attend within chunks of {size} tokens; "
            "they are judged as full attention"
        )
    for kind in counts.keys() - FULL - SLIDING - CHUNKED - OTHER:
        remarks.append(
            f"{counts[kind]} of {len(kinds)} layers are {kind!r}, which is not known here; "
            "they are judged as full attention"
        )
    return sorted(remarks)


def _from_pattern(fields: Fields, family: Family, *, count: int) -> list[str]:
    pattern = family.pattern
    if pattern is None:
        # The general rule for a type that is not in the table: a window holds for every layer.
        slides = not family.known and _may_slide(fields)
        return ["sliding_attention" if slides else "full_attention"] * count
    if pattern.slide_from:
        start = fields.whole(pattern.slide_from, minimum=0) or 0
        return ["sliding_attention" if i >= start else "full_attention" for i in range(count)]
    if pattern.flags and (flags := fields.flags(pattern.flags)):
        if len(flags) != count:
            raise fields.wrong_length(pattern.flags, len(flags), count=count)
        return [pattern.others if flag else pattern.nth for flag in flags]
    every, offset = _period(fields, pattern)
    return [pattern.nth if i % every == offset else pattern.others for i in range(count)]


def _period(fields: Fields, pattern: Pattern) -> tuple[int, int]:
    every = fields.whole(pattern.every_key) if pattern.every_key else None
    every = every or pattern.every or 1
    offset = fields.whole(pattern.offset_key, minimum=0) if pattern.offset_key else None
    if offset is None:
        offset = every - 1 if pattern.offset is None else pattern.offset
    return every, offset


def _may_slide(fields: Fields) -> bool:
    """Take use_sliding_window at its word where a config has it."""
    return "use_sliding_window" not in fields.config or fields.flag("use_sliding_window")
