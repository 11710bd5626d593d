"""Compare a run with the checkpoint it resumes from: print allowed changes, refuse the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, KernelError, set_backend
from attnimg.train import checkpoint as checkpoints
from attnimg.train.identity import CHANGEABLE, evaluation_decides, settings_of
from attnimg.train.lora import targeted
from attnimg.train.model import load_without_weights

# Keys of the config in the identity that attnimg 0.1.0 wrote, next to processes, rows and tokens.
EARLIER_KEYS = ("micro_batch_size", "gradient_accumulation_steps", "seed")

# Keys that name the modules of an adapter, in several ways.
TARGETS = frozenset({"lora_target_modules", "lora_target_linear"})

# Backends that do not compute exact attention.
INEXACT = frozenset({"s2", "fp8", "sage", "kernels-community/sage-attention"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A difference between a run and its checkpoint.

    Attributes:
        key: key of the config.
        before: its value in the checkpoint's run.
        now: its value in this run.
        revert: the edit that removes the difference.
    """

    key: str
    before: object
    now: object
    revert: str


def identity_in(checkpoint: Path) -> dict[str, Any]:
    """Return the identity in a checkpoint; empty if another program wrote it."""
    found: Any = checkpoints.read_state(checkpoint).get("identity", {})
    if not found or "keys" in found:
        return dict(found)
    keys = {key: found[key] for key in EARLIER_KEYS if key in found}
    return {"keys": keys, **{key: found[key] for key in found if key not in EARLIER_KEYS}}


def check_settings(config: Config, point: checkpoints.ResumePoint | None) -> None:
    """Raise if a run resumes with other keys or another model, before anything is loaded.

    Raises:
        AttnimgError: a key that changes the result differs (resume-differs), or max_steps ends
            before the checkpoint (resume-past-end).
    """
    if point is None or point.path is None:
        return
    require_same(settings_of(config), config, point)
    if config.max_steps:
        require_steps(config.max_steps, config, point)


def require_steps(total: int, config: Config, point: checkpoints.ResumePoint | None) -> None:
    """Raise if a run would end before the checkpoint that it resumes from.

    Raises:
        AttnimgError: code resume-past-end.
    """
    if point is None or point.path is None or total >= point.step:
        return
    key = "max_steps" if config.max_steps else "num_epochs"
    raise AttnimgError(
        f"{key} ends the run before the checkpoint it resumes from",
        why=f"found {key}: {as_yaml(getattr(config, key))}, which is step {total}; "
        f"{point.path.name} was written after step {point.step}",
        do=f"set max_steps: {point.step} to keep the model of {point.path.name}, or a "
        "higher number to continue training",
        code="resume-past-end",
        key=key,
    )


def require_same(
    now: Mapping[str, Any], config: Config, point: checkpoints.ResumePoint | None
) -> None:
    """Raise if a run resumes with another identity; parts that one of them lacks are not compared.

    Raises:
        AttnimgError: code resume-differs, with each changed key and both values.
    """
    if point is None or point.path is None:
        return
    before = identity_in(point.path)
    changes = _refused(before, now)
    if TARGETS & {change.key for change in changes} and _same_targets(config, before["keys"]):
        changes = [change for change in changes if change.key not in TARGETS]
    if not changes:
        return
    name = point.path.name
    keys = ", ".join(change.key for change in changes)
    new_run = "set another output_dir"
    if config.resume_from_checkpoint:
        new_run += " and remove resume_from_checkpoint"
    why = [f"{c.key}: found {as_yaml(c.now)}; {name} was trained with {as_yaml(c.before)}"
           for c in changes]  # fmt: skip
    raise AttnimgError(
        f"{name} can't be resumed with another {keys}",
        why="\n".join(why),
        do="\n".join((*(change.revert for change in changes), f"or, for a new run, {new_run}")),
        code="resume-differs",
        key=changes[0].key,
    )


def accepted_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the changed keys whose new values are used."""
    return [change for change in _changed_keys(before, now) if change.key in CHANGEABLE]


def resume_notes(before: Mapping[str, Any], now: Mapping[str, Any], *, name: str) -> list[str]:
    """Return lines for the user on accepted changes, and on what can't be compared.

    Args:
        before: the checkpoint's identity.
        now: the run's.
        name: the checkpoint's.
    """
    said = [
        f"{c.key}: {as_yaml(c.before)} until {name}, {as_yaml(c.now)} from here on"
        for c in accepted_changes(before, now)
    ]
    if not evaluation_decides(now.get("keys", {})):
        said += [
            f"warning: {change.key}: found {as_yaml(change.now)}; {name} was evaluated on "
            f"{as_yaml(change.before)}: eval_loss before and after cannot be compared"
            for change in _data(before, now, "evaluation")
        ]
    said += _kernel_notes(before, now, name=name)
    lacking = {"model": "base_model", "data": "datasets", "attention": "attention"}
    unknown = [text for part, text in lacking.items() if before.get(part) is None]
    if "learning_rate" not in before.get("keys", {}):
        unknown = ["learning_rate and the other keys", *unknown]
    if unknown:
        said.append(
            f"warning: {name} does not record all of its run: {', '.join(unknown)} can't be "
            "compared; those of this config are used"
        )
    for part, text in (("attention", "results differ by rounding only"),
                       ("processes", "dropout uses other random numbers"),
                       ("rows", "a step sees other rows"),
                       ("tokens", "a step sees other rows")):  # fmt: skip
        if part in before and before[part] != now[part]:
            said.append(f"warning: {part}: {before[part]} until {name}, {now[part]} now: {text}")
    return said


def apply_config(engine: Any, config: Config, before: Mapping[str, Any]) -> None:
    """Make a resumed engine use the config's learning rate, number of steps and intervals.

    transformers restores all three from the checkpoint. An unchanged config changes nothing.

    Args:
        engine: the engine, after transformers restored it.
        config: the validated run.
        before: the checkpoint's identity.
    """
    engine.state.compute_steps(engine.args, engine.state.max_steps)
    scheduler, groups = engine.lr_scheduler, engine.optimizer.param_groups
    rate = float(config.learning_rate or 0)
    if not hasattr(scheduler, "lr_lambdas"):  # reduce_lr_on_plateau: keep its reductions so far
        then = before.get("keys", {}).get("learning_rate", rate)
        for group in groups if then != rate else ():
            _set(group, "lr", float(group["lr"]) / then * rate)
        return
    scheduler.base_lrs = [rate] * len(groups)
    rates = [rate * at(scheduler.last_epoch) for at in scheduler.lr_lambdas]
    for group, now in zip(groups, rates, strict=True):
        group["initial_lr"] = rate
        _set(group, "lr", now)
    scheduler._last_lr = [group["lr"] for group in groups]


def _changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the keys that both have with different values."""
    there, here = before.get("keys", {}), now.get("keys", {})
    return [
        Change(
            key=key,
            before=there[key],
            now=here[key],
            revert=f"set {key}: {as_yaml(there[key])}" if there[key] is not None
            else f"remove {key}",
        )
        # A key that only one of them has is newer than the checkpoint, or implied by another key.
        for key in sorted(there.keys() & here.keys())
        if there[key] != here[key]
    ]  # fmt: skip


def _refused(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the changes that would change the result."""
    changes = [change for change in _changed_keys(before, now) if change.key not in CHANGEABLE]
    decides = evaluation_decides(now.get("keys", {}))
    return [*_batch(changes, before, now), *_files("model", "base_model", before, now),
            *_files("tokenizer", "tokenizer_config", before, now), *_data(before, now, "data"),
            *(_data(before, now, "evaluation") if decides else ()),
            *_computed(before, now)]  # fmt: skip


def _same_targets(config: Config, before: Mapping[str, Any]) -> bool:
    """Return whether the adapter of another run is on the same modules of this model."""
    then = config.model_copy(update={key: before.get(key) for key in TARGETS})
    try:
        model = load_without_weights(config)
        return model is not None and targeted(model, config) == targeted(model, then)
    except AttnimgError:  # the refused change is reported first
        return False


def _batch(
    changes: list[Change], before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[Change]:
    """Return the changes that alter the batch; only processes * accumulation steps matters."""
    key = "gradient_accumulation_steps"
    then, here = before.get("processes"), now.get("processes")
    if None in (then, here) or then == here:
        return changes
    others = [change for change in changes if change.key != key]
    steps, found = before["keys"][key], now["keys"][key]
    if steps * then == found * here:
        return others
    revert = f"start {then} processes with {key}: {steps}"
    if steps * then % here == 0:
        revert = f"set {key}: {steps * then // here}"
    before_text, now_text = f"{steps} in {then} process(es)", f"{found} in {here}"
    return [*others, Change(key=key, before=before_text, now=now_text, revert=revert)]


def _files(part: str, key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the changes in the files of the model or the tokenizer; their folder may differ.

    Args:
        part: "model" or "tokenizer".
        key: the config's, which names the folder.
        before: the checkpoint's identity; one that lacks the part is not compared.
        now: the run's.
    """
    then, here = before.get(part) or {}, now.get(part) or {}
    if "files" not in then or "files" not in here:
        return []
    names = then["files"].keys() | here["files"].keys()
    if part == "tokenizer":
        # Versions of transformers download different files of a repository. Where that changes the
        # tokens, the data differs as well.
        names = then["files"].keys() & here["files"].keys()
    names = sorted(name for name in names if then["files"].get(name) != here["files"].get(name))
    if not names:
        return []
    moved = then["path"] != here["path"] or then["revision"] != here["revision"]
    revert = f"set {key}: {as_yaml(then['path'])}"
    if then["revision"]:
        revert += f" and revision_of_model: {as_yaml(then['revision'])}"
    return [
        Change(
            key=key,
            before=_named_hashes(then, names),
            now=_named_hashes(here, names),
            revert=revert
            if moved
            else f"put the earlier {', '.join(names[:3])} back into {here['path']}",
        )
    ]


def _named_hashes(side: Mapping[str, Any], names: list[str]) -> str:
    """Return a text: a folder, with the start of the SHA-256 of some of its files."""
    hashes = [f"{name} {side['files'].get(name, 'missing')[:12]}" for name in names[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{side['path']} ({', '.join(hashes)}{more})"


def _data(before: Mapping[str, Any], now: Mapping[str, Any], part: str) -> list[Change]:
    """Return the sources whose documents differ from those of the checkpoint's run.

    Args:
        before: the checkpoint's identity; one that lacks the part is not compared.
        now: the run's.
        part: "data" to train on, or "evaluation".
    """
    if before.get(part) is None or part not in now:
        return []
    then = {source["key"]: source for source in before[part]}
    here = {source["key"]: source for source in now[part]}
    if [source["content"] for source in then.values()] == [
        source["content"] for source in here.values()
    ]:
        return []
    changes = []
    for key in sorted(then.keys() | here.keys()):
        old, new = then.get(key), here.get(key)
        if old is None or new is None:
            there = as_yaml(old["spec"]) if old else ""
            revert = f"add {key}: {there}" if old else f"remove {key}"
            changes.append(Change(key=key, before=old and old["spec"], now=new and new["spec"],
                                  revert=revert))  # fmt: skip
        elif old["content"] != new["content"] and not _dated(old, new):
            changes += _source(key, old, new)
    return changes


def _dated(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether a source differs only by the date that its template writes."""
    same = ("dated", "spec", "read", "documents")
    return bool(old["dated"]) and all(old.get(name) == new.get(name) for name in same)


def _source(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return the changed fields of a source, or its changed content."""
    fields = [
        name
        for name in sorted(old["spec"].keys() | new["spec"].keys())
        if old["spec"].get(name) != new["spec"].get(name)
    ]
    if not fields:
        texts = [f"{side['documents']} documents, {side['tokens']} tokens, content "
                 f"{side['content'][:12]}" for side in (old, new)]  # fmt: skip
        revert = (
            f"put the earlier files of {as_yaml(new['spec'].get('path'))} and of its tokenizer back"
        )
        return [Change(key=key, before=texts[0], now=texts[1], revert=revert)]
    return [
        Change(
            key=f"{key}.{name}",
            before=old["spec"].get(name),
            now=new["spec"].get(name),
            revert=f"set {key}.{name}: {as_yaml(old['spec'][name])}" if name in old["spec"]
            else f"remove {key}.{name}",
        )
        for name in fields
    ]  # fmt: skip


def _computed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return a change of precision, and of attention to or from an INEXACT backend."""
    changes = []
    then, here = before.get("precision"), now.get("precision")
    if then and here and then != here:
        key = "fp16" if "float16" in then.split() else "bf16"
        value = {"float32": "false", "bfloat16": "full"}.get(then, "true")
        changes.append(Change(key=key, before=then, now=here, revert=f"set {key}: {value}"))
    then, here = before.get("attention"), now.get("attention")
    if then and here and then != here and {then, here} & INEXACT:
        changes.append(
            Change(key=KernelError.default_key, before=then, now=here, revert=set_backend(then))
        )
    return changes


def _kernel_notes(before: Mapping[str, Any], now: Mapping[str, Any], *, name: str) -> list[str]:
    """Return a line for each backend whose files changed since a checkpoint."""
    then, here = before.get("kernels") or {}, now.get("kernels") or {}
    notes = []
    for backend in sorted(then.keys() & here.keys()):
        old, new = then[backend] or {}, here[backend] or {}
        parts = sorted(part for part in old.keys() | new.keys() if old.get(part) != new.get(part))
        if parts:
            texts = [
                ", ".join(f"{part} {side.get(part, 'none')[:12]}" for part in parts)
                for side in (old, new)
            ]
            notes.append(
                f"warning: the files of {backend} changed: {texts[0]} until {name}, {texts[1]} "
                "now: results may differ"
            )
    return notes


def _set(group: dict[str, Any], key: str, value: float) -> None:
    """Set a value of an optimizer; torchao's optimizers keep theirs in a tensor."""
    if hasattr(group[key], "fill_"):
        group[key].fill_(value)
    else:
        group[key] = value


def as_yaml(value: object) -> str:
    """Return a value as YAML on one line."""
    if value is None:
        return "none"
    text: str = yaml.safe_dump(value, default_flow_style=True, width=2**16, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()
