"""Put the packages of /opt/added before the image's own, in every Python of /opt/venv.

attnimg_added.pth imports this file when Python starts. /opt/added is the virtual environment into
which pip and uv install for a user who may not write to /opt/venv (installer.sh, image_venv.py).
"""

from __future__ import annotations

import os
import site
import sys

ADDED = "/opt/added"
TESTED = "/etc/pip/tested.txt"
PACKAGES = f"{ADDED}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def reason_against() -> str:
    """Return why the packages of the folder are not used; empty if they are, or there are none."""
    try:
        owner = os.stat(f"{ADDED}/pyvenv.cfg").st_uid  # noqa: PTH116  without pathlib: at every start
        with open(f"{ADDED}/tested.txt", "rb") as theirs, open(TESTED, "rb") as ours:  # noqa: PTH123  the same
            if theirs.read() != ours.read():
                return "they were installed beside another image's packages"
    except OSError:
        return ""
    if owner != os.geteuid():
        # Root would import what another user wrote.
        return f"they belong to user {owner}, this is user {os.geteuid()}"
    return ""


def put_first() -> None:
    """Insert the folder, and what its .pth files name, before the folder of this file."""
    if PACKAGES in sys.path or not os.path.isdir(PACKAGES) or reason_against():  # noqa: PTH112  the same
        return
    before = len(sys.path)
    site.addsitedir(PACKAGES)
    added = sys.path[before:]
    del sys.path[before:]
    own = os.path.dirname(__file__)  # noqa: PTH120  the same
    place = sys.path.index(own) if own in sys.path else before
    sys.path[place:place] = added


put_first()
