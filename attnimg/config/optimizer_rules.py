"""Check the keys on the optimizer and the learning rate; see rules.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

from attnimg.config.dataset_rules import Rule, bad_value
from attnimg.config.schema import Config
from attnimg.facts import Finding

# Schedules that need an argument: its possible names, and an example value.
SCHEDULER_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "cosine_with_min_lr": (("min_lr", "min_lr_rate"), "1e-6"),
    "warmup_stable_decay": (("num_decay_steps",), "10"),
}
# The arguments in optim_args that an optimizer reads, and their types. weight_decay is not one of
# them: each group of weights has its own. Neither is torchao's block_size, a number that
# transformers passes as text.
# Source: transformers 5.22.2, trainer_optimizer.py, _get_sgd, _get_adagrad, _get_rmsprop and
# _get_torchao_optimizer (2026-11-27)
OPTIMIZER_ARGUMENTS: dict[str, dict[str, type]] = {
    "sgd": {"momentum": float, "dampening": float, "nesterov": bool},
    "adagrad": {"lr_decay": float, "eps": float},
    "rmsprop": {"momentum": float, "alpha": float, "eps": float, "centered": bool},
    "adamw_torch_8bit": {"bf16_stochastic_round": bool},
    "adamw_torch_4bit": {"bf16_stochastic_round": bool},
}
# Keys that only the cosine schedule reads, and what they add to it.
_COSINE_KEYS = {
    "cosine_min_lr_ratio": "a minimum learning rate",
    "eta_min": "a minimum learning rate",
    "cosine_constant_lr_ratio": "a constant end",
    "lr_quadratic_warmup": "a quadratic warmup",
}


def _schedule(config: Config) -> Iterator[Finding]:
    name = config.lr_scheduler
    used = [key for key in _COSINE_KEYS if getattr(config, key) not in (None, False)]
    for key in used if name != "cosine" else ():
        do = f"set lr_scheduler: cosine, or remove {key}"
        what = f"{key} contradicts lr_scheduler: {name}"
        yield bad_value(key, what, f"only the cosine schedule has {_COSINE_KEYS[key]}", do)
    if name == "cosine":
        yield from _cosine(config)
    needed, value = SCHEDULER_NEEDS.get(name, ((), ""))
    if needed and not set(needed) & set(config.lr_scheduler_kwargs or {}):
        key = "lr_scheduler_kwargs"
        do = f"set {key}: {{{needed[0]}: {value}}}"
        what = f"lr_scheduler: {name} needs {key}"
        yield bad_value(key, what, f"needed {' or '.join(needed)}", do)


def _optimizer(config: Config) -> Iterator[Finding]:
    """Yield errors: arguments that the optimizer does not accept, and duplicate names in lr_groups.

    axolotl passes any arguments; transformers leaves out those that it does not know.
    """
    key, values = "optim_args", config.optim_args or {}
    known = OPTIMIZER_ARGUMENTS.get(config.optimizer, {})
    for name, value in values.items():
        if name not in known:
            rest = {other: values[other] for other in values if other in known}
            do = f"set {key}: {_as_yaml(rest)}" if rest else f"remove {key}"
            why = f"found {name}; it reads {', '.join(known) or 'none'} from {key}"
            if name in Config.model_fields:
                why += f", and {name} is a key of its own"
            yield bad_value(key, f"optimizer: {config.optimizer} does not read {name} of {key}",
                             why, do)  # fmt: skip
        elif not _is_argument(value, known[name]):
            needed = "true or false" if known[name] is bool else "a number of at least 0"
            yield bad_value(key, f"{key}.{name} has an invalid value",
                             f"found {value!r}; needed {needed}", f"remove {key}")  # fmt: skip
    if values.get("nesterov") is True and (not values.get("momentum") or values.get("dampening")):
        yield bad_value(key, f"{key}.nesterov needs momentum, and no dampening",
                         f"found {_as_yaml(values)}",
                         f"set {key}: {{momentum: 0.9, nesterov: true}}")  # fmt: skip
    names = [group.name for group in config.lr_groups or ()]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        yield bad_value("lr_groups", "lr_groups has several groups of one name",
                         f"found {repeated[0]} {names.count(repeated[0])} times, needed once",
                         "rename or remove groups in lr_groups")  # fmt: skip


def _is_argument(value: object, kind: type) -> bool:
    """Return whether a value of optim_args is a boolean or a number of at least 0, as needed."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int | float) and 0 <= value < math.inf


def _as_yaml(values: dict[str, object]) -> str:
    """Return a mapping as YAML on one line."""
    pairs = (f"{key}: {str(value).lower()}" for key, value in values.items())
    return f"{{{', '.join(pairs)}}}"


def _cosine(config: Config) -> Iterator[Finding]:
    """Yield errors: keys of the cosine schedule that contradict one another."""
    key = "cosine_constant_lr_ratio"
    if config.cosine_constant_lr_ratio and not config.cosine_min_lr_ratio:
        why = "it is the share of the steps after which the learning rate stays at its minimum"
        do = f"set cosine_min_lr_ratio: 0.1, or remove {key}"
        yield bad_value(key, f"{key} needs cosine_min_lr_ratio", why, do)
    if config.eta_min and config.eta_min > (config.learning_rate or math.inf):
        key, why = "eta_min", f"found {config.eta_min} and learning_rate: {config.learning_rate}"
        yield bad_value(key, f"{key} is above learning_rate", why, f"remove {key}")
    variant = next((key for key in ("lr_quadratic_warmup", "cosine_constant_lr_ratio")
                    if getattr(config, key)), None)  # fmt: skip
    if variant is None:
        return
    # Source: axolotl 0.19.0, core/trainers/mixins/scheduler.py, create_scheduler, which ignores
    # what is refused here (2026-11-27).
    others = ["eta_min", "lr_scheduler_kwargs"]
    if variant == "lr_quadratic_warmup":
        others += ["cosine_min_lr_ratio", "cosine_constant_lr_ratio"]
    for key in others:
        if getattr(config, key):
            why = f"found both; the cosine with {variant} does not read {key}"
            yield bad_value(key, f"{key} contradicts {variant}", why, f"keep {key} or {variant}")


OPTIMIZER_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (_schedule, ("lr_scheduler", "lr_scheduler_kwargs")),
    (_optimizer, ("optimizer", "optim_args", "lr_groups")),
)
