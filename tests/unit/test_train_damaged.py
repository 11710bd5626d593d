"""Test that each damage to a checkpoint is named, and that harmless changes are accepted.

Most tests run only the check. Checkpoints that it accepts are resumed, and must train the same.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.run_facts import RunContext
from attnimg.train import fit
from attnimg.train.check import check_output_dir
from attnimg.train.checkpoint import FileHasher, ResumePoint, write_manifest
from attnimg.train.intact import find_damage, read_checkpoint_hash
from attnimg.train.model import load_model
from attnimg.train.pickled_weights import convert

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from damages import (
    Damage,
    code_in,
    cut,
    edited,
    flipped,
    longer,
    of_step_2,
    plain_code_in,
    replaced,
    signed,
    written,
)
from tiny_run import make_model, run
from trainer_format import to_trainer_format

# Dropout and the optimizer's moments make a lost state show in the weights.
KEYS: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "adapter": "lora", "lora_dropout": 0.2,
                        "learning_rate": 1e-2}  # fmt: skip
ADAPTER = "adapter_model.safetensors"
FILES = (ADAPTER, "adapter_config.json", "optimizer.json", "optimizer-1.safetensors",
         "scheduler.json", "rng_state.json", "trainer_state.json", "attnimg.json",
         "tokenizer.json", "manifest.json")  # fmt: skip
CONTEXT = RunContext(
    dtype="float32", autocast=None, packing=False, padding_free=False, rows=1, sequence_len=8,
    compiled=False, checkpointing=False, seq_idx=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    run(tiny, out, **KEYS)
    return out


@pytest.fixture(scope="module")
def earlier(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints as attnimg 0.1.0 wrote them."""
    out = tmp_path_factory.mktemp("earlier") / "out"
    for step in (2, 4):
        shutil.copytree(trained / f"checkpoint-{step}", out / f"checkpoint-{step}")
        to_trainer_format(out / f"checkpoint-{step}")
    return out


def copied(source: Path, out: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(source / f"checkpoint-{step}", out / f"checkpoint-{step}")
    return out


def resume_point(out: Path, *, name: str | None = None) -> ResumePoint:
    asked: Any = str(out / name) if name else True
    config = Config(base_model="m", output_dir=str(out), resume_from_checkpoint=asked)
    point = check_output_dir(config)
    assert point is not None
    return point


def add_file(content: dict[str, Any], name: str, size: object = 1) -> None:
    content["files"][name] = {"size": size, "sha256": "0" * 64}


def left_out(name: str) -> Damage:
    """Remove a file, also from the manifest."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        signed(lambda content: content["files"].pop(name))(folder)

    return damage


NAMED: dict[str, tuple[Damage, str]] = {
    **{f"a bit flipped in {name}": (flipped(name), name) for name in FILES},
    **{f"{name} cut off": (cut(name), name) for name in FILES},
    **{f"{name} emptied": (cut(name, left=0), name) for name in FILES},
    **{f"{name} removed": (replaced(name, "gone"), name) for name in FILES},
    **{f"{name} of another step": (of_step_2(name), name) for name in FILES if "rng" in name
       or name.startswith(("adapter_model", "optimizer", "scheduler", "trainer", "attn"))},
    "manifest.json of another step": (of_step_2("manifest.json"), "the manifest: found step 2"),
    "a byte added": (longer(ADAPTER), f"{ADAPTER}: found "),
    "global_step changed": (edited("trainer_state.json", global_step=3), "trainer_state.json"),
    "global_step negative": (edited("trainer_state.json", global_step=-1), "trainer_state.json"),
    "global_step a text": (edited("trainer_state.json", global_step="4"), "trainer_state.json"),
    "the optimizer's step changed": (edited("optimizer.json", step=3), "optimizer.json"),
    "a pipe for the weights": (replaced(ADAPTER, "pipe"), "pipe"),
    "a pipe for the manifest": (replaced("manifest.json", "pipe"), "manifest.json: it can't"),
    "a socket for the optimizer": (replaced("optimizer.json", "socket"), "optimizer.json: "),
    "a folder for the schedule": (replaced("scheduler.json", "folder"), "Is a directory"),
    "a link to a device": (replaced("rng_state.json", "device"), "a device"),
    "a link to nothing": (replaced("rng_state.json", "nowhere"), "it is missing"),
    "a link to itself": (replaced("rng_state.json", "itself"), "rng_state.json: "),
    "a link of the manifest to nothing": (replaced("manifest.json", "nowhere"), "manifest.json: "),
    "no JSON as manifest": (written("manifest.json", "{" * 5000), "manifest.json: "),
    "a list as manifest": (written("manifest.json", "[]"), "manifest.json: "),
    "binary as manifest": (written("manifest.json", b"\xff\0" * 99), "manifest.json: "),
    "an endless manifest": (replaced("manifest.json", "device"), "manifest.json: "),
    "a manifest with another step": (edited("manifest.json", step=3), "manifest.json: "),
    "a manifest without files": (edited("manifest.json", files=None), "manifest.json: "),
    "a signed manifest of another step": (
        signed(lambda content: content.update(step=3)), "the manifest: found step 3, needed 4"),
    "an optimizer of another step": (
        signed(lambda content: content["parts"].update(optimizer=2)), "optimizer: found step 2"),
    "a negative step": (
        signed(lambda content: content["parts"].update(rng=-4)), "rng: found step -4"),
    "a step that is a text": (
        signed(lambda content: content.update(step="4")), "manifest.json: "),
    "a negative size": (
        signed(lambda content: add_file(content, "x", -1)), "manifest.json: "),
    "a size that is a text": (
        signed(lambda content: add_file(content, "x", "1")), "manifest.json: "),
    "a hash that is none": (
        signed(lambda content: content["files"][ADAPTER].update(sha256=7)), "manifest.json: "),
    "a name that leads out": (
        signed(lambda content: add_file(content, "../../etc/passwd")), "manifest.json: "),
    "an absolute name": (
        signed(lambda content: add_file(content, "/etc/passwd")), "manifest.json: "),
    "a name with NUL": (signed(lambda content: add_file(content, "a\0b")), "manifest.json: "),
    "a name that is no text": (
        signed(lambda content: add_file(content, "\ud800")), "manifest.json: "),
    "files in a list": (signed(lambda content: content.update(files=[])), "manifest.json: "),
    "a name that is too long": (
        signed(lambda content: add_file(content, "a" * 300)), "it can't be read: "),
    "the random state left out": (left_out("rng_state.json"), "rng_state.json: it is not in the"),
    "the schedule left out": (left_out("scheduler.json"), "scheduler.json: it is not in the"),
    "trainer_state.json left out": (
        left_out("trainer_state.json"), "trainer_state.json: it is not in the"),
    "attnimg.json left out": (left_out("attnimg.json"), "attnimg.json: it is not in the"),
    "more processes": (
        signed(lambda content: content.update(processes=10**12)), "rng_state_0.json: it is not"),
    "processes that are a text": (
        signed(lambda content: content.update(processes="1")), "manifest.json: "),
    "pickled weights added": (code_in("pytorch_model.bin"), "pytorch_model.bin: found a file"),
    "other weights added": (written("model.safetensors", b"x"), "model.safetensors: found a file"),
    "an adapter added in a folder": (written("other/adapter_model.bin", b"x"),
                                     "other/adapter_model.bin: found a file"),
    "a pickled optimizer added": (code_in("optimizer.pt"), "optimizer.pt: found a file"),
    "a pickled optimizer in its place": (code_in("optimizer.json"), "optimizer.json: found "),
    "another process's random state": (written("rng_state_1.json", "{}"), "rng_state_1.json: "),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_damage_is_named_and_the_newest_whole_checkpoint_offered(
    trained: Path, tmp_path: Path, name: str
) -> None:
    damage, says = NAMED[name]
    out = copied(trained, tmp_path / "out", 2, 4)
    damage(out / "checkpoint-4")
    with pytest.raises(AttnimgError) as caught:
        resume_point(out, name="checkpoint-4")
    error = caught.value
    assert (error.code, error.exit_code) == ("damaged-checkpoint", 2)
    assert says in error.why
    assert error.do == ("set resume_from_checkpoint: true, which resumes from checkpoint-2, the "
                        "newest intact one")  # fmt: skip
    point = resume_point(out)  # as the advice says
    assert (point.path, point.step) == (out / "checkpoint-2", 2)
    assert point.damaged == (out / "checkpoint-4",)
    assert error.why.splitlines()[0] in point.notes[0]
    assert not (out / "ran").exists()


def other_times(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))


def read_only(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)


def moved_weights(folder: Path) -> None:
    (folder / ADAPTER).rename(folder.parent / "elsewhere")
    (folder / ADAPTER).symlink_to(folder.parent / "elsewhere")


HARMLESS: dict[str, Damage] = {
    "nothing": lambda _: None,
    "a README": written("NOTES.md", "the good one"),
    "what macOS adds": written(".DS_Store", b"\0" * 9),
    "results of another tool": written("results.json", "{"),
    "an empty folder": lambda folder: (folder / "plots").mkdir(),
    "a pipe of no name that is loaded": lambda folder: os.mkfifo(folder / "pipe"),
    "other times of change": other_times,
    "no right to write": read_only,
    "a link to the same weights": moved_weights,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_changes_are_accepted(trained: Path, tmp_path: Path, name: str) -> None:
    out = copied(trained, tmp_path / "out", 2, 4)
    HARMLESS[name](out / "checkpoint-4")
    point = resume_point(out)
    assert (point.path, point.damaged, point.notes) == (out / "checkpoint-4", (), ())


def test_an_undamaged_checkpoint_in_another_place_resumes_bit_for_bit(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    old = copied(trained, tmp_path / "old", 4) / "checkpoint-4"
    for name in ("a README", "what macOS adds", "other times of change", "no right to write"):
        HARMLESS[name](old)
    run(tiny, tmp_path / "new", **KEYS, resume_from_checkpoint=str(old))
    assert (tmp_path / "new" / ADAPTER).read_bytes() == (trained / ADAPTER).read_bytes()


def test_a_run_resumes_from_the_newest_whole_checkpoint_with_a_warning(
    tiny: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(trained, tmp_path / "out", 2, 4)
    flipped(ADAPTER)(out / "checkpoint-4")
    run(tiny, out, **KEYS, auto_resume_from_checkpoints=True)
    said = " ".join(capsys.readouterr().err.split())
    assert f"checkpoint-4 is damaged ({ADAPTER}: found SHA-256" in said
    assert "resuming from checkpoint-2, the newest intact one" in said
    assert "checkpoint-4 is renamed to checkpoint-4.damaged" in said
    assert (out / ADAPTER).read_bytes() == (trained / ADAPTER).read_bytes()
    assert resume_point(out).path == out / "checkpoint-6"
    assert (out / "checkpoint-4" / ADAPTER).read_bytes() == (
        trained / "checkpoint-4" / ADAPTER
    ).read_bytes(), "it was saved again"


def test_without_a_whole_checkpoint_nothing_is_trained(trained: Path, tmp_path: Path) -> None:
    out = copied(trained, tmp_path / "out", 2, 4)
    for step in (2, 4):
        replaced("scheduler.json", "gone")(out / f"checkpoint-{step}")
    for keys in ({"resume_from_checkpoint": True}, {"auto_resume_from_checkpoints": True}):
        with pytest.raises(AttnimgError, match="checkpoint-4 is damaged") as caught:
            check_output_dir(Config(base_model="m", output_dir=str(out), **keys))
        assert "scheduler.json: it is missing" in caught.value.why
        assert "no intact checkpoint" in caught.value.do
    copied(trained, tmp_path / "copy", 4)
    shutil.rmtree(out / "checkpoint-4")
    shutil.move(tmp_path / "copy/checkpoint-4", out)  # as the advice says
    assert resume_point(out).step == 4


def test_the_newest_whole_checkpoint_of_another_run_is_offered(
    trained: Path, tmp_path: Path
) -> None:
    old = copied(trained, tmp_path / "old", 2, 4)
    replaced(ADAPTER, "gone")(old / "checkpoint-4")
    keys = {"base_model": "m", "output_dir": str(tmp_path / "new")}
    with pytest.raises(AttnimgError) as caught:
        check_output_dir(Config(**keys, resume_from_checkpoint=str(old / "checkpoint-4")))
    assert caught.value.do == (
        f"set resume_from_checkpoint: {old}/checkpoint-2, the newest intact one"
    )
    point = check_output_dir(Config(**keys, resume_from_checkpoint=str(old / "checkpoint-2")))
    assert point is not None
    assert point.step == 2


def test_checkpoints_of_one_name_differ_by_the_hash_of_their_manifest(
    trained: Path, earlier: Path, tmp_path: Path
) -> None:
    copy = copied(trained, tmp_path / "copy", 4) / "checkpoint-4"
    assert read_checkpoint_hash(copy) == read_checkpoint_hash(trained / "checkpoint-4")
    flipped(ADAPTER)(copy)
    with FileHasher() as hashes:
        write_manifest(copy, hashes, step=4, processes=1)
    assert read_checkpoint_hash(copy) not in (read_checkpoint_hash(trained / "checkpoint-4"), None)
    assert read_checkpoint_hash(earlier / "checkpoint-4") is None


@pytest.mark.parametrize(
    "name", ["checkpoint-\u00b3", "checkpoint-\u0669", f"checkpoint-{'9' * 240}", "checkpoint-3a"]
)
def test_a_folder_whose_name_is_no_step_is_no_checkpoint(
    trained: Path, tmp_path: Path, name: str
) -> None:
    out = copied(trained, tmp_path / "out", 4)
    shutil.copytree(out / "checkpoint-4", out / name)
    assert resume_point(out).path == out / "checkpoint-4"
    assert resume_point(out, name="checkpoint-4").step == 4
    with pytest.raises(AttnimgError, match="is not a checkpoint") as caught:
        resume_point(out, name=name)
    assert caught.value.why == "its name has no step"


@pytest.mark.parametrize("kind", ["file", "pipe", "link to nothing"])
def test_a_file_in_place_of_a_checkpoint_is_refused_before_training(
    trained: Path, tmp_path: Path, kind: str
) -> None:
    out = copied(trained, tmp_path / "out", 2)
    place = out / "checkpoint-4"
    if kind == "file":
        place.touch()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("nowhere")
    with pytest.raises(AttnimgError, match="has a file in place of a checkpoint") as caught:
        resume_point(out)
    assert (caught.value.code, caught.value.exit_code) == ("output-dir", 2)
    assert "found checkpoint-4, which is not a folder" in caught.value.why
    place.rename(tmp_path / "away")  # as the advice says
    assert resume_point(out).path == out / "checkpoint-2"


def test_another_step_in_the_name_is_refused(trained: Path, tmp_path: Path) -> None:
    out = copied(trained, tmp_path / "out", 4)
    (out / "checkpoint-4").rename(out / "checkpoint-8")
    with pytest.raises(AttnimgError) as caught:
        resume_point(out)
    assert "weights: found step 4, needed 8 as in the name of checkpoint-8" in caught.value.why


def test_a_checkpoint_of_two_processes_resumes_in_one_with_a_warning(
    tiny: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copied(trained, tmp_path / "out", 4) / "checkpoint-4"
    shutil.copy(place / "rng_state.json", place / "rng_state_1.json")
    (place / "rng_state.json").rename(place / "rng_state_0.json")
    state = json.loads((place / "attnimg.json").read_text())
    state["identity"]["processes"] = 2
    (place / "attnimg.json").write_text(json.dumps(state))
    with FileHasher() as hashes:
        write_manifest(place, hashes, step=4, processes=2)
    run(tiny, tmp_path / "out", **KEYS, gradient_accumulation_steps=2, resume_from_checkpoint=True)
    said = capsys.readouterr().err
    assert "processes: 2 until checkpoint-4, 1 now: dropout uses other random numbers" in said
    replaced("rng_state_1.json", "gone")(place)
    assert find_damage(place) == ["rng_state_1.json: it is missing"]


def test_weights_in_shards_are_checked_and_resumed(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    keys = {"max_steps": 4, "save_steps": 2}
    run(tiny, tmp_path / "whole", **keys)
    place = copied(tmp_path / "whole", tmp_path / "out", 2) / "checkpoint-2"
    model = AutoModelForCausalLM.from_pretrained(place)
    model.save_pretrained(place, max_shard_size="100KB")
    assert len(list(place.glob("model-*.safetensors"))) > 1
    (place / "model.safetensors").unlink()
    with pytest.raises(AttnimgError, match="is damaged"):
        resume_point(tmp_path / "out")
    with FileHasher() as hashes:
        write_manifest(place, hashes, step=2, processes=1)
    run(tiny, tmp_path / "out", **keys, resume_from_checkpoint=True)
    whole = (tmp_path / "whole/model.safetensors").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == whole
    shard = next(place.glob("model-*.safetensors"))
    flipped(shard.name)(place)
    assert find_damage(place)[0].startswith(f"{shard.name}: found SHA-256")


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "damaged"])
def test_the_best_checkpoint_is_loaded_only_where_it_is_whole(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    end_early = fit._load_best

    def damaged_first(engine: Any, *ended: str) -> str:
        if not whole:
            flipped(ADAPTER)(tmp_path / "out/checkpoint-1")
        return end_early(engine, *ended)

    monkeypatch.setattr(fit, "_load_best", damaged_first)
    result = run(
        tiny, tmp_path / "out", **{**KEYS, "learning_rate": 1e-12, "save_steps": 1},
        val_set_size=0.1, eval_steps=1, early_stopping_patience=2,
    )  # fmt: skip
    (note,) = result.notes
    best = (tmp_path / "out/checkpoint-1" / ADAPTER).read_bytes()
    assert ("the model is checkpoint-1" in note) is whole
    assert ("warning" in note and "checkpoint-1 is damaged" in note) is not whole
    assert ((tmp_path / "out" / ADAPTER).read_bytes() == best) is whole


@pytest.mark.parametrize("limit", [None, 1])
def test_checkpoints_of_weights_alone_have_a_manifest(
    tiny: Path, tmp_path: Path, limit: int | None
) -> None:
    run(tiny, tmp_path / "out", **KEYS, save_only_model=True, save_total_limit=limit)
    kept = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert [path.name for path in kept] == [
        f"checkpoint-{n}" for n in ((6,) if limit else (2, 4, 6))
    ]
    assert [find_damage(path) for path in kept] == [[]] * len(kept)
    assert not list((tmp_path / "out").rglob("*.bin")), "no pickle is written"
    with pytest.raises(AttnimgError, match="can't be resumed") as caught:
        resume_point(tmp_path / "out")
    assert caught.value.code == "no-checkpoint"


# Without a manifest
EARLIER_NAMED: dict[str, tuple[Damage, str]] = {
    "a bit flipped in the optimizer": (flipped("optimizer.pt"), "optimizer.pt: the checksum"),
    "the optimizer cut off": (cut("optimizer.pt"), "optimizer.pt: it is cut off"),
    "the optimizer emptied": (cut("optimizer.pt", left=0), "optimizer.pt: it is cut off"),
    "the random states cut off": (cut("rng_state.pth"), "rng_state.pth: it is cut off"),
    "no schedule": (replaced("scheduler.pt", "gone"), "scheduler.pt: it is missing"),
    "the weights cut off": (cut(ADAPTER, left=0.9), f"{ADAPTER}: found "),
    "the weights emptied": (cut(ADAPTER, left=0), f"{ADAPTER}: it has no header"),
    "the header of the weights damaged": (written(ADAPTER, b"\xff" * 999), ADAPTER),
    "a pipe for the weights": (replaced(ADAPTER, "pipe"), f"{ADAPTER}: found a pipe"),
    "a pipe for the optimizer": (replaced("optimizer.pt", "pipe"), "optimizer.pt: found a pipe"),
    "a link of the optimizer to a device": (replaced("optimizer.pt", "device"), "needed a file"),
    "no trainer_state.json": (replaced("trainer_state.json", "gone"), "trainer_state.json"),
    "half of trainer_state.json": (cut("trainer_state.json"), "trainer_state.json"),
    "a list for trainer_state.json": (written("trainer_state.json", "[]"), "trainer_state.json"),
    "another global_step": (edited("trainer_state.json", global_step=3), "global_step 3, needed 4"),
    "a negative global_step": (edited("trainer_state.json", global_step=-4), "global_step: -4"),
    "a text for global_step": (edited("trainer_state.json", global_step="4"), 'global_step: "4"'),
    "true for global_step": (edited("trainer_state.json", global_step=True), "global_step: true"),
    "no global_step": (edited("trainer_state.json", global_step=None), "global_step None"),
    "NaN for epoch": (edited("trainer_state.json", epoch=float("nan")), "epoch: NaN"),
    "a text for log_history": (edited("trainer_state.json", log_history="x"), "log_history"),
    "a list of callbacks": (edited("trainer_state.json", stateful_callbacks=[3]),
                            "stateful_callbacks"),
    "a key of another version": (edited("trainer_state.json", nobody=1), "nobody"),
    "half of attnimg.json": (cut("attnimg.json"), "attnimg.json"),
    "a text for the sums": (edited("attnimg.json", window="x"), "window"),
    "a text in the sums": (edited("attnimg.json", window={"loss": "x"}), "loss"),
    "a list for the identity": (edited("attnimg.json", identity=[1]), "identity"),
    "a text for the keys": (edited("attnimg.json", identity={"keys": "x"}), "keys"),
    "code in the optimizer": (code_in("optimizer.pt"), "would run code: posix.system"),
    "code in the schedule": (code_in("scheduler.pt"), "would run code: posix.system"),
    "code in the random states": (code_in("rng_state.pth"), "would run code: posix.system"),
    "a plain pickle for the optimizer": (plain_code_in("optimizer.pt"), "optimizer.pt: it is cut"),
    "a shard that is missing": (
        written("model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}'),
        "model-1.safetensors: it is missing"),
    "an index that is none": (written("model.safetensors.index.json", "3"), "not an index"),
}  # fmt: skip


@pytest.mark.parametrize("name", EARLIER_NAMED)
def test_damages_without_a_manifest_are_named(earlier: Path, tmp_path: Path, name: str) -> None:
    damage, says = EARLIER_NAMED[name]
    out = copied(earlier, tmp_path / "out", 2, 4)
    damage(out / "checkpoint-4")
    if (out / "checkpoint-4/trainer_state.json").exists():
        with pytest.raises(AttnimgError) as caught:
            resume_point(out, name="checkpoint-4")
        assert caught.value.code == "damaged-checkpoint"
        assert says in caught.value.why
        assert "weights_only" not in str(caught.value)
    point = resume_point(out)
    assert point.path == out / "checkpoint-2"
    assert says in point.notes[0]
    assert not (out / "ran").exists()


def test_a_flipped_bit_of_a_pickled_schedule_is_found_or_has_no_effect(
    earlier: Path, tmp_path: Path
) -> None:
    import torch

    place = copied(earlier, tmp_path / "out", 4) / "checkpoint-4"
    whole, path = (place / "scheduler.pt").read_bytes(), place / "scheduler.pt"
    state, named = torch.load(path, weights_only=True), 0
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        if any("scheduler.pt" in text for text in find_damage(place)):
            named += 1
        else:
            assert torch.load(path, weights_only=True) == state, at
    assert named > 50


EARLIER_HARMLESS: dict[str, tuple[Damage, int]] = {
    "nothing": (lambda _: None, 1),
    "a README": (written("README.md", "hello"), 1),
    "code in what is never read": (code_in("training_args.bin"), 1),
    "no random states": (replaced("rng_state.pth", "gone"), 2),
    "no attnimg.json, as of transformers' Trainer": (replaced("attnimg.json", "gone"), 1),
}


@pytest.mark.parametrize("name", EARLIER_HARMLESS)
def test_a_checkpoint_without_a_manifest_resumes_with_a_warning(
    earlier: Path, tmp_path: Path, name: str
) -> None:
    damage, notes = EARLIER_HARMLESS[name]
    out = copied(earlier, tmp_path / "out", 2, 4)
    damage(out / "checkpoint-4")
    point = resume_point(out)
    assert (point.path, len(point.notes)) == (out / "checkpoint-4", notes)
    assert "checkpoint-4 has no manifest" in point.notes[0]


def test_a_checkpoint_of_0_1_0_resumes_bit_for_bit(
    tiny: Path, trained: Path, earlier: Path, tmp_path: Path
) -> None:
    out = copied(earlier, tmp_path / "out", 4)
    code_in("training_args.bin")(out / "checkpoint-4")
    run(tiny, out, **KEYS, resume_from_checkpoint=True)
    assert (out / ADAPTER).read_bytes() == (trained / ADAPTER).read_bytes()
    assert not (out / "ran").exists()
    assert resume_point(out).notes == (), "the checkpoint that it wrote has a manifest"


def of_other_shapes(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / ADAPTER)
    save_file({name: weight[:1].clone() for name, weight in weights.items()}, folder / ADAPTER)


def without_half(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / ADAPTER)
    save_file(dict(list(weights.items())[::2]), folder / ADAPTER)


def of_another_optimizer(folder: Path) -> None:
    import torch

    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")


def with_other_callbacks(folder: Path) -> None:
    edited("trainer_state.json", stateful_callbacks={"TrainerControl": {"args": {"x": 1}}})(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(of_other_shapes, "size mismatch", id="weights of other shapes"),
        pytest.param(without_half, "missing: ", id="half of the weights"),
        pytest.param(of_another_optimizer, "parameter groups", id="another optimizer"),
        pytest.param(with_other_callbacks, "unexpected keyword", id="states of other callbacks"),
    ],
)
def test_states_that_do_not_fit_the_run_are_refused_with_the_reason(
    tiny: Path, earlier: Path, tmp_path: Path, damage: Damage, says: str
) -> None:
    out = copied(earlier, tmp_path / "out", 4)
    damage(out / "checkpoint-4")
    with pytest.raises(AttnimgError) as caught:
        run(tiny, out, **KEYS, resume_from_checkpoint=True)
    assert caught.value.code == "damaged-checkpoint"
    assert says in caught.value.why


@pytest.mark.parametrize("of", ["trained", "earlier"])
def test_moments_of_another_shape_are_refused_and_do_not_crash_the_process(
    tiny: Path, tmp_path: Path, request: pytest.FixtureRequest, of: str
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    place = copied(request.getfixturevalue(of), tmp_path / "out", 4) / "checkpoint-4"
    if of == "trained":
        path = place / "optimizer-1.safetensors"
        state = load_file(path)
        name = next(name for name, value in state.items() if value.dim() == 2)
        save_file({**state, name: state[name][:1].clone()}, path)
        with FileHasher() as hashes:
            write_manifest(place, hashes, step=4, processes=1)
    else:
        state = torch.load(place / "optimizer.pt")
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:1].clone()
        torch.save(state, place / "optimizer.pt")
    with pytest.raises(AttnimgError) as caught:
        run(tiny, tmp_path / "out", **KEYS, resume_from_checkpoint=True)
    assert caught.value.code == "damaged-checkpoint"
    assert "of shape (1, 64), needed (" in caught.value.why


def pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / ADAPTER), folder / "adapter_model.bin")
    (folder / ADAPTER).unlink()


def test_pickled_weights_are_refused_and_the_printed_command_converts_them(
    tiny: Path, trained: Path, earlier: Path, tmp_path: Path
) -> None:
    out = copied(earlier, tmp_path / "out", 4)
    pickled(out / "checkpoint-4")
    with pytest.raises(AttnimgError) as caught:
        resume_point(out)
    assert (caught.value.code, caught.value.exit_code) == ("pickled-weights", 2)
    assert "adapter_model.bin" in caught.value.why
    assert command(caught.value.do).returncode == 0
    run(tiny, out, **KEYS, resume_from_checkpoint=True)
    assert (out / ADAPTER).read_bytes() == (trained / ADAPTER).read_bytes()


def command(do: str) -> subprocess.CompletedProcess[str]:
    """Run the command that a refusal names."""
    words = do.removeprefix("run ").replace("python ", f"{sys.executable} ", 1)
    return subprocess.run(words, shell=True, capture_output=True, text=True, check=False)


def sharded(folder: Path) -> None:
    """Write a model as two pickled shards with an index."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    names = {f"pytorch_model-0000{n}-of-00002.bin": list(weights)[n - 1 :: 2] for n in (1, 2)}
    for file, kept in names.items():
        torch.save({name: weights[name] for name in kept}, folder / file)
    index = {"metadata": {}, "weight_map": {name: f for f, kept in names.items() for name in kept}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def in_one(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("pickle", [in_one, sharded])
def test_a_pickled_base_model_is_refused_and_the_printed_command_converts_it(
    tiny: Path, tmp_path: Path, pickle: Damage
) -> None:
    place = tmp_path / "it's" / "model"  # the command quotes it
    shutil.copytree(tiny / "model", place)
    pickle(place)
    with pytest.raises(AttnimgError) as caught:
        run(place.parent, tmp_path / "out", max_steps=1)
    assert (caught.value.code, caught.value.key) == ("pickled-weights", "base_model")
    assert "pytorch_model" in caught.value.why
    done = command(caught.value.do)
    assert done.returncode == 0, done.stderr
    found = run(place.parent, tmp_path / "out", max_steps=1)
    assert found.loss == run(tiny, tmp_path / "plain", max_steps=1).loss


def test_code_in_pickled_weights_is_not_run_by_the_conversion(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for number, write in enumerate((code_in, plain_code_in, cut_pickle)):
        write("pytorch_model.bin")(folder)
        with pytest.raises(AttnimgError, match="can't be converted") as caught:
            convert(folder)
        assert "weights_only" not in str(caught.value), number
        assert not list(folder.glob("*.safetensors"))
    assert not (tmp_path / "ran").exists()


def cut_pickle(name: str) -> Damage:
    def damage(folder: Path) -> None:
        import torch

        torch.save({"a": torch.ones(9)}, folder / name)
        cut(name)(folder)

    return damage


def test_a_model_of_the_hub_with_pickled_weights_alone_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "hub/models--org--old"
    shutil.copytree(tiny / "model", cache / "snapshots/1")
    in_one(cache / "snapshots/1")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = Config(base_model="org/old", learning_rate=1e-3)
    with pytest.raises(AttnimgError) as caught:
        load_model(config, tokenizer=(), implementation="sdpa", context=CONTEXT,
                   needs_dtype_cast=False)  # fmt: skip
    assert caught.value.code == "pickled-weights"
    assert "hf download org/old --local-dir old" in caught.value.do
