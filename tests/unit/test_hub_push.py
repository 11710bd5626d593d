"""Test that a trained model is pushed to a hub, that nothing else is, and what refuses.

The hub is a server on this machine: hub_server.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from hub_server import Hub
from tiny_run import make_model, run, sentences

from attnimg.__main__ import run as attnimg
from attnimg.errors import AttnimgError
from attnimg.train.hub import is_model_file

# huggingface_hub 2.4.0 uploads with an argument that its HTTP client will rename.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).parents[2]
MODEL = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"]  # fmt: skip
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
           "tokenizer_config.json"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_model(folder / "model")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub, and let this process use it: huggingface_hub read its variables already."""
    from huggingface_hub import constants

    with Hub() as server:
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


def stored(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_run_pushes_its_adapter_at_saves_and_at_the_end(
    home: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(home, tmp_path / "out", max_steps=4, save_steps=2, adapter="lora",
                 hub_model_id="org/model")  # fmt: skip
    assert result.push_error is None
    assert hub.repositories == {"org/model": True}, "private"
    assert [(branch, paths) for branch, _, paths in hub.commits] == [("main", ADAPTER)] * 3
    for name in ADAPTER:
        assert hub.files["main"][name] == (tmp_path / "out" / name).read_bytes(), name
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    assert receipt["hub"] == {
        "repository": "org/model", "revision": "main", "url": f"{hub.url}/org/model",
        "commit": f"{hub.url}/org/model/commit/{3:040x}",
    }  # fmt: skip
    assert hub.token.encode() not in stored(tmp_path)
    assert hub.token not in capsys.readouterr().err
    assert not (tmp_path / "out/.hub").exists()


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [("end", []), ("checkpoint", ["last-checkpoint"] * 2),
     ("all_checkpoints", ["checkpoint-2", "checkpoint-4"])],
)  # fmt: skip
def test_checkpoints_are_pushed_whole_if_requested(
    home: Path, tmp_path: Path, hub: Hub, strategy: str, folders: list[str]
) -> None:
    result = run(home, tmp_path / "out", max_steps=4, save_steps=2, save_total_limit=1,
                 hub_model_id="org/model", hub_strategy=strategy,
                 hub_revision="tries/1")  # fmt: skip
    assert result.push_error is None
    *saves, last = hub.commits
    assert last == ("tries/1", "attnimg: the trained model", MODEL)
    pushed = [sorted({path.partition("/")[0] for path in paths if "/" in path})
              for _, _, paths in saves]  # fmt: skip
    assert pushed == [[name] for name in folders]
    if folders:
        kept = tmp_path / "out/checkpoint-4"
        for path in kept.iterdir():
            assert hub.files["tries/1"][f"{folders[-1]}/{path.name}"] == path.read_bytes()


def test_a_run_without_steps_left_pushes_its_model(home: Path, tmp_path: Path, hub: Hub) -> None:
    keys = {"max_steps": 2, "save_steps": 2}
    run(home, tmp_path / "out", **keys)
    run(home, tmp_path / "out", hub_model_id="model", resume_from_checkpoint=True, **keys)
    assert [paths for _, _, paths in hub.commits] == [MODEL]
    assert hub.repositories == {"me/model": True}


def test_a_failed_push_of_a_checkpoint_is_a_warning(
    home: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse["/api/models/org/model/preupload"] = 403
    result = run(home, tmp_path / "out", max_steps=4, save_steps=2, hub_model_id="org/model")
    assert result.push_error is not None
    assert "warning: checkpoint-2 was not pushed to org/model" in capsys.readouterr().err
    assert result.steps == 4


def test_a_repository_of_others_is_refused_before_the_first_step(
    home: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.refuse["/api/repos/create"] = 403
    with pytest.raises(AttnimgError, match="org/model cannot be written to") as caught:
        run(home, tmp_path / "out", hub_model_id="org/model")
    assert (caught.value.code, caught.value.exit_code) == ("hub-unavailable", 1)
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_failed_push_keeps_the_model_and_its_advice_pushes_it(
    home: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse["/api/models/org/model/commit"] = 403
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in sentences(9))
    )
    config = {
        "base_model": str(home / "model"), "learning_rate": 1e-3, "bf16": False,
        "datasets": [{"path": str(tmp_path / "data.jsonl"), "type": "completion"}],
        "sequence_len": 64, "max_steps": 1, "attn_implementation": "sdpa",
        "output_dir": str(tmp_path / "out"), "hub_model_id": "org/model", "hub_strategy": "end",
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert attnimg(["train", str(tmp_path / "c.yaml")]) == 1
    printed, errors = capsys.readouterr()
    assert "the model was trained, but not pushed to org/model" in errors
    assert str(tmp_path / "out/model.safetensors") in printed.split()
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    assert receipt["status"] == "done"
    assert "403" in receipt["hub"]["error"]
    assert hub.token.encode() not in stored(tmp_path) + (printed + errors).encode()
    hub.refuse.clear()
    (command,) = re.findall(r"do: +(hf upload .*)", errors)
    program = str(Path(sys.executable).with_name("hf"))
    done = subprocess.run([program, *shlex.split(command)[1:]], capture_output=True, text=True,
                          env={**os.environ, **hub.environ()}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(hub.files["main"]) == MODEL


REQUIRE = """
import sys
from attnimg.config.schema import Config
from attnimg.__main__ import run as attnimg
from attnimg.errors import AttnimgError
from attnimg.train.trackers import require_hub
try:
    require_hub(Config(hub_model_id="org/model"))
except AttnimgError as error:
    sys.exit(str(error))
"""


def require_hub(environ: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder),
               "HF_HOME": str(folder / "hf"), **environ}  # fmt: skip
    return subprocess.run([sys.executable, "-c", REQUIRE], env=environ, capture_output=True,
                          text=True, check=False)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        pytest.param({"HF_HUB_OFFLINE": "1"}, "found HF_HUB_OFFLINE=1", id="offline"),
        pytest.param({"HF_TOKEN": ""}, "found no HF_TOKEN", id="no token"),
        pytest.param(
            {"HF_TOKEN": "hf_anotherPLANTEDtoken012345"}, "Invalid user token", id="a wrong token"
        ),
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused", id="no network"),
        pytest.param("read", "found a token with the role read", id="a token that only reads"),
    ],
)
def test_a_hub_that_can_not_be_pushed_to_is_refused(
    tmp_path: Path, hub: Hub, change: dict[str, str] | str, refusal: str
) -> None:
    if isinstance(change, str):
        hub.role, change = change, {}
    done = require_hub({**hub.environ(), **change}, tmp_path)
    assert done.returncode == 1
    assert refusal in done.stderr
    assert "remove hub_model_id" in done.stderr
    assert "PLANTED" not in done.stderr


@pytest.mark.parametrize("role", ["write", "fineGrained", None])
def test_a_hub_that_can_be_pushed_to_is_accepted(tmp_path: Path, hub: Hub, role: str) -> None:
    hub.role = role
    done = require_hub(hub.environ(), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not hub.repositories, "nothing is created yet"


@pytest.mark.parametrize(
    ("name", "pushed"),
    [
        *((name, True) for name in (*MODEL, *ADAPTER, "model-00001-of-00002.safetensors",
                                    "model.safetensors.index.json", "chat_template.jinja",
                                    "modeling_own.py", "special_tokens_map.json")),
        *((name, False) for name in ("optimizer-1.safetensors", "optimizer.json", "scheduler.pt",
                                     "rng_state.json", "rng_state_3.json", "scaler.json",
                                     "trainer_state.json", "attnimg.json", "manifest.json",
                                     "training_args.bin", "README.md", "latest", "optimizer.bin")),
    ],
)  # fmt: skip
def test_states_are_no_files_of_the_model(name: str, pushed: bool) -> None:
    assert is_model_file(Path("out") / name, Path("out")) is pushed
    assert not is_model_file(Path("out/global_step4") / name, Path("out"))
