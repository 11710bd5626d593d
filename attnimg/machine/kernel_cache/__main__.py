"""Print the variables for the shell that starts a program, if there are any to set."""

from __future__ import annotations

import os
import shlex
import sys

from attnimg.errors import AttnimgError
from attnimg.machine.kernel_cache import settings_for
from attnimg.machine.probe import this_machine

if __name__ == "__main__":
    settings: dict[str, str] = {}
    try:
        settings = settings_for(this_machine(()), os.environ)
    except AttnimgError as error:
        print(error, file=sys.stderr)  # noqa: T201 - stdout is read by the shell
    for name, value in settings.items():
        print(f"export {name}={shlex.quote(value)}")  # noqa: T201 - what this is for
