"""Run `attnimg` commands in forks of one process that has the libraries loaded: 0.1 s each, not 6.

Read a command a line from stdin, as JSON, and write its end to stdout:

    {"arguments": [...], "folder": ".", "environ": {...}, "limits": {"AS": 4000000}, "seconds": 9,
     "until": ["out/checkpoint-2"]}
    {"code": 2, "seconds": 0.3, "peak_bytes": 350000000, "ended": true}

A fork is killed after `seconds`, or when one of the paths `until` exists. Its stdout and stderr go
to the files out.txt and err.txt of its folder.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load() -> None:
    """Import what `attnimg train` imports."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    import trl  # noqa: F401

    import attnimg

    for module in pkgutil.walk_packages(attnimg.__path__, "attnimg."):
        # Integrations import other trainers, which are not installed here.
        if "__main__" not in module.name and ".integrations." not in module.name:
            importlib.import_module(module.name)


def run_command(asked: dict[str, Any]) -> None:
    """Run a command in this process, and end it."""
    import attnimg.__main__ as program

    os.setsid()
    for number, name, flags in ((0, os.devnull, os.O_RDONLY),
                                (1, "out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
                                (2, "err.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):  # fmt: skip
        opened = os.open(Path(asked["folder"]) / name, flags)  # /dev/null stays what it is
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(asked["folder"])
    os.environ.update(asked["environ"])
    for name, value in asked["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    sys.argv = ["attnimg", *asked["arguments"]]
    code = 70
    try:
        program.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child: int, *, seconds: float, until: Sequence[Path]) -> tuple[int, int, bool]:
    """Wait for a child; return its status, its largest memory, and whether it ended by itself.

    Args:
        child: its process id.
        seconds: after which it is killed.
        until: paths; it is killed when one of them exists.
    """
    deadline, ended = time.monotonic() + seconds, True
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage.ru_maxrss * 1024, ended
        if ended and (time.monotonic() > deadline or any(path.exists() for path in until)):
            ended = False
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)


def main() -> None:
    load()
    sys.stdout.write('"ready"\n')
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if not child:
            run_command(asked)
        status, peak, ended = wait_for(
            child,
            seconds=asked["seconds"],
            until=[Path(asked["folder"]) / name for name in asked["until"]],
        )
        answer = {"code": os.waitstatus_to_exitcode(status), "peak_bytes": peak, "ended": ended,
                  "seconds": round(time.monotonic() - began, 2)}  # fmt: skip
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
