"""Judge one group of layers: its head sizes and what its attention needs beyond plain softmax."""

from __future__ import annotations

from collections.abc import Iterator

from attnimg.facts import HeadDims, LayerGroup, Reason


def layer_reasons(
    layer: LayerGroup, rules: tuple[HeadDims, ...], major: int | None, features: frozenset[str]
) -> Iterator[Reason]:
    """Give the reasons of one group of layers.

    Args:
        layer: the group.
        rules: the head sizes a backend takes.
        major: NVIDIA's capability major; None elsewhere.
        features: what the backend honours on this machine.
    """
    asked = _features_of(layer)
    for feature in sorted(asked - features):
        text = f"{layer.count} layers use {_feature_text(layer, feature)}, not supported here"
        yield Reason(code=feature, text=text)
    rules = tuple(
        rule for rule in rules if not rule.majors or major is None or major in rule.majors
    )
    sized = [rule for rule in rules if _takes(rule, layer)]
    size = f"{layer.count} layers have head_dim {layer.head_dim_qk}"
    if layer.head_dim_v != layer.head_dim_qk:
        size += f" (v {layer.head_dim_v})"
    if rules and not sized:
        code = "head-dim" if not any(_takes_qk(rule, layer) for rule in rules) else "head-dim-v"
        yield Reason(code=code, text=f"{size}, takes {_sizes(rules)}")
    elif sized and all(asked & features & rule.without for rule in sized):
        lost = sorted(asked & features & sized[0].without)
        yield Reason(code=lost[0], text=f"{size}, where {' or '.join(lost)} is not supported")


def _features_of(layer: LayerGroup) -> frozenset[str]:
    used = {"window": layer.window is not None, "softcap": bool(layer.softcap)}
    return frozenset(name for name, is_used in {**used, "sinks": layer.sinks}.items() if is_used)


def _feature_text(layer: LayerGroup, feature: str) -> str:
    return {
        "window": f"a sliding window of {layer.window}",
        "softcap": f"a logit soft cap of {layer.softcap}",
        "sinks": "attention sinks",
    }[feature]


def _takes_qk(rule: HeadDims, layer: LayerGroup) -> bool:
    if rule.ungrouped and layer.heads != layer.kv_heads:
        return False
    in_range = rule.qk[0] <= layer.head_dim_qk <= rule.qk[1]
    return in_range and layer.head_dim_qk % rule.multiple == 0


def _takes(rule: HeadDims, layer: LayerGroup) -> bool:
    if not _takes_qk(rule, layer):
        return False
    if rule.equal and layer.head_dim_v != layer.head_dim_qk:
        return False
    in_range = rule.v[0] <= layer.head_dim_v <= rule.v[1]
    return in_range and layer.head_dim_v % rule.multiple_v == 0


def _sizes(rules: tuple[HeadDims, ...]) -> str:
    texts = []
    for rule in rules:
        low, high = rule.qk
        text = f"{high}" if low == high else f"at most {high}"
        if rule.multiple > 1:
            text += f" in steps of {rule.multiple}"
        if rule.ungrouped:
            text += f" with v {rule.v[1]} and ungrouped heads"
        if rule.multiple_v > 1 and not rule.equal:
            text += f", v in steps of {rule.multiple_v}"
        texts.append(text + (", v equal" if rule.equal else ""))
    return " or ".join(texts)
