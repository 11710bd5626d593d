"""Test that training continues while a checkpoint is finished, and that none is lost by it."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnimg.errors import AttnimgError
from attnimg.train import checkpoint
from attnimg.train import checkpoint as file_hashes
from attnimg.train.checkpoint import FileHasher
from attnimg.train.distributed import StopFlag, Stopped
from attnimg.train.engine import Engine
from attnimg.train.intact import find_damage

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from damages import flipped
from tiny_run import config_for, make_model, run, train

FIXTURES = Path(__file__).parents[1] / "fixtures"
KEYS: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "adapter": "lora", "lora_dropout": 0.2}
ADAPTER = "adapter_model.safetensors"

# Waits in the thread that finishes checkpoint-4 until step 5 is logged, then kills the run.
KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path.append(sys.argv[1])
from attnimg.train import checkpoint
from tiny_run import run
folder = Path(sys.argv[2])
promote = checkpoint.promote

def killed(partial, *arguments, **options):
    while partial.name == "checkpoint-4":
        if '"step": 5' in (folder / "out/metrics.jsonl").read_text():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
    return promote(partial, *arguments, **options)

checkpoint.promote = killed
run(Path(sys.argv[3]), folder / "out", **{keys})
"""
LIMITED = """
import resource, sys, threading
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (2**40, resource.getrlimit(resource.RLIMIT_AS)[1]))
from attnimg.train.checkpoint import PendingCheckpoint
from attnimg.train.checkpoint import FileHasher
path, pending = Path(sys.argv[1]), PendingCheckpoint()
with FileHasher() as hashes:
    path.write_bytes(b"abc")
    hashes.add_written(path)
    pending.start(lambda: print(*hashes.hash_all([path])))
    assert threading.active_count() == 1
    pending.wait()
pending.start(lambda: path.rmdir())
try:
    pending.wait()
except NotADirectoryError:
    print("raised")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    return folder


def hold(monkeypatch: pytest.MonkeyPatch, name: str, until: Callable[[Path], object]) -> None:
    """Make the thread that finishes a checkpoint call a function with its folder first."""
    promote = checkpoint.promote

    def held(partial: Path, *arguments: Any, **options: Any) -> Path:
        if partial.name == name:
            until(partial)
        return promote(partial, *arguments, **options)

    monkeypatch.setattr(checkpoint, "promote", held)


def whole(out: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, all of which are whole."""
    found = checkpoint.list_checkpoints(out)
    assert [find_damage(path) for path in found] == [[]] * len(found)
    return [checkpoint.checkpoint_step(path) for path in found]


def test_training_continues_while_a_checkpoint_is_finished(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    during = []

    def wait_for_step_3(partial: Path) -> None:
        ends = time.monotonic() + 60
        while '"step": 3' not in (out / "metrics.jsonl").read_text():
            assert time.monotonic() < ends
            time.sleep(0.01)
        during.append((checkpoint.list_checkpoints(out), (partial / "manifest.json").exists()))

    hold(monkeypatch, "checkpoint-2", wait_for_step_3)
    run(tiny, out, **KEYS)
    assert during == [([], False)], "it does not exist yet, and is not finished"
    assert whole(out) == [2, 4, 6]
    assert not (out / ".partial").exists()


def test_a_run_killed_meanwhile_resumes_from_the_checkpoint_before(
    tiny: Path, tmp_path: Path
) -> None:
    keys = {**KEYS, "save_total_limit": 1}
    code = KILLED.replace("{keys}", repr(keys))
    killed = subprocess.run(
        [sys.executable, "-c", code, str(FIXTURES), str(tmp_path), str(tiny)],
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    out = tmp_path / "out"
    assert whole(out) == [2], "the last whole one is kept"
    assert (out / ".partial/checkpoint-4" / ADAPTER).is_file()
    assert not (out / ".partial/checkpoint-4/manifest.json").exists()
    run(tiny, out, **keys, auto_resume_from_checkpoints=True)
    run(tiny, tmp_path / "other", **keys)
    assert (out / ADAPTER).read_bytes() == (tmp_path / "other" / ADAPTER).read_bytes()
    assert whole(out) == [6]


def test_a_checkpoint_that_can_not_be_finished_stops_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = file_hashes.flush

    def full(path: Path) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(file_hashes, "flush", full)
    out = tmp_path / "out"
    with pytest.raises(AttnimgError, match="checkpoint-4 could not be written") as caught:
        run(tiny, out, **KEYS)
    assert caught.value.code == "disk-full"
    assert "checkpoint-2 is kept" in caught.value.why
    assert whole(out) == [2]
    assert not (out / ".partial").exists()


def test_a_stop_waits_for_the_checkpoint_before_and_its_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopFlag()

    def ask(_: Path) -> None:
        stop.number = 15
        time.sleep(0.5)

    hold(monkeypatch, "checkpoint-2", ask)
    config = config_for(tiny, output_dir=str(tmp_path / "out"), **KEYS)
    with pytest.raises(Stopped) as caught:
        train(config, stop=stop)
    assert caught.value.checkpoint == tmp_path / "out" / f"checkpoint-{caught.value.step}"
    assert whole(tmp_path / "out") == [2, caught.value.step]


def test_an_error_of_training_leaves_the_checkpoint_before_whole(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = Engine._get_grad_norm

    def wrong(engine: Engine, *arguments: Any, **options: Any) -> Any:
        if engine.state.global_step == 2:
            raise ZeroDivisionError
        return norm(engine, *arguments, **options)

    hold(monkeypatch, "checkpoint-2", lambda _: time.sleep(0.5))
    monkeypatch.setattr(Engine, "_get_grad_norm", wrong)
    with pytest.raises(ZeroDivisionError):
        run(tiny, tmp_path / "out", **KEYS)
    assert whole(tmp_path / "out") == [2]


def test_training_does_not_wait_for_the_hashes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, hash_of = tmp_path / "out", file_hashes._hash_file

    def late(path: Path) -> str:
        ends = time.monotonic() + 60
        while path.parent.name == "checkpoint-2" and (
            '"step": 3' not in (out / "metrics.jsonl").read_text()
        ):
            assert time.monotonic() < ends
            time.sleep(0.01)
        return hash_of(path)

    monkeypatch.setattr(file_hashes, "_hash_file", late)
    run(tiny, out, **{**KEYS, "adapter": None})
    assert whole(out) == [2, 4, 6], "the optimizer's step 3 does not change what is hashed"


@pytest.mark.parametrize(("cores", "at_once"), [(1, False), (2, False), (3, True)])
def test_files_are_hashed_while_others_are_written_if_a_core_is_free(
    cores: int, at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    started = []
    hash_of = file_hashes._hash_file
    monkeypatch.setattr(
        file_hashes, "_hash_file", lambda path: (started.append(path), hash_of(path))[1]
    )
    content = bytes(range(256)) * (file_hashes._BLOCK // 256) + b"more than one block"
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(content)
    second.write_bytes(b"")
    with FileHasher() as hashes:
        hashes.add_written(first)
        hashes._flushers.submit(int).result()
        hashes._hashers.submit(int).result()  # in the only thread, after jobs before it
        assert bool(started) == at_once
        found = hashes.hash_all([first, second])
    assert found == [hashlib.sha256(data).hexdigest() for data in (content, b"")]


def test_a_file_that_changed_after_it_was_written_is_hashed_again(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint-4"
    place.mkdir()
    path = place / "config.json"
    path.write_bytes(b"first")
    with FileHasher() as hashes:
        hashes.add_written(path)
        path.write_bytes(b"second")
        checkpoint.write_manifest(place, hashes, step=4, processes=1)
    assert find_damage(place) == []
    flipped("config.json")(place)
    assert find_damage(place)[0].startswith("config.json: found SHA-256")


def test_without_threads_a_checkpoint_is_finished_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "file")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    sha256_of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert done.stdout.split() == [sha256_of_abc, "raised"], done.stderr
