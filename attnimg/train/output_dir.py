"""Check output_dir before a run: find the checkpoint to resume from, and lock the folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, printable
from attnimg.train import metrics
from attnimg.train.checkpoint import (
    PARTIAL,
    ResumePoint,
    checkpoints,
    newest_checkpoint,
    read_state,
    remove_leftovers,
    set_aside,
    step_of,
)
from attnimg.train.intact import damaged, damages_of, has_manifest, newest_whole, notes_on

FILE = ".lock"

# Files of a run that has done no step; a new run may start in a folder with them.
HARMLESS = frozenset({"receipt.json", PARTIAL, FILE})


def check_output_dir(config: Config) -> ResumePoint | None:
    """Return where the run resumes; raise for a folder that it may not write to.

    Returns:
        None when it starts in an empty folder.

    Raises:
        AttnimgError: output_dir is a file, is not writable or has another run's files; another run
            trains there; the checkpoint to resume from is missing or damaged. Code output-dir,
            output-dir-not-empty, output-dir-busy, no-checkpoint, damaged-checkpoint or
            pickled-weights.
    """
    folder = Path(config.output_dir).expanduser()
    _require_writable(folder)
    require_unlocked(folder)
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    partial = folder / PARTIAL
    leftovers = tuple(sorted(partial.iterdir())) if partial.is_dir() else ()
    asked = config.resume_from_checkpoint
    if isinstance(asked, str):
        return _named_point(folder, Path(asked).expanduser(), found=found, leftovers=leftovers)
    newest = newest_checkpoint(folder)
    if (asked or config.auto_resume_from_checkpoints) and newest:
        return _newest_point(folder, leftovers)
    if asked:
        raise AttnimgError(
            "there is no checkpoint to resume from",
            why=f"found no complete checkpoint-N in {folder}"
            + (f", only {len(leftovers)} that was never finished" if leftovers else ""),
            do="remove resume_from_checkpoint, or name a checkpoint's folder with it",
            code="no-checkpoint",
            key="resume_from_checkpoint",
        )
    if set(found) - HARMLESS and not config.auto_resume_from_checkpoints:
        raise _not_empty(folder, found, newest=newest)
    return ResumePoint(path=None, step=0, leftovers=leftovers) if found else None


def _newest_point(folder: Path, leftovers: tuple[Path, ...]) -> ResumePoint:
    """Return the newest intact checkpoint in output_dir."""
    found = checkpoints(folder)
    newest, newer = newest_whole(found)
    if newest is None:
        raise damaged(found[-1], newer[found[-1]], output_dir=folder)
    return _point(newest, leftovers, newer)


def _named_point(
    folder: Path, checkpoint: Path, *, found: list[str], leftovers: tuple[Path, ...]
) -> ResumePoint:
    """Return the checkpoint that the config names, here or in another run's folder."""
    _require_checkpoint(checkpoint)
    own = checkpoint.resolve().parent == folder.resolve()
    if not own and set(found) - HARMLESS:
        raise _not_empty(folder, found, newest=newest_checkpoint(folder))
    newer = [path for path in checkpoints(folder) if step_of(path) > step_of(checkpoint)]
    if own and newer:
        raise _bad_dir(
            f"output_dir {folder} holds checkpoints newer than {checkpoint.name}",
            why=f"found {', '.join(path.name for path in newer)}; they would be taken "
            "for this run's",
            do="move them away, or set another output_dir",
            code="output-dir-not-empty",
        )
    if wrong := damages_of(checkpoint):
        raise damaged(checkpoint, wrong, output_dir=folder)
    return _point(checkpoint, leftovers, {})


def _point(
    checkpoint: Path, leftovers: tuple[Path, ...], newer: dict[Path, list[str]]
) -> ResumePoint:
    """Return the resume point of an intact checkpoint; raise if it has only weights."""
    if not any(checkpoint.glob("optimizer*")) and not any(checkpoint.glob("global_step*")):
        raise AttnimgError(
            f"{checkpoint} can't be resumed from",
            why="it holds no optimizer state (save_only_model: true)",
            do="remove resume_from_checkpoint, and set base_model to this folder and output_dir to "
            "a new one, to continue with a new optimizer",
            code="no-checkpoint",
            key="resume_from_checkpoint",
        )
    return ResumePoint(
        path=checkpoint,
        step=step_of(checkpoint),
        leftovers=leftovers,
        damaged=tuple(newer),
        notes=notes_on(checkpoint, newer),
    )


def _require_checkpoint(checkpoint: Path) -> None:
    """Raise unless a folder is a checkpoint."""
    is_named = checkpoint.name.rpartition("-")[2].isdecimal()
    whole = has_manifest(checkpoint) or (checkpoint / "trainer_state.json").exists()
    if not checkpoint.is_dir() or not is_named or not whole:
        why = "no such folder"
        if checkpoint.is_dir():
            why = f"{checkpoint} has no trainer_state.json" if is_named else "its name has no step"
        raise AttnimgError(
            f"{checkpoint} is not a checkpoint",
            why=why,
            do="name a checkpoint-N folder, or set resume_from_checkpoint: true",
            code="no-checkpoint",
            key="resume_from_checkpoint",
        )


def _require_writable(folder: Path) -> None:
    """Raise for a file in place of the folder, and for a folder that this user can't write to."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise _bad_dir(
            f"output_dir {folder} is not a folder",
            why=f"{nearest} is a file",
            do="set output_dir to a folder of its own",
        )
    try:
        # Only writing tests this for root, read-only mounts and unusual file systems alike.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise _bad_dir(
            f"output_dir {folder} can't be written to",
            why=f"{nearest}: {error.strerror}; it belongs to user "
            f"{nearest.stat().st_uid}, this is user {os.getuid()}",
            do="set output_dir elsewhere, or chown the folder",
        ) from error


def _not_empty(folder: Path, found: list[str], *, newest: Path | None) -> AttnimgError:
    """Return the error for a folder with other files, with advice on resuming the run in it."""
    found = [name for name in found if name not in HARMLESS]
    shown = ", ".join(found[:4]) + (" ..." if len(found) > 4 else "")
    resume = f"set resume_from_checkpoint: true (resumes from {newest.name}), or " if newest else ""
    return _bad_dir(
        f"output_dir {folder} is not empty",
        why=f"found {shown}; a new run would mix with it",
        do=f"{resume}set another output_dir, or remove the folder",
        code="output-dir-not-empty",
    )


def _bad_dir(what: str, *, why: str, do: str, code: str = "output-dir") -> AttnimgError:
    return AttnimgError(what, why=why, do=do, code=code, key="output_dir")


def prepare_output_dir(folder: Path, resume: ResumePoint | None, *, console: Console) -> None:
    """Remove what a killed run left in output_dir after `resume`; the folder is locked."""
    if resume is None:
        return
    for leftover in resume.leftovers:
        metrics.print_line(console, f"removing {leftover.name}: it was never finished")
    remove_leftovers(folder)
    notes = list(resume.notes)
    for path in resume.damaged:
        notes.append(f"{path.name} is renamed to {set_aside(path).name}")
    for note in notes:
        metrics.print_line(console, printable(note))
    restored = read_state(resume.path) if resume.path else {}
    again = bool(restored.get("evaluate_first"))
    cut = metrics.cut_after(folder, resume.step, evaluate_again=again)
    redone = f"; {cut} logged lines after it are done again" if cut else ""
    if resume.path:
        metrics.print_line(console, f"resuming from {resume.path}{redone}")


def require_unlocked(folder: Path) -> None:
    """Raise if another process trains in a folder; the lock is not acquired.

    Raises:
        AttnimgError: code output-dir-busy.
    """
    if (folder / FILE).is_file():
        os.close(_locked(folder))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and hold its lock inside the block.

    Raises:
        AttnimgError: another process trains there (code output-dir-busy).
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = _locked(folder)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _locked(folder: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(folder / FILE, flags, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return handle  # some network file systems have no locks
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        raise AttnimgError(
            f"another run trains in output_dir {folder}",
            why=f"found {folder / FILE}, locked by {owner or 'a process that is starting'}\n"
            "needed: a folder that no running process writes to",
            do="set another output_dir, or wait until that run has ended",
            code="output-dir-busy",
            key="output_dir",
        ) from None
    return handle
