"""Which checkpoint a run goes on from, which folders it may use, and what rotation leaves."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train import checkpoint as checkpoints
from attnimg.train import records
from attnimg.train.check import check_output_dir, prepare_output_dir
from attnimg.train.checkpoint import FileHasher, write_errors, write_manifest


def config(folder: Path, **keys: Any) -> Config:
    return Config.model_validate({"base_model": "m", "output_dir": str(folder), **keys})


def make(folder: Path, *steps: int, files: tuple[str, ...] = ("optimizer.pt",)) -> None:
    for step in steps:
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        states = ("trainer_state.json", "attnimg.json", "rng_state.json")
        for name in (*states, "model.safetensors", *files):
            (place / name).write_text(json.dumps({"global_step": step, "step": step}))
        with FileHasher() as hashes:
            write_manifest(place, hashes, step=step, processes=1)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        pytest.param({"resume_from_checkpoint": True}, "checkpoint-10", id="true is the newest"),
        pytest.param({"auto_resume_from_checkpoints": True}, "checkpoint-10", id="so is auto"),
    ],
)
def test_resume_finds_the_newest_by_number(tmp_path: Path, keys: dict[str, Any], name: str) -> None:
    make(tmp_path, 2, 10, 9)
    (tmp_path / ".partial" / "checkpoint-12").mkdir(parents=True)
    point = check_output_dir(config(tmp_path, **keys))
    assert point is not None
    assert point.path == tmp_path / name
    assert point.step == 10
    printed = io.StringIO()
    prepare_output_dir(tmp_path, point, console=Console(file=printed, width=200))
    assert "removing checkpoint-12: it was never finished" in printed.getvalue()
    assert not (tmp_path / ".partial").exists()
    assert point.path.is_dir()


def test_a_named_checkpoint_of_another_run_starts_a_new_folder(tmp_path: Path) -> None:
    make(tmp_path / "old", 4)
    named = str(tmp_path / "old" / "checkpoint-4")
    point = check_output_dir(config(tmp_path / "new", resume_from_checkpoint=named))
    assert point is not None
    assert (point.path, point.step) == (Path(named), 4)


def test_auto_resume_starts_a_new_run_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    point = check_output_dir(config(tmp_path, auto_resume_from_checkpoints=True))
    assert point is not None
    assert (point.path, point.step) == (None, 0)


@pytest.mark.parametrize(
    "there", [pytest.param([], id="empty"), pytest.param(["receipt.json"], id="a receipt alone")]
)
def test_a_folder_without_a_run_in_it_is_free(tmp_path: Path, there: list[str]) -> None:
    for name in there:
        (tmp_path / name).write_text("{}")
    point = check_output_dir(config(tmp_path))
    assert point is None or point.path is None


def file_in_place(folder: Path) -> dict[str, Any]:
    folder.write_text("")
    return {}


def other_run(folder: Path) -> dict[str, Any]:
    make(folder, 3)
    return {}


def nothing_to_resume(_: Path) -> dict[str, Any]:
    return {"resume_from_checkpoint": True}


def half_a_checkpoint(folder: Path) -> dict[str, Any]:
    (folder / ".partial" / "checkpoint-1").mkdir(parents=True)
    return {"resume_from_checkpoint": True}


def weights_alone(folder: Path) -> dict[str, Any]:
    make(folder, 3, files=())
    return {"resume_from_checkpoint": True}


def named_but_absent(folder: Path) -> dict[str, Any]:
    return {"resume_from_checkpoint": str(folder / "checkpoint-7")}


def newer_ones_beside(folder: Path) -> dict[str, Any]:
    make(folder, 3, 6)
    return {"resume_from_checkpoint": str(folder / "checkpoint-3")}


@pytest.mark.parametrize(
    ("prepare", "code", "says"),
    [
        pytest.param(file_in_place, "output-dir", "is a file", id="a file in its place"),
        pytest.param(other_run, "output-dir-not-empty", "checkpoint-3", id="another run's files"),
        pytest.param(nothing_to_resume, "no-checkpoint", "found no", id="nothing to resume"),
        pytest.param(half_a_checkpoint, "no-checkpoint", "never finished", id="half a checkpoint"),
        pytest.param(weights_alone, "no-checkpoint", "optimizer", id="weights alone"),
        pytest.param(named_but_absent, "no-checkpoint", "no such folder", id="a wrong name"),
        pytest.param(newer_ones_beside, "output-dir-not-empty", "checkpoint-6",
                     id="newer checkpoints beside the named one"),
    ],
)  # fmt: skip
def test_folders_in_the_way_are_refused(tmp_path: Path, prepare: Any, code: str, says: str) -> None:
    folder = tmp_path / "out"
    keys = prepare(folder)
    with pytest.raises(AttnimgError) as caught:
        check_output_dir(config(folder, **keys))
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert says in caught.value.why


def test_a_folder_nobody_may_write_to_is_refused() -> None:
    with pytest.raises(AttnimgError, match="can't be written"):
        check_output_dir(config(Path("/proc/attnimg-out")))


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        pytest.param(None, [], [1, 2, 3, 10], id="no limit removes none"),
        pytest.param(2, [], [3, 10], id="the lowest steps go"),
        pytest.param(1, [2], [2, 10], id="the best one stays"),
    ],
)
def test_rotation(tmp_path: Path, limit: int | None, keep: list[int], left: list[int]) -> None:
    make(tmp_path, 1, 2, 3, 10)
    checkpoints.rotate(
        tmp_path, limit=limit, keep=[tmp_path / f"checkpoint-{step}" for step in keep]
    )
    assert [
        checkpoints.checkpoint_step(path) for path in checkpoints.list_checkpoints(tmp_path)
    ] == left


def test_promotion_makes_a_checkpoint_exist(tmp_path: Path) -> None:
    make(tmp_path / ".partial", 5)
    weights = tmp_path / ".partial" / "checkpoint-5" / "model.safetensors"
    weights.chmod(0o600)
    assert checkpoints.newest_checkpoint(tmp_path) is None
    with FileHasher() as hashes:
        checkpoints.promote(tmp_path / ".partial" / "checkpoint-5", hashes, processes=1)
    newest = checkpoints.newest_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-5"
    (tmp_path / "ordinary").touch()
    ordinary = (tmp_path / "ordinary").stat().st_mode
    assert (newest / "model.safetensors").stat().st_mode == ordinary, "others may read it too"


def test_lines_past_the_checkpoint_are_cut(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        records.append_metrics(tmp_path, {"step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # torn
    assert records.remove_metrics_after(tmp_path, 2, evaluate_again=False) == 2
    assert [line["step"] for line in records.read_metrics(tmp_path)] == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("again", "left"),
    [
        pytest.param(False, 2, id="an evaluation that is done stays"),
        pytest.param(True, 1, id="one that is done again goes"),
    ],
)
def test_the_evaluation_at_the_checkpoint(tmp_path: Path, again: bool, left: int) -> None:
    records.append_metrics(tmp_path, {"step": 2, "loss": 1.0})
    records.append_metrics(tmp_path, {"step": 2, "eval_loss": 1.0})
    records.remove_metrics_after(tmp_path, 2, evaluate_again=again)
    assert len(records.read_metrics(tmp_path)) == left


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), "disk-full", id="ENOSPC"),
        pytest.param(OSError(errno.EDQUOT, "Disk quota exceeded"), "disk-full", id="over quota"),
        pytest.param(OSError(errno.EIO, "Input/output error"), "not-written", id="a broken disk"),
        pytest.param(RuntimeError("I/O error: No space left on device (os error 28)"), "disk-full",
                     id="a library that hides the number"),
    ],
)  # fmt: skip
def test_failed_writes_are_told_apart(tmp_path: Path, error: Exception, code: str) -> None:
    with pytest.raises(AttnimgError) as caught, write_errors(tmp_path / "f", kept="x is kept"):
        raise error
    assert (caught.value.code, caught.value.exit_code) == (code, 1)
    assert "x is kept" in caught.value.why


def test_errors_that_are_not_the_disk_s_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape"), write_errors(tmp_path / "f", kept=""):
        raise RuntimeError("shape mismatch")


def test_the_state_of_another_program_s_checkpoint_is_empty(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "attnimg.json").unlink()
    assert checkpoints.read_run_state(tmp_path / "checkpoint-1") == {}
    (tmp_path / "checkpoint-1" / "attnimg.json").write_text(json.dumps({"tokens": 3}))
    assert checkpoints.read_run_state(tmp_path / "checkpoint-1") == {"tokens": 3}
