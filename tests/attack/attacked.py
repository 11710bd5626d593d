"""Run attnimg on wrong inputs, and say what is wrong with how a run ended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

SERVER = Path(__file__).with_name("forked.py")
# A refusal takes little: the process itself has 0.6 GB after its imports.
MOST_BYTES = 3 << 30
# What a refusal has, for people and in JSON.
REFUSALS = (("why:", "do:"), ('"why":', '"do":'), ("usage:",))
CONTROL = re.compile("[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]")


def put_inputs(folder: Path, home: Path) -> None:
    """Link the model and the data of `home` into a folder, where the right config names them.

    Its paths are relative, so that no case depends on a temporary path.
    """
    for name in ("model", "data.jsonl"):
        if not (folder / name).exists():
            (folder / name).symlink_to(home / name)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: its exit code; negative for a signal.
        out: its standard output.
        err: its standard error.
        seconds: how long it took.
        peak_bytes: its largest resident memory.
        ended: whether it ended by itself, within its time.
    """

    code: int
    out: str
    err: str
    seconds: float
    peak_bytes: int
    ended: bool

    @property
    def fault(self) -> str:
        """Return what is wrong with it; "" after a run, or a refusal with why and do."""
        if not self.ended:
            return f"it did not end within {self.seconds:.0f} s"
        if "this is a bug in attnimg" in self.err:
            return "an error that attnimg did not foresee"
        if "Traceback" in self.err:
            return "a traceback"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        said = self.err + self.out
        if self.code and not any(all(w in said for w in words) for words in REFUSALS):
            return "a refusal without why and do"
        if found := CONTROL.search(self.err + self.out):
            return f"the control character {found.group()!a} on the terminal"
        if self.peak_bytes > MOST_BYTES:
            return f"it used {self.peak_bytes >> 20:,} MiB"
        return ""

    @property
    def fault_with_text(self) -> str:
        """Return what is wrong with it, and the end of what it printed."""
        return f"{self.fault}: {self.err[-600:]!a}" if self.fault else ""


class Attnimg:
    """The process that runs commands; a context manager.

    Args:
        prefix: a command that the process is started by.
    """

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self.prefix = prefix

    def __enter__(self) -> Attnimg:
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, str(SERVER)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=os.environ | quiet,
        )  # fmt: skip
        self._answer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:  # a command still runs
            self.process.kill()
            self.process.communicate()

    def run(
        self,
        arguments: Sequence[str],
        *,
        folder: Path,
        environ: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        seconds: float = 90,
        until: Sequence[str] = (),
    ) -> Outcome:
        """Run one command in a folder.

        Args:
            arguments: after `attnimg`.
            folder: becomes the working directory.
            environ: variables to set.
            limits: of resources, such as "AS" in bytes.
            seconds: after which it is killed by SIGKILL.
            until: paths in the folder; it is killed when one of them exists.
        """
        asked = {
            "arguments": list(arguments), "folder": str(folder), "environ": environ or {},
            "limits": dict(limits or {}), "seconds": seconds, "until": list(until),
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        texts = {}
        answer = self._answer()
        for key, name in (("out", "out.txt"), ("err", "err.txt")):
            path = folder / name
            texts[key] = path.read_text(errors="replace") if path.exists() else ""
        return Outcome(**texts, **answer)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())
