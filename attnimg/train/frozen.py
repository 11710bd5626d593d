"""Freeze all weights, or rows of weights, that unfrozen_parameters does not name.

Source: axolotl 0.19.0, utils/freeze.py, freeze_layers_except (2026-11-27). There, weight decay
changes rows outside the named ones; here they keep their values exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnimg.config.weight_patterns import parse_weight_pattern
from attnimg.errors import AttnimgError, bad_value, counted

if TYPE_CHECKING:
    import torch

KEY = "unfrozen_parameters"


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenRows:
    """The rows of a trained weight that keep their values.

    Attributes:
        weight: the weight.
        rows: bool (rows of the weight,), True where a row is frozen.
        values: a copy of the frozen rows, (frozen rows, ...).
    """

    weight: torch.nn.Parameter
    rows: torch.Tensor
    values: torch.Tensor

    def restore(self) -> None:
        """Write the kept values back: weight decay and momentum change rows without gradients."""
        with_device = self.rows.to(self.weight.device)
        self.weight.data[with_device] = self.values.to(self.weight.device, self.weight.dtype)


def freeze_except(
    model: Any, patterns: Sequence[str], *, log: Callable[[str], None] | None = None
) -> None:
    """Freeze a model's weights, except those that a pattern names.

    The frozen rows of trained weights are kept in `model.attnimg_frozen_rows`, for
    `restore_after_steps`. Their gradients are set to 0, so that they do not count in the norm.

    Args:
        model: a transformers model without an adapter.
        patterns: as `parse_weight_pattern` takes them. Where several name a weight, those with rows
            decide, as in axolotl.
        log: prints a line on the rows that are trained, and on a pattern that names no weight.

    Raises:
        AttnimgError: no weight is named, or a weight has fewer rows than named (bad-value).
    """
    parsed = {text: parse_weight_pattern(text) for text in patterns}
    unused, kept, named = set(parsed), [], dict[str, list[str]]()
    for name, weight in model.named_parameters():
        found = [text for text, (pattern, _) in parsed.items() if pattern.match(name)]
        unused -= set(found)
        weight.requires_grad_(bool(found))
        ranges = [rows for text in found if (rows := parsed[text][1]) is not None]
        if ranges:
            kept.append(_freeze_rows(name, weight, ranges))
            named.setdefault(_rows_text(ranges), []).append(name)
    names = [name for name, _ in model.named_parameters()]
    if len(unused) == len(parsed):
        raise _no_weight(list(parsed), names)
    for text in patterns:
        if text in unused and log is not None:
            log(f"warning: {KEY}: {text} names no weight of the model, such as {names[-1]}")
    if log is not None:
        for text, weights in named.items():
            more = f" and {counted(len(weights) - 1, 'more weight')}" if len(weights) > 1 else ""
            log(f"{KEY}: trains {text} of {weights[0]}{more}")
    model.attnimg_frozen_rows = [rows for rows in kept if rows is not None]


def _rows_text(ranges: Sequence[tuple[int, int | None]]) -> str:
    """Return the rows of some ranges as text, such as "rows 0-99, 120-129"."""
    texts = []
    for first, last in sorted(set(ranges), key=lambda found: found[0]):
        if last is None:
            texts.append(f"{first:,} to the last")
        else:
            texts.append(f"{first:,}" if last == first + 1 else f"{first:,} to {last - 1:,}")
    single = len(texts) == 1 and " " not in texts[0]
    return f"{'row' if single else 'rows'} {', '.join(texts)}"


def frozen_elements(model: Any) -> dict[int, int]:
    """Return id of a weight -> its elements in frozen rows."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        id(frozen.weight): int(frozen.rows.sum()) * frozen.weight[0].numel()
        for frozen in getattr(base, "attnimg_frozen_rows", [])
    }


def _freeze_rows(
    name: str, weight: torch.nn.Parameter, ranges: Sequence[tuple[int, int | None]]
) -> FrozenRows | None:
    """Set the gradients of all rows outside of ranges to 0; None where no row is left."""
    import torch

    count = len(weight)
    frozen = torch.ones(count, dtype=torch.bool)
    for first, last in ranges:
        if first >= count or (last or 0) > count:
            raise bad_value(
                KEY,
                f"{KEY}: {name} has fewer rows than named",
                why=f"found {counted(count, 'row')}; needed {max(first + 1, last or 0):,}",
                do=f"name rows below {count} in {KEY}",
            )
        frozen[first:last] = False
    if not frozen.any():
        return None
    shape = (count, *[1] * (weight.dim() - 1))

    # Before the gradient is accumulated, and so before processes exchange it.
    def without_frozen(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.masked_fill(frozen.to(gradient.device).view(shape), 0)

    weight.register_hook(without_frozen)
    return FrozenRows(weight=weight, rows=frozen, values=weight.detach()[frozen].clone())


def restore_after_steps(model: Any, optimizer: Any) -> None:
    """Restore the frozen rows of a model after each step of an optimizer."""
    rows: list[FrozenRows] = getattr(model, "attnimg_frozen_rows", [])
    if not rows:
        return

    def restore(*_: Any) -> None:
        for frozen in rows:
            frozen.restore()

    optimizer.register_step_post_hook(restore)


def require_trained_weights(model: Any) -> None:
    """Raise unless a weight of the language model is trained.

    Raises:
        AttnimgError: code bad-value.
    """
    if not any(weight.requires_grad for weight in model.parameters()):
        raise bad_value(
            KEY,
            f"{KEY} names no weight of the language model",
            why="found only weights of other parts, which get no gradients from text",
            do=f"name weights of the language model in {KEY}, or remove it",
        )


def _no_weight(patterns: Sequence[str], names: Sequence[str]) -> AttnimgError:
    return bad_value(
        KEY,
        f"{KEY} names no weight, so that nothing would be trained",
        why=f"found {', '.join(patterns)}; a pattern must match the beginning of a name, such as "
        f"{', '.join(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))}",
        do=f"set {KEY}: ['^{names[-1]}$'], or remove it",
    )
