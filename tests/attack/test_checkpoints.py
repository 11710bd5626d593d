"""Attack with checkpoints: each is resumed bit for bit, or refused in words; no code of it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attacked import Outcome
from damages import KINDS, code_in, plain_code_in, replaced
from generated import DAMAGES, ODD, try_cases
from hypothesis import strategies as st
from trainer_format import to_trainer_format

from attnimg.train.checkpoint import FileHasher, write_manifest

KEYS: dict[str, Any] = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 4,
    "adapter": "lora", "lora_dropout": 0.3, "lora_r": 4,
}  # fmt: skip
LAST, BEFORE = "checkpoint-3", "checkpoint-2"
WEIGHTS = "adapter_model.safetensors"
PLACED = {
    **{kind: partial(replaced, kind=kind) for kind in KINDS},
    "code": code_in,
    "plain code": plain_code_in,
}
ADDED = ("pytorch_model.bin", "adapter_model.bin", "model.safetensors", "optimizer.pt",
         "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_1.json", "scaler.pt",
         "training_args.bin", "x/adapter_model.bin", "notes.pkl", "global_step3/a.pt")  # fmt: skip
MODES = (0o000, 0o222, 0o444, 0o666, 0o777)


@dataclass(frozen=True, kw_only=True)
class DamageCase:
    """A damage to the newest checkpoint.

    Attributes:
        kind: of damage.
        name: of the file.
        change: the new content, mode or JSON value, with the place of the value.
        signed: whether the manifest is made to agree, as whoever writes to the folder can.
        by_name: whether the checkpoint is named, not `true`.
        earlier: whether it is in the format of transformers' Trainer, without a manifest.
    """

    kind: str
    name: str
    change: Any
    signed: bool
    by_name: bool
    earlier: bool


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the places of all values in a JSON value; long lists have their first two alone."""
    inside = value.items() if isinstance(value, dict) else (
        list(enumerate(value))[:2] if isinstance(value, list) else ())  # fmt: skip
    return [at, *(place for key, found in inside for place in places(found, (*at, key)))]


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """Return a JSON value with another one at a place."""
    if not at:
        return new
    value[at[0]] = put(value[at[0]], at[1:], new)
    return value


def test_checkpoints(
    train: Callable[..., Outcome],
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    whole, other, old = (tmp_path / name for name in ("whole", "other", "old"))
    for folder, keys in ((whole, {}), (other, {"seed": 3})):
        folder.mkdir()
        done = train(folder, **KEYS, **keys)
        assert done.code == 0, done.err
    shutil.copytree(whole, old)
    for name in (LAST, BEFORE):
        to_trainer_format(old / "out" / name)
    needed = (whole / "out" / WEIGHTS).read_bytes()
    texts = {  # what may be changed in each JSON file of each format
        (source, path.name): places(json.loads(path.read_text()))
        for source in (whole, old) for path in (source / "out" / LAST).glob("*.json")
    }  # fmt: skip

    @st.composite
    def cases(draw: st.DrawFn) -> DamageCase:
        earlier = draw(st.integers(0, 3)) == 0
        source = (old if earlier else whole) / "out" / LAST
        names = sorted(path.name for path in source.iterdir())
        kind = draw(st.sampled_from(
            ["bytes", "bytes", "value", "value", "placed", "of another step", "of another run",
             "added", "mode", "renamed", "untouched"]
        ))  # fmt: skip
        name = draw(st.sampled_from(names))
        change: Any = None
        if kind == "bytes":
            change = draw(DAMAGES)
        elif kind == "value":
            name = draw(st.sampled_from([name for name in names if name.endswith(".json")]))
            at = draw(st.sampled_from(texts[source.parents[1], name]))
            change = at, draw(ODD)
        elif kind == "placed":
            change = draw(st.sampled_from(sorted(PLACED)))
        elif kind == "added":
            name, change = draw(st.sampled_from(ADDED)), draw(st.sampled_from([b"", b"x", "code"]))
        elif kind == "mode":
            change = draw(st.sampled_from(MODES))
        signed = draw(st.booleans()) and kind in ("bytes", "value", "of another step") and (
            name != "manifest.json" and not earlier)  # fmt: skip
        return DamageCase(kind=kind, name=name, change=change, signed=signed,
                    by_name=draw(st.booleans()), earlier=earlier)  # fmt: skip

    def damage(case: DamageCase, out: Path) -> None:
        place = out / LAST
        path = place / case.name
        if case.kind == "bytes":
            path.write_bytes(case.change.of(path.read_bytes()))
        elif case.kind == "value":
            at, new = case.change
            path.write_text(json.dumps(put(json.loads(path.read_text()), at, new)))
        elif case.kind == "placed":
            PLACED[case.change](case.name)(place)
        elif case.kind == "of another step":
            shutil.copy(out / BEFORE / case.name, path)
        elif case.kind == "of another run":
            if (other / "out" / LAST / case.name).exists():
                shutil.copy(other / "out" / LAST / case.name, path)
        elif case.kind == "added":
            path.parent.mkdir(exist_ok=True)
            if case.change == "code":
                code_in(case.name)(place)
            else:
                path.write_bytes(case.change)
        elif case.kind == "mode":
            path.chmod(case.change)
        elif case.kind == "renamed":
            place.rename(out / "checkpoint-9")
            shutil.copytree(out / BEFORE, place)
        if case.signed:
            with FileHasher() as hashes:
                write_manifest(place, hashes, step=3, processes=1)

    def judge(case: DamageCase) -> str:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = tmp_path / "run"
        for name in (BEFORE, LAST):
            shutil.copytree((old if case.earlier else whole) / "out" / name, run / "out" / name)
        try:
            damage(case, run / "out")
        except (ValueError, KeyError, TypeError):
            return ""  # the manifest can't be written again for such a file
        asked: Any = str(run / "out" / LAST) if case.by_name else True
        outcome = train(run, **KEYS, resume_from_checkpoint=asked)
        if outcome.fault:
            return outcome.fault_with_text
        if (run / "out" / "ran").exists():
            return "code of it ran"
        if outcome.code:
            harmless = case.kind in ("untouched", "mode")
            return f"a whole one is refused: {outcome.err[-600:]!a}" if harmless else ""
        # Nothing tells who wrote what is signed, or has no manifest.
        believed = case.signed or (case.earlier and "has no manifest" in outcome.err)
        same = (run / "out" / WEIGHTS).read_bytes() == needed
        return "" if same or believed else "other weights were loaded without an error"

    try_cases("checkpoints", cases(), judge, record=record_property, count=6)
