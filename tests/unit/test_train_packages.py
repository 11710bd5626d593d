"""`attnimg train` is refused without the packages of its extra; the other commands need none."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from attnimg.errors import AttnimgError
from attnimg.train.packages import require_trainer, require_versions, train_only

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TRAIN = [Requirement(text) for text in PROJECT["optional-dependencies"]["train"]]
BASE = [Requirement(text) for text in PROJECT["dependencies"]]
# Imported by nothing but the trainer.
TRAINER = sorted({need.name for need in TRAIN} - {need.name for need in BASE} - {"safetensors"})

# As `pip install attnimg` leaves them.
WITHOUT_TRAINER = f"""
import runpy, sys
from importlib import metadata
for name in {TRAINER}:
    sys.modules[name] = None
of_all = metadata.version
metadata.version = lambda name: of_all("no-such-package" if name in {TRAINER} else name)
"""


def python(code: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TRAINER + code, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "ATTNIMG_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1",
             "PATH": "/bin", "HOME": str(tmp_path)},
    )  # fmt: skip


def test_the_extra_of_the_metadata_is_read() -> None:
    listed = ["rich>=14", "trl==1.16.0; extra == 'train'", "tomli; python_version < '3'"]
    assert [str(need.specifier) for need in train_only(listed)] == ["==1.16.0"]


def test_the_packages_of_this_environment_are_allowed() -> None:
    require_trainer()


@pytest.mark.parametrize(
    ("found", "said"),
    [
        pytest.param({}, "found no trl; needed trl==1.16.0", id="a missing package"),
        pytest.param({"trl": "1.9.0"}, "found trl 1.9.0; needed trl==1.16.0", id="another version"),
    ],
)
def test_a_trainer_that_is_not_there_is_refused(found: dict[str, str], said: str) -> None:
    good = {need.name: next(iter(need.specifier)).version for need in TRAIN}
    require_versions(TRAIN, good)
    with pytest.raises(AttnimgError) as caught:
        require_versions(TRAIN, {name: good[name] for name in good if name != "trl"} | found)
    assert caught.value.code == "trainer-not-installed"
    assert caught.value.why == said
    assert "pip install 'attnimg[train]'" in caught.value.do


def test_the_versions_of_the_trainer_are_within_those_of_the_other_commands() -> None:
    pins = {need.name: next(iter(need.specifier)).version for need in TRAIN}
    both = [need for need in BASE if need.name in pins]
    assert {need.name for need in both} == {"kernels", "transformers"}
    assert all(need.specifier.contains(pins[need.name]) for need in both)


@pytest.mark.parametrize(
    "arguments",
    [("check", "examples/pretrain.yaml"), ("explain", "examples/pretrain.yaml", "--on", "h100")],
    ids=lambda arguments: arguments[0],
)
def test_a_command_runs_without_the_trainer(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = python("runpy.run_module('attnimg', run_name='__main__')", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr


def test_the_api_applies_a_backend_without_the_trainer(tmp_path: Path) -> None:
    done = python(
        """
import attnimg
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=64,
                     num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
model = AutoModelForCausalLM.from_config(config)
print(attnimg.apply(model, packing=True, sequence_len=64).verified)
""",
        tmp_path,
    )
    assert done.stdout == "True\n", done.stderr


def test_train_without_its_packages_says_how_to_install_them(tmp_path: Path) -> None:
    listed = f"""
metadata.requires = lambda name: {[f"{need}; extra == 'train'" for need in TRAIN]}
runpy.run_module('attnimg', run_name='__main__')
"""
    done = python(listed, tmp_path, "train", "examples/pretrain.yaml")
    assert done.returncode == 1, done.stderr
    assert "the packages of `attnimg train` are not installed" in done.stderr
    assert "found no trl; needed trl==1.16.0" in done.stderr
    assert "pip install 'attnimg[train]'" in done.stderr
