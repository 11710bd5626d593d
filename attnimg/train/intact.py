"""Check that the files of a checkpoint are as they were written, and find the newest whole one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from attnimg.errors import AttnimgError
from attnimg.train import manifest, other_checkpoints
from attnimg.train.checkpoint import checkpoints, step_of
from attnimg.train.pickled_weights import require_safetensors

_KEY = "resume_from_checkpoint"


def damages_of(checkpoint: Path) -> list[str]:
    """Return what is wrong with a checkpoint's files, as manifest.damages does.

    Raises:
        AttnimgError: it has no manifest, and its weights are pickled (code pickled-weights).
    """
    step = step_of(checkpoint)
    if manifest.has_manifest(checkpoint):
        return manifest.damages(checkpoint, step=step)
    require_safetensors(checkpoint, key=_KEY)
    return other_checkpoints.damages(checkpoint, step=step)


def newest_whole(found: list[Path]) -> tuple[Path | None, dict[Path, list[str]]]:
    """Return the newest whole checkpoint, and the newer ones with what is wrong with each.

    Args:
        found: checkpoints, lowest step first.
    """
    damaged: dict[Path, list[str]] = {}
    for path in reversed(found):
        wrong = damages_of(path)
        if not wrong:
            return path, damaged
        damaged[path] = wrong
    return None, damaged


def notes_on(checkpoint: Path, damaged: dict[Path, list[str]]) -> tuple[str, ...]:
    """Return lines for the user on a whole checkpoint, and on newer ones that are damaged."""
    notes = [
        f"warning: {path.name} is damaged ({wrong[0]}"
        + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        + f"): resuming from {checkpoint.name}, the newest whole one"
        for path, wrong in damaged.items()
    ]
    if not manifest.has_manifest(checkpoint):
        notes.append(
            f"warning: {checkpoint.name} has no manifest: its files can be read, but whether they "
            "are as they were written can't be checked"
        )
        if not any(checkpoint.glob("rng_state*")):
            notes.append(
                f"warning: {checkpoint.name} has no rng_state: dropout uses other random numbers"
            )
    return tuple(notes)


def damaged(checkpoint: Path, wrong: list[str], *, output_dir: Path) -> AttnimgError:
    """Return the error on a damaged checkpoint, which names the newest whole one beside it.

    Args:
        checkpoint: the damaged one.
        wrong: what is wrong with it.
        output_dir: of the run.
    """
    others = [path for path in checkpoints(checkpoint.parent) if path.name != checkpoint.name]
    newest = None
    with suppress(AttnimgError):  # one with pickled weights
        newest = newest_whole(others)[0]
    if newest is None:
        do = (
            f"copy {checkpoint.name} again from where it was written: no whole checkpoint is in "
            f"{checkpoint.parent}\nor, for a new run, set another output_dir and remove {_KEY}"
        )
    elif newest.resolve().parent == output_dir.resolve() and step_of(newest) < step_of(checkpoint):
        do = f"set {_KEY}: true, which resumes from {newest.name}, the newest whole one"
    else:
        do = f"set {_KEY}: {newest}, the newest whole one"
    shown = [*wrong[:8], *([f"and {len(wrong) - 8} more"] if len(wrong) > 8 else [])]
    return AttnimgError(
        f"{checkpoint} is damaged",
        why="\n".join(shown),
        do=do,
        code="damaged-checkpoint",
        key=_KEY,
    )
