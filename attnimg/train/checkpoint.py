"""Write checkpoints atomically: each one is complete or absent, whenever the run is killed.

A checkpoint is written to the folder PARTIAL, its manifest last, and renamed when all of it is on
the disk. Training continues once the files are written: a thread hashes and flushes them, writes
the manifest and renames the folder. A checkpoint that rotation removes is renamed first. So every
`checkpoint-N` in output_dir is complete, and incomplete ones of a killed run are in PARTIAL.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from attnimg.errors import AttnimgError
from attnimg.files import thread_pool

PARTIAL = ".partial"

STATE_FILE = "attnimg.json"

MANIFEST_FILE = "manifest.json"

# No run has more steps than these digits can count.
_NAME = re.compile(r"checkpoint-[0-9]{1,12}")

# Where each part of a checkpoint records its step.
_RECORDED_STEPS = {
    "optimizer.json": ("optimizer", "step"),
    "scheduler.json": ("scheduler", "step"),
    "rng_state": ("rng", "step"),
    "trainer_state.json": ("trainer", "global_step"),
    "attnimg.json": ("run", "step"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePoint:
    """Where a run resumes.

    Attributes:
        path: a complete checkpoint; None when a new run starts in a folder it may use.
        step: optimizer steps that it has done.
        damaged: newer checkpoints that are damaged; renamed when the run starts.
        notes: lines for the user on why this checkpoint was chosen, and what could not be checked.
    """

    path: Path | None
    step: int
    damaged: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def is_checkpoint_name(name: str) -> bool:
    """Return whether a name is that of a checkpoint, `checkpoint-N`."""
    return _NAME.fullmatch(name) is not None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, lowest step first."""
    named = (path for path in folder.glob("checkpoint-*") if is_checkpoint_name(path.name))
    return sorted((path for path in named if path.is_dir()), key=checkpoint_step)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint with the highest step."""
    return next(reversed(list_checkpoints(folder)), None)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def read_run_state(checkpoint: Path) -> dict[str, object]:
    """Return the state that attnimg wrote into a checkpoint; empty for one of another program."""
    file = checkpoint / STATE_FILE
    state: dict[str, object] = json.loads(file.read_text()) if file.is_file() else {}
    return state


class PendingCheckpoint:
    """The checkpoint that a thread finishes while training continues; at most one at a time."""

    def __init__(self) -> None:
        self._job: Future[None] | None = None

    def start(self, finish: Callable[[], None]) -> None:
        """Call a function in a thread; the previous one must have ended."""
        thread = thread_pool(1)
        self._job = thread.submit(finish)
        thread.shutdown(wait=False)

    @property
    def is_done(self) -> bool:
        """Return whether a checkpoint is finished or failed, and wait() was not called since."""
        return self._job is not None and self._job.done()

    def wait(self) -> None:
        """Wait until the checkpoint is complete.

        Raises:
            AttnimgError: it could not be written (disk-full, not-written).
        """
        job = self._job
        if job is not None:
            try:
                job.result()
            finally:
                # If a signal interrupts the wait, the next call waits for the same job.
                if job.done():
                    self._job = None


def finish(
    partial: Path,
    hashes: FileHasher,
    *,
    processes: int,
    limit: int | None,
    best: Path,
    kept: str,
) -> None:
    """Complete a checkpoint whose files are written, then remove the oldest ones.

    Args:
        partial: as for `promote`.
        hashes: as for `promote`; closed here.
        processes: number of training processes.
        limit: complete checkpoints to keep; None for all.
        best: the best checkpoint, for early stopping; it is not removed.
        kept: for the error message, what is kept if this fails.

    Raises:
        AttnimgError: it could not be written (disk-full, not-written); it is removed.
    """
    folder = partial.parent.parent
    try:
        with write_errors(partial, kept=kept), hashes:
            final = promote(partial, hashes, processes=processes)
    except BaseException:
        remove_leftovers(folder)
        raise
    rotate(folder, limit=limit, keep=[final, best])


def promote(partial: Path, hashes: FileHasher, *, processes: int) -> Path:
    """Write a checkpoint's manifest, and move the checkpoint from PARTIAL to its final path.

    Args:
        partial: output_dir/PARTIAL/checkpoint-N, with all files written.
        hashes: hashes of its files that were computed while others were written.
        processes: number of training processes.
    """
    final = partial.parent.parent / partial.name
    set_default_permissions(partial)
    write_manifest(partial, hashes, step=checkpoint_step(partial), processes=processes)
    for path in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        flush(path)
    partial.rename(final)
    flush(final.parent)
    return final


def set_default_permissions(folder: Path) -> None:
    """Set the permissions of all files to those of a new file: safetensors writes 0600."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def write_manifest(folder: Path, hashes: FileHasher, *, step: int, processes: int) -> None:
    """Write the manifest of a checkpoint, when all of its files are on the disk.

    Args:
        folder: the checkpoint; all processes have written their files.
        hashes: hashes of files that were computed already; the others are computed now.
        step: optimizer steps done.
        processes: number of training processes.
    """
    paths = (
        path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE
    )
    names = sorted(path.relative_to(folder) for path in paths)
    found = hashes.hash_all([folder / name for name in names])
    content: dict[str, Any] = {
        "format": 1,
        "step": step,
        "processes": processes,
        "parts": {"weights": step, **_read_steps(folder)},
        "files": {
            name.as_posix(): {"size": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, found, strict=True)
        },
    }
    content["sha256"] = manifest_hash(content)
    (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(folder / MANIFEST_FILE)


def _read_steps(folder: Path) -> dict[str, int]:
    """Return the step of each part that records one."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        name = "rng_state" if path.name.startswith("rng_state") else path.name
        if name in _RECORDED_STEPS:
            part, key = _RECORDED_STEPS[name]
            found[part] = json.loads(path.read_text(encoding="utf-8"))[key]
    return found


def manifest_hash(content: Mapping[str, Any]) -> str:
    """Return the hash of a manifest, without its own hash."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def rotate(folder: Path, *, limit: int | None, keep: Iterable[Path]) -> list[Path]:
    """Remove the oldest checkpoints beyond `limit`, never one of `keep`; return them."""
    if limit is None:
        return []
    kept = {path.name for path in keep}
    found = list_checkpoints(folder)
    oldest = [path for path in found[: max(0, len(found) - limit)] if path.name not in kept]
    for path in oldest:
        # Renamed first: a kill while files are removed leaves no incomplete checkpoint behind.
        trash = folder / PARTIAL / f"removed-{path.name}"
        trash.parent.mkdir(exist_ok=True)
        path.rename(trash)
        shutil.rmtree(trash)
    return oldest


def rename_damaged(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, since the run will save its step again; return the new path."""
    names = (f"{checkpoint.name}.damaged{number}" for number in ("", *map(str, range(2, 1000))))
    unused = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    return checkpoint.rename(unused)


def remove_leftovers(folder: Path) -> None:
    """Remove the incomplete files of a killed run."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


THREADS = 4

# Bytes read at a time. Before each call that reads or hashes, a thread may wait 5 ms for Python's
# global lock, which the training thread holds: with blocks of 256 KiB, as in hashlib.file_digest, a
# file of 33 MB took 0.22 s, without training 0.02 s (measured 2026-11-27).
_BLOCK = 16 * 2**20


class FileHasher:
    """Compute SHA-256 of files in threads, and flush the files; use it as a context manager."""

    def __init__(self) -> None:
        # Two cores are left to writing and flushing: training waits until the files are written.
        self._free_cores = len(os.sched_getaffinity(0)) - 2
        self._hashers = thread_pool(min(max(1, self._free_cores), THREADS))
        self._flushers = thread_pool(THREADS)
        self._files: dict[Path, tuple[tuple[int, ...], Future[str] | None, Future[None]]] = {}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Wait for running jobs, and cancel the others."""
        for pool in (self._hashers, self._flushers):
            pool.shutdown(cancel_futures=True)

    def add_written(self, path: Path) -> None:
        """Begin to flush a file, and to hash it if a core is free while others are written."""
        hashing = self._hashers.submit(_hash_file, path) if self._free_cores > 0 else None
        self._files[path] = _file_version(path), hashing, self._flushers.submit(flush, path)

    def hash_all(self, paths: list[Path]) -> list[str]:
        """Return the hashes of files, when all are on the disk.

        A file that was changed since `add_written` is hashed again.

        Raises:
            OSError: a file could not be written to the disk.
        """
        for path in paths:
            if path not in self._files or self._files[path][0] != _file_version(path):
                self.add_written(path)
        hashing = [self._files[path][1] or self._hashers.submit(_hash_file, path) for path in paths]
        for path in paths:
            self._files[path][2].result()
        return [job.result() for job in hashing]


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash_file(path: Path) -> str:
    found = hashlib.sha256()
    block = memoryview(bytearray(min(_BLOCK, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            found.update(block[:size])
    return found.hexdigest()


def _file_version(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


# Texts in the errors of libraries that do not pass on the error number. torch.save:
# "PytorchStreamWriter failed writing file"; safetensors: "... (os error 28)".
DISK_FULL_TEXTS = (
    "no space left",
    "os error 28",
    "disk quota exceeded",
    "os error 122",
    "file too large",
)

# Free bytes up to which a disk counts as full: libraries write in blocks, and the next one may not
# fit.
FULL_BELOW_BYTES = 4 * 2**20

WRITE_FAILED_TEXTS = ("failed writing", "error while serializing", "write failed", "unexpected pos")


@contextmanager
def write_errors(
    path: Path,
    *,
    kept: str,
    do: str = "free space, then run again with resume_from_checkpoint: true",
    key: str | None = "output_dir",
) -> Iterator[None]:
    """Turn errors while `path` is written into an AttnimgError.

    Args:
        path: the file or folder that is being written.
        kept: for the error message, what is kept nevertheless.
        do: the advice.
        key: the key of the config that names the path; None for none.

    Raises:
        AttnimgError: code disk-full or not-written, exit code 1.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error).lower()
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
            s in text for s in DISK_FULL_TEXTS
        )
        if not full and not isinstance(error, OSError):
            if not any(s in text for s in WRITE_FAILED_TEXTS):
                raise
            full = _free_bytes(path) < FULL_BELOW_BYTES
        # torch's message, "unexpected pos 87872 vs 87760", does not name the reason.
        reason = "no space left" if full else str(error).strip().splitlines()[0]
        raise AttnimgError(
            f"the disk is full: {path.name} could not be written"
            if full
            else f"{path.name} could not be written",
            why=f"{path}: {reason}\n{_free_bytes(path) / 2**20:,.1f} MiB free there; {kept}",
            do=do,
            code="disk-full" if full else "not-written",
            key=key,
            exit_code=1,
        ) from error


def _free_bytes(path: Path) -> int:
    """Return the free bytes of the file system of a path, which may not exist."""
    existing = next((p for p in (path, *path.parents) if p.exists()), Path())
    return shutil.disk_usage(existing).free


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically, by writing another one and renaming it."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
