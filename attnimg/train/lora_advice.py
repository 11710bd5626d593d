"""Find the config edits after which PEFT accepts the adapter's targets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from attnimg.config.schema import Config
from attnimg.train.lora_targets import adaptable, expert_names, last_part, listed, matched


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """The modules that an adapter can be put on, before PEFT changes the model.

    Attributes:
        linear: names of all linear layers except the output layer.
        named: names of the layers that an adapter can be put on, in and below the run's targets.
        whole: targets that only lora_modules_to_save can train, such as norms: modules with weights
            but without such a layer.
    """

    linear: list[str]
    named: list[str]
    whole: list[str]


def find_fitting(model: Any, config: Config) -> Fitting:
    """Return the modules that an adapter of a run can be put on."""
    targets = config.lora_target_modules or []
    layers = [*adaptable(model), *expert_names(model)]
    found, whole = set[str](), set[str]()
    for name, module in model.named_modules():
        if not _matches(targets, name):
            continue
        below = {layer for layer in layers if layer == name or layer.startswith(f"{name}.")}
        found |= below
        if not below and any(True for _ in module.parameters(recurse=False)):
            whole.add(last_part(name))
    return Fitting(
        linear=_shortened(adaptable(model, linear=True), layers),
        named=_shortened(found, layers),
        whole=sorted(whole),
    )


def advice_on(fitting: Fitting, config: Config, error: Exception) -> str:
    """Return the edits of the config after which an adapter fits.

    Source: peft 0.21.2, tuners/lora/layer.py, ParamWrapper.__init__, and
    utils/transformers_weight_conversion.py, _convert_peft_config_moe (2026-11-27).

    Args:
        fitting: of the model before PEFT changed it.
        config: the validated run.
        error: what PEFT raised.
    """
    said, targets = str(error), config.lora_target_modules
    linear, whole = fitting.linear, list[str]()
    if "lora_dropout" in said:
        return f"set lora_dropout: 0.0\nor set lora_target_modules: {listed(linear)}"
    if "use_dora" in said:
        return f"set peft_use_dora: false\nor set lora_target_modules: {listed(linear)}"
    if "without also targeting" in said and isinstance(targets, list):
        partners = re.findall(r"\w+", said.partition("also targeting ")[2].partition(" because")[0])
        linear = list(dict.fromkeys([*targets, *partners]))
    elif said.startswith("Target module ") and targets:
        linear, whole = fitting.named or linear, fitting.whole
    else:
        linear = [name for name in linear if f"'{name}'" not in said]
    do = f"set lora_target_modules: {listed(linear)}"
    saved = [*(config.lora_modules_to_save or ()), *whole]
    return f"{do}\nset lora_modules_to_save: {listed(saved)}" if whole else do


def _matches(targets: list[str] | str, name: str) -> bool:
    """Return whether targets match the full name of a module, by PEFT's rule."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(matched(entry, [name]) for entry in targets)


def _shortened(names: Any, layers: list[str]) -> list[str]:
    """Return the last parts of names; full names where other layers have the same last part."""
    others = {last_part(layer) for layer in layers if layer not in names}
    return sorted({name if last_part(name) in others else last_part(name) for name in names})
