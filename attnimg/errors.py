"""What went wrong, why, and what to do: the one exception that reaches people."""

from __future__ import annotations

from functools import partial
from pathlib import Path


class AttnimgError(Exception):
    """Something a person can mend: their input, their machine, or a kernel that failed.

    Args:
        what: what happened, one line, no full stop.
        why: what was found and what is needed; may have several lines.
        do: the mend, as a command or a config line where there is one.
        code: the contract's code, such as "packing-not-isolated".
        key: the config key at fault, such as "datasets[0].path".
        exit_code: 2 when it could be known before the run, 1 when the run itself failed.
    """

    def __init__(
        self,
        what: str,
        *,
        why: str,
        do: str,
        code: str = "error",
        key: str | None = None,
        exit_code: int = 2,
    ) -> None:
        super().__init__(what)
        self.what, self.why, self.do = what, why, do
        self.code, self.key, self.exit_code = code, key, exit_code

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with the keywords, so that a worker process can raise it in its parent."""
        rest = {name: getattr(self, name) for name in ("why", "do", "code", "key", "exit_code")}
        return partial(type(self), **rest), (self.what,)

    def __str__(self) -> str:
        """Render the three parts, aligned, as they stand on stderr."""
        parts = [f"attnimg: {self.what}"]
        for label, text in (("why", self.why), ("do", self.do)):
            first, *rest = text.splitlines() or [""]
            parts.append(f"  {label + ':':<4} {first}")
            parts.extend(f"       {line}" for line in rest)
        return "\n".join(parts)


def bad_manifest(path: Path, error: Exception) -> AttnimgError:
    """Say that a file which an image's build wrote can't be read."""
    return AttnimgError(
        f"{path} cannot be read",
        why=f"{type(error).__name__}: {error}; an image writes it when it is built",
        do="pull the image again",
        code="bad-image",
        exit_code=1,
    )
