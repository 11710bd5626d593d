"""A user's script that uses attnimg is checked by mypy --strict; importing attnimg is light."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from textwrap import dedent

import pytest

import attnimg

ROOT = Path(attnimg.__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "trainer").glob("*.py"))
# torch's own types take mypy 30 s; other libraries have none for --strict.
CONFIG = """
    [mypy]
    strict = True
    python_version = 3.11
    [mypy-torch.*,transformers.*,trl.*,peft.*,accelerate.*,datasets.*]
    follow_imports = skip
    ignore_missing_imports = True
    [mypy-plain_pytorch]
    disallow_subclassing_any = False
"""
RIGHT = """
    from typing import assert_type

    import attnimg
    from attnimg.integrations.transformers import AttnimgCallback

    choice = attnimg.select("org/model", packing=True, sequence_len=8192, on="h100")
    assert_type(choice, attnimg.Choice)
    assert_type(choice.backend, str)
    assert_type(choice.verify(), attnimg.Choice)
    with attnimg.use(choice) as used:
        assert_type(used, attnimg.Choice)
    for verdict in choice.candidates:
        assert_type(verdict.fits, bool)
    for proof in attnimg.verify({"model_type": "llama"}, dtype="bfloat16"):
        assert_type(proof.passed, bool)
    try:
        assert_type(attnimg.apply(object(), packing=True), attnimg.Choice)
    except attnimg.PackingLeak as leak:
        assert_type(leak.why, str)
    callback = AttnimgCallback(packing=True)
    assert_type(callback.choice, attnimg.Choice | None)
"""
WRONG = """
    import attnimg
    from attnimg.integrations.transformers import AttnimgCallback

    attnimg.select("org/model", packing="x")
    attnimg.select("org/model", sequence_length=5)
    attnimg.apply(object(), packing="x")
    attnimg.verify("org/model", backend=None)
    attnimg.attention(None, None, None, window="x")
    attnimg.selct("org/model")
    attnimg.select("org/model").backend + 1
    AttnimgCallback(packing="x")
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what mypy --strict finds in the examples, a right script and a wrong one."""
    folder = tmp_path_factory.mktemp("types")
    for name, text in (("mypy.ini", CONFIG), ("right.py", RIGHT), ("wrong.py", WRONG)):
        (folder / name).write_text(dedent(text))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "right.py", "wrong.py", *map(str, SCRIPTS)],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_right_scripts_pass(found):
    assert len(SCRIPTS) >= 4
    assert [line for line in found if ": error:" in line and not line.startswith("wrong.py")] == []


def test_each_wrong_argument_is_an_error(found):
    lines = {int(line.split(":")[1]) for line in found if line.startswith("wrong.py")}
    first = dedent(WRONG).splitlines().index('attnimg.select("org/model", packing="x")') + 1
    assert lines == set(range(first, len(dedent(WRONG).splitlines()) + 1))


def test_a_script_outside_the_checkout_finds_the_types(tmp_path):
    if any(Path(sysconfig.get_path("purelib")).glob("__editable___attnimg_*_finder.py")):
        pytest.skip("attnimg was installed by an older `make setup`: run make clean setup")
    (tmp_path / "mypy.ini").write_text(dedent(CONFIG))
    (tmp_path / "script.py").write_text(
        'import attnimg\n\nattnimg.select("org/model", on="h100")\nattnimg.select(5, packing="x")\n'
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert ["arg-type" in line for line in errors] == [True], done.stdout
    assert errors[0].startswith("script.py:4:")


LIGHT = [
    "import attnimg",
    "import attnimg; attnimg.Choice; attnimg.KernelError; dir(attnimg)",
    "import attnimg; attnimg.select({config}, packing=True, on='h100').to_dict()",
    "import attnimg; print(attnimg.select({config}, backend='sdpa'))",
]
HEAVY = ("torch", "transformers", "numpy", "accelerate", "peft", "trl", "datasets")


@pytest.mark.parametrize("code", LIGHT)
def test_selecting_imports_no_torch(code):
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
              "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    code = code.format(config=config)
    code += f"; import sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
