"""Writing that fails says so in words: a full disk, a folder one may not write to."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnimg.errors import AttnimgError

# What libraries that hide the error number write into their text instead. torch.save:
# "PytorchStreamWriter failed writing file"; safetensors: "... (os error 28)".
FULL = ("no space left", "os error 28", "disk quota exceeded", "os error 122", "file too large")
# They write in pieces, so a little may be left when the next piece did not fit.
HARDLY_ANY = 4 * 2**20
UNWRITTEN = ("failed writing", "error while serializing", "write failed", "unexpected pos")


@contextmanager
def writing(path: Path, *, kept: str) -> Iterator[None]:
    """Turn what fails while `path` is written into an error that says what was lost.

    Args:
        path: what is being written.
        kept: what is safe all the same, as a sentence.

    Raises:
        AttnimgError: code disk-full or not-written, exit code 1.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error).lower()
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(s in text for s in FULL)
        if not full and not isinstance(error, OSError):
            if not any(s in text for s in UNWRITTEN):
                raise
            full = _free_bytes(path) < HARDLY_ANY
        # torch's own words, "unexpected pos 87872 vs 87760", would only puzzle.
        reason = "no space left" if full else str(error).strip().splitlines()[0]
        raise AttnimgError(
            f"the disk is full: {path.name} could not be written"
            if full
            else f"{path.name} could not be written",
            why=f"{path}: {reason}\n{_free_bytes(path) / 2**20:,.1f} MiB free there; {kept}",
            do="free space, then run again with resume_from_checkpoint: true",
            code="disk-full" if full else "not-written",
            key="output_dir",
            exit_code=1,
        ) from error


def _free_bytes(path: Path) -> int:
    """Tell how much room is left where `path` would stand."""
    place = next((p for p in (path, *path.parents) if p.exists()), Path())
    left = os.statvfs(place)
    return left.f_bavail * left.f_frsize


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one at every moment."""
    fresh = path.with_name(f".{path.name}.partial")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
