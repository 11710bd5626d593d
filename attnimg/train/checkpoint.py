"""Checkpoints that are complete or not there, whatever moment the run is killed at.

A checkpoint is written under PARTIAL, its manifest (manifest.py) last, and renamed into place when
all of it is on the disk. Training continues when the files are written: a thread hashes and flushes
them, writes the manifest and renames. A checkpoint that rotation removes is renamed away first. So
every `checkpoint-N` in output_dir is complete, and what a killed run left half done lies under
PARTIAL.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from attnimg.threads import executor
from attnimg.train.disk import writing
from attnimg.train.file_hashes import FileHashes, flush
from attnimg.train.manifest import write_manifest

PARTIAL = ".partial"
STATE = "attnimg.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePoint:
    """Where a run goes on.

    Attributes:
        path: a complete checkpoint; None when the run starts anew in a folder it may use.
        step: optimizer steps behind it.
        leftovers: what a killed run left half done; removed when the run starts.
        damaged: newer checkpoints, which are damaged; renamed when the run starts.
        notes: lines for the user on why this checkpoint was chosen, and what is not known of it.
    """

    path: Path | None
    step: int
    leftovers: tuple[Path, ...]
    damaged: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints in `folder`, lowest step first."""
    named = (path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted((path for path in named if path.is_dir()), key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the complete checkpoint with the highest step."""
    return next(reversed(checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    """Read the step off a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


class Finishing:
    """The checkpoint that a thread finishes while training continues; at most one at a time."""

    def __init__(self) -> None:
        self._job: Future[None] | None = None

    def begin(self, finish: Callable[[], None]) -> None:
        """Call a function in a thread; the one before has ended."""
        thread = executor(1)
        self._job = thread.submit(finish)
        thread.shutdown(wait=False)

    @property
    def ended(self) -> bool:
        """Whether a checkpoint is finished, or failed, and nobody has waited for it."""
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
                # A signal that ends the wait leaves the job to the next one.
                if job.done():
                    self._job = None


def finish(
    partial: Path,
    hashes: FileHashes,
    *,
    processes: int,
    limit: int | None,
    best: Path,
    told: str,
) -> None:
    """Make a checkpoint exist whose files are written, then remove the oldest ones.

    Args:
        partial: as for `promote`.
        hashes: as for `promote`; closed.
        processes: how many processes train.
        limit: complete checkpoints to keep; None for all.
        best: the one that early stopping returns to, which is kept.
        told: what is safe if this fails, as a sentence.

    Raises:
        AttnimgError: it could not be written (disk-full, not-written); it is removed.
    """
    folder = partial.parent.parent
    try:
        with writing(partial, kept=told), hashes:
            place = promote(partial, hashes, processes=processes)
    except BaseException:
        remove_leftovers(folder)
        raise
    rotate(folder, limit=limit, keep=[place, best])


def promote(partial: Path, hashes: FileHashes, *, processes: int) -> Path:
    """Write a checkpoint's manifest, and move it from PARTIAL into place; from here on it exists.

    Args:
        partial: output_dir/PARTIAL/checkpoint-N, all of it written.
        hashes: of its files, as far as they were taken while others were written.
        processes: how many processes train.
    """
    place = partial.parent.parent / partial.name
    open_to_others(partial)
    write_manifest(partial, hashes, step=step_of(partial), processes=processes)
    for path in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        flush(path)
    partial.rename(place)
    flush(place.parent)
    return place


def open_to_others(folder: Path) -> None:
    """Give all files the rights a new file gets here: safetensors makes its own 0600."""
    probe = folder / ".rights"
    probe.touch()
    rights = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(rights)


def rotate(folder: Path, *, limit: int | None, keep: Iterable[Path]) -> list[Path]:
    """Remove the oldest checkpoints beyond `limit`, never one of `keep`; tell which went."""
    if limit is None:
        return []
    spared = {path.name for path in keep}
    there = checkpoints(folder)
    gone = [path for path in there[: max(0, len(there) - limit)] if path.name not in spared]
    for path in gone:
        # A rename takes it out of the way at once; a kill while files go leaves no half checkpoint.
        away = folder / PARTIAL / f"removed-{path.name}"
        away.parent.mkdir(exist_ok=True)
        path.rename(away)
        shutil.rmtree(away)
    return gone


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, whose step the run will save again; return its new path."""
    names = (f"{checkpoint.name}.damaged{number}" for number in ("", *map(str, range(2, 1000))))
    place = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    return checkpoint.rename(place)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half done."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def read_state(checkpoint: Path) -> dict[str, object]:
    """Read what the run itself wrote into a checkpoint; empty for one of another program."""
    file = checkpoint / STATE
    state: dict[str, object] = json.loads(file.read_text()) if file.is_file() else {}
    return state
