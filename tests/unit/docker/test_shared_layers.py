"""docker/shared_layers.py compares the layers of the images that are built, if there are two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# As `docker history` prints it, the newest first; the base has commands of its own.
HISTORY = (
    ("CMD [\"attnimg\"]", 0),
    ("WORKDIR /workspace", 0),
    ("RUN |4 IMAGE=cpu /bin/bash -c python -B /image_files.py", 10),
    ("COPY /files / # buildkit", 18),
    ("ENV A=b", 0),
    ("RUN |2 LOCK=x /bin/bash -c /install/install.sh -r /stack.txt -r /e.txt", 500),
    ("ARG LOCK", 0),
    ("RUN |2 LOCK=x /bin/bash -c /install/install.sh --find-links /torch-wheel -r /torch.txt", 400),
    ("RUN |3 APT_PACKAGES=tini /bin/bash -c apt-get update", 30),
    ("SHELL [/bin/bash -c]", 0),
    ("", 170),
)  # fmt: skip
LAYERS = ["base", "python", "torch", "stack", "files", "attnimg", "workdir"]
DOCKER = """#!{python}
import json, sys
state = json.load(open({state!r}))
if "ls" in sys.argv:
    print(*state["tags"], sep="\\n", end="\\n" * bool(state["tags"]))
elif "inspect" in sys.argv:
    print(json.dumps(state["layers"][sys.argv[-1]]))
else:
    print(*(json.dumps(line) for line in state["history"]), sep="\\n")
"""


def compare(
    folder: Path, tags: list[str], layers: dict[str, list[str]]
) -> subprocess.CompletedProcess[str]:
    """Run the program with an engine that has these images."""
    history = [{"CreatedBy": text, "Size": str(size * 10**6)} for text, size in HISTORY]
    state = {"tags": tags, "layers": layers, "history": history}
    (folder / "state").write_text(json.dumps(state))
    text = DOCKER.format(python=sys.executable, state=str(folder / "state"))
    (folder / "docker").write_text(text)
    (folder / "docker").chmod(0o755)
    return subprocess.run(
        [sys.executable, "docker/shared_layers.py"], cwd=ROOT, check=False,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True, text=True,
    )  # fmt: skip


def test_images_with_one_torch_share_its_layer_and_the_stack(tmp_path: Path) -> None:
    layers = {"attnimg:ampere": LAYERS, "attnimg:hopper": [*LAYERS[:4], "a", "b", "c"]}
    # The alias of one, and an image with another torch.
    tags = ["1 ampere", "1 ada", "2 hopper", "3 cpu", "4 mine"]
    done = compare(tmp_path, tags, layers)
    assert (done.returncode, done.stderr) == (0, "")
    assert "attnimg:ampere and attnimg:hopper" in done.stdout
    assert "shared  torch, 400 MB: torch in attnimg:ampere, attnimg:hopper" in done.stdout
    assert "shared  stack, 500 MB: stack in attnimg:ampere, attnimg:hopper" in done.stdout
    assert "cpu" not in done.stdout
    assert "ada" not in done.stdout


@pytest.mark.parametrize("place", [2, 3])
def test_another_layer_is_named_with_its_images(tmp_path: Path, place: int) -> None:
    other = [*LAYERS[:place], "other", *LAYERS[place + 1 :]]
    layers = {"attnimg:cpu": LAYERS, "attnimg:cpu-devel": other}
    done = compare(tmp_path, ["1 cpu", "2 cpu-devel"], layers)
    assert done.returncode == 1
    assert f"{LAYERS[place]} in attnimg:cpu; other in attnimg:cpu-devel" in done.stdout
    assert done.stdout.count("DIFFERS") == 1
    assert "have different layers" in done.stderr
    assert "  do:  " in done.stderr


@pytest.mark.parametrize(
    ("tags", "found", "do"),
    [
        ([], "found none", "make build/cpu build/cpu-devel"),
        (["1 cpu"], "attnimg:cpu (torch 2.13.0-cpu)", "make build/cpu build/cpu-devel"),
        (["1 turing-devel"], "attnimg:turing-devel", "make build/turing build/turing-devel"),
        (["1 cpu", "2 turing"], "attnimg:turing", "make build/cpu build/cpu-devel"),
        (["1 ampere", "1 ada"], "attnimg:ampere", "make build/ampere build/ampere-devel"),
    ],
)
def test_fewer_than_two_images_are_no_proof(
    tmp_path: Path, tags: list[str], found: str, do: str
) -> None:
    done = compare(tmp_path, tags, {})
    assert done.returncode == 1
    what, why, last = done.stderr.splitlines()
    assert what.endswith("fewer than two images with the same torch are built")
    assert found in why
    assert last == f"  do:  {do}"
