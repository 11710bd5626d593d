"""Make a virtual environment that has the image's packages, and may have other versions of some.

    python /opt/attnimg/image_venv.py FOLDER

What is installed there comes before the image's packages, in this environment alone. `python -m
venv --system-site-packages` has the system's packages, and not those of /opt/venv. pip finds
installed packages on sys.path; uv looks into the environment's own folder, so that the image's
packages are declared there: uv does not install torch and the others again.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NoReturn

FIXED, TESTED = Path("/etc/pip/constraint.txt"), Path("/etc/pip/tested.txt")
DOCKERFILE = "FROM the image, USER root, RUN pip install ..., USER 1000:1000"


def fail(what: str, why: str, do: str) -> NoReturn:
    """Exit with an error: what happened, why, and what to do."""
    sys.exit(f"attnimg: {what}\n  why: {why}\n  do:  {do}")


def declare_packages(own: Path, site: Path) -> None:
    """Write a dist-info folder for each package of the image.

    A package that may not be replaced gets no RECORD, without which pip and uv refuse to uninstall
    it, and so to install another version. RECORD of another package names this folder alone, so
    that an installer can replace the declaration by the package in another version. INSTALLER marks
    it as a declaration (attnimg/distributions.py); pip's refusal names it.
    """
    fixed = {line.partition("==")[0] for line in FIXED.read_text(encoding="utf-8").splitlines()}
    for source in own.glob("*.dist-info"):
        info = site / source.name
        info.mkdir(exist_ok=True)
        # Python reads entry points of the first folder that has a package.
        copied = [
            name for name in ("METADATA", "WHEEL", "entry_points.txt") if (source / name).exists()
        ]
        for name in copied:
            (info / name).write_bytes((source / name).read_bytes())
        (info / "INSTALLER").write_text("attnimg\n", encoding="utf-8")
        if re.sub(r"[-_.]+", "-", source.name.partition("-")[0]).lower() not in fixed:
            record = [f"{source.name}/{name},," for name in (*copied, "INSTALLER", "RECORD")]
            (info / "RECORD").write_text("\n".join(record) + "\n", encoding="utf-8")


def copy_programs(folder: Path, own: Path) -> None:
    """Write the image's Python programs (pip, attnimg, accelerate...) for this environment."""
    old, new = f"#!{own}/bin/python", f"#!{folder}/bin/python"
    for program in (own / "bin").iterdir():
        with program.open("rb") as stream:
            if program.is_symlink() or stream.read(len(old)) != old.encode():
                continue
        target = folder / "bin" / program.name
        target.write_text(program.read_text().replace(old, new, 1))
        target.chmod(0o755)


def make(folder: Path) -> None:
    """Make the environment in a folder that is empty, not there, or has this user's."""
    config = folder / "pyvenv.cfg"
    if config.exists() and config.stat().st_uid != os.geteuid():
        why = f"{config} belongs to user {config.stat().st_uid}, this is user {os.geteuid()}"
        fail(
            f"{folder} has the packages of another user", why, "mount another volume there, or none"
        )
    # It is written last: without it, the environment was not finished.
    if config.exists() and (tested := folder / TESTED.name).exists():
        if tested.read_bytes() != TESTED.read_bytes():
            why = f"{tested} has other versions than {TESTED}"
            fail(f"{folder} was made in another image", why, "use an empty folder or volume")
        return
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not config.exists() and found - {"lost+found"}:
        why = "found files there, and no pyvenv.cfg"
        fail(f"{folder} is no virtual environment", why, "name an empty folder, or a new one")
    venv.EnvBuilder(symlinks=True).create(folder)
    paths = sysconfig.get_paths(scheme="venv", vars={"base": str(folder)})
    site, own = Path(paths["purelib"]), Path(sysconfig.get_path("purelib"))
    (site / "image.pth").write_text(f"import site; site.addsitedir({str(own)!r})\n")
    declare_packages(own, site)
    copy_programs(folder, Path(sys.prefix))
    shutil.copyfile(TESTED, folder / TESTED.name)


def main(folder: Path) -> None:
    """Make the environment, or say why that is not possible."""
    try:
        make(folder)
    except OSError as error:
        do = f"write a Dockerfile ({DOCKERFILE}), or mount a volume that this user may write"
        if str(folder) == "/opt/added":
            do += f": -v NAME:{folder}, or --tmpfs {folder}:exec,mode=1777"
        fail(f"no package can be installed into {folder}", str(error), do)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        fail("no folder is given", f"found {sys.argv[1:]}, needed one", "image_venv.py FOLDER")
    main(Path(sys.argv[1]).absolute())
