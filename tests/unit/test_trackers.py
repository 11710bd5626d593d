"""Test that trackers have the metrics of metrics.jsonl and no secrets, and what refuses them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from mlflow_server import MLflowServer
from tiny_run import config_for, lines, make_model, run, sentences, train
from tracked import mlflow_metrics, tensorboard_metrics, wandb_metrics, wandb_records

from attnimg.__main__ import run as attnimg
from attnimg.config import check_values
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.redact import redact
from attnimg.train.distributed import StopFlag, Stopped
from attnimg.train.trackers import PACKAGES, active_trackers, require_package, require_trackers

# Warnings that MLflow's client and W&B's handle raise about their own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ROOT = Path(__file__).parents[2]

SECRETS = {
    "WANDB_API_KEY": "a1b2c3d4" * 5,
    "HF_TOKEN": "hf_PLANTEDtoken0123456789",
    "MLFLOW_TRACKING_PASSWORD": "PLANTEDpassword",
    "COMET_API_KEY": "PLANTEDcometkey",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_model(folder / "model")
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in sentences(40))
    )
    return folder


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.fixture
def server() -> Iterator[MLflowServer]:
    with MLflowServer() as found:
        yield found


def logged(out: Path) -> dict[int, dict[str, float]]:
    """Return metrics.jsonl by steps."""
    found: dict[int, dict[str, float]] = {}
    for line in lines(out):
        step = int(line["step"])
        found.setdefault(step, {}).update({k: v for k, v in line.items() if k != "step"})
    return found


def require_same(tracked: dict[int, dict[str, float]], out: Path, *, exact: bool = True) -> None:
    """Compare a tracker with metrics.jsonl; TensorBoard stores float32."""
    expected = logged(out)
    assert expected
    for step, metrics in expected.items():
        for name, value in metrics.items():
            there = tracked[step][name]
            same = there == value or (not exact and math.isclose(there, value, rel_tol=1e-6))
            assert same, (step, name, there, value)
    assert set(tracked) == set(expected)


def stored(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_trackers_have_the_metrics_and_no_secret(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    out, store = tmp_path / "out", tmp_path / "mlruns"
    config = {
        "base_model": str(home / "model"), "learning_rate": 1e-3, "bf16": False,
        "datasets": [{"path": str(home / "data.jsonl"), "type": "completion"}],
        "sequence_len": 64, "max_steps": 4, "save_steps": 2, "val_set_size": 0.1, "eval_steps": 2,
        "attn_implementation": "sdpa", "output_dir": str(out),
        "wandb_project": "p", "wandb_entity": "team", "wandb_name": "first", "wandb_run_id": "id7",
        "wandb_mode": "offline", "wandb_watch": "all", "wandb_log_model": "checkpoint",
        "mlflow_experiment_name": "e", "mlflow_run_name": "second",
        "mlflow_tracking_uri": f"file://{store}", "hf_mlflow_log_artifacts": True,
        "use_tensorboard": True,
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    code = attnimg(["train", str(tmp_path / "c.yaml")])
    printed, errors = capfd.readouterr()
    assert code == 0, errors
    assert "warning" not in errors
    assert printed.splitlines() == json.loads((out / "receipt.json").read_text())["files"]
    (file,) = out.glob("wandb/offline-run-*-id7/run-id7.wandb")
    require_same(wandb_metrics(file), out)
    require_same(mlflow_metrics(store), out)
    require_same(tensorboard_metrics(out / "runs"), out, exact=False)

    (started,) = [record.run for record in wandb_records(file) if record.HasField("run")][:1]
    assert (started.project, started.entity, started.display_name, started.run_id) == (
        "p", "team", "first", "id7",
    )  # fmt: skip
    artifacts = [record.request.log_artifact.artifact for record in wandb_records(file)
                 if record.request.HasField("log_artifact")]  # fmt: skip
    artifacts += [record.artifact for record in wandb_records(file) if record.HasField("artifact")]
    aliases = [alias for artifact in artifacts for alias in artifact.aliases]
    assert [alias for alias in aliases if alias != "latest"] == [
        "checkpoint-2", "checkpoint-4", "final_model",
    ]  # fmt: skip
    for step in (2, 4):
        (copied,) = store.glob(f"*/*/artifacts/checkpoint-{step}/manifest.json")
        assert copied.read_bytes() == (out / f"checkpoint-{step}/manifest.json").read_bytes()
    (tag,) = store.glob("*/*/tags/mlflow.runName")
    assert tag.read_text() == "second"
    (meta,) = store.glob("*/*/meta.yaml")
    assert yaml.safe_load(meta.read_text())["status"] == 3, "FINISHED"

    everything = stored(tmp_path) + (printed + errors).encode()
    for name, value in SECRETS.items():
        assert value.encode() not in everything, name


def test_a_resumed_run_continues_the_trackers(home: Path, tmp_path: Path) -> None:
    keys = {"save_steps": 2, "wandb_project": "p", "wandb_mode": "offline", "wandb_run_id": "id8",
            "mlflow_experiment_name": "e", "mlflow_tracking_uri": f"file://{tmp_path}/mlruns",
            "use_tensorboard": True}  # fmt: skip
    run(home, tmp_path / "out", max_steps=2, **keys)
    (first,) = (tmp_path / "mlruns").glob("*/*/meta.yaml")
    os.environ["MLFLOW_RUN_ID"] = first.parent.name
    time.sleep(1.1)  # W&B names its folder by the second
    run(home, tmp_path / "out", max_steps=4, resume_from_checkpoint=True, **keys)
    files = sorted((tmp_path / "out/wandb").glob("offline-run-*-id8/run-id8.wandb"))
    steps = [sorted(wandb_metrics(file)) for file in files]
    assert steps == [[1, 2], [3, 4]]
    require_same(mlflow_metrics(tmp_path / "mlruns"), tmp_path / "out")
    require_same(tensorboard_metrics(tmp_path / "out/runs"), tmp_path / "out", exact=False)


@pytest.mark.parametrize(
    ("keys", "status"),
    [
        pytest.param({"learning_rate": 1e30}, "FAILED", id="a loss of NaN"),
        pytest.param({}, "KILLED", id="a signal"),
    ],
)
def test_a_tracker_knows_how_the_run_ended(
    home: Path, tmp_path: Path, server: MLflowServer, keys: dict[str, Any], status: str
) -> None:
    stop = StopFlag()
    stop.number = None if keys else 15
    config = config_for(home, output_dir=str(tmp_path / "out"), use_mlflow=True,
                        mlflow_tracking_uri=server.url, **keys)  # fmt: skip
    with pytest.raises(AttnimgError if keys else Stopped):
        train(config, stop=stop)
    assert server.status == status


def test_a_server_that_fails_in_training_does_not_end_it(
    home: Path, tmp_path: Path, server: MLflowServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.failing = True
    began = time.monotonic()
    result = run(home, tmp_path / "out", max_steps=4, use_mlflow=True, use_tensorboard=True,
                 mlflow_tracking_uri=server.url)  # fmt: skip
    assert time.monotonic() - began < 60
    assert result.steps == 4
    assert capsys.readouterr().err.count("warning: mlflow failed and is not used any more") == 1
    require_same(tensorboard_metrics(tmp_path / "out/runs"), tmp_path / "out", exact=False)


def test_a_tracker_does_not_change_what_is_learned(home: Path, tmp_path: Path) -> None:
    keys = {"max_steps": 2, "save_steps": 2, "adapter": "lora", "lora_dropout": 0.5}
    run(home, tmp_path / "plain", **keys)
    run(home, tmp_path / "out", wandb_project="p", wandb_mode="offline", wandb_watch="all",
        use_tensorboard=True, mlflow_experiment_name="e", **keys,
        mlflow_tracking_uri=f"file://{tmp_path}/mlruns")  # fmt: skip
    for name in ("adapter_model.safetensors", "checkpoint-2/rng_state.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_nothing_is_reported_by_default(home: Path, tmp_path: Path) -> None:
    os.environ["WANDB_API_KEY"] = SECRETS["WANDB_API_KEY"]
    run(home, tmp_path / "out", max_steps=1)
    assert not (tmp_path / "out/wandb").exists()
    assert not (tmp_path / "out/runs").exists()
    assert not list(tmp_path.rglob("*mlflow*"))


def valid(**keys: Any) -> Config:
    return Config.model_validate(keys)


@pytest.mark.parametrize(
    ("keys", "environ", "names"),
    [
        ({}, {}, ()),
        ({"use_wandb": False, "use_mlflow": False, "use_tensorboard": False}, {}, ()),
        ({"wandb_entity": "e", "wandb_name": "n"}, {}, ()),
        ({"wandb_project": ""}, {}, ()),
        ({"wandb_project": "p"}, {}, ("wandb",)),
        ({"use_wandb": True}, {}, ("wandb",)),
        ({"wandb_project": "p", "wandb_mode": "disabled"}, {}, ()),
        ({"wandb_project": "p"}, {"WANDB_MODE": "disabled"}, ()),
        ({"wandb_project": "p", "wandb_mode": "offline"}, {"WANDB_MODE": "disabled"}, ("wandb",)),
        ({"mlflow_experiment_name": "e"}, {}, ("mlflow",)),
        ({"use_mlflow": True, "use_tensorboard": True}, {}, ("mlflow", "tensorboard")),
        ({"mlflow_tracking_uri": "http://x"}, {}, ()),
        ({"report_to": "wandb"}, {}, ("wandb",)),
        (
            {"report_to": ["tensorboard", "mlflow"], "use_mlflow": True},
            {},
            ("mlflow", "tensorboard"),
        ),
        ({"report_to": "wandb", "wandb_mode": "disabled"}, {}, ()),
        ({"report_to": "none"}, {}, ()),
        ({"report_to": []}, {}, ()),
    ],
)
def test_which_keys_turn_a_tracker_on(
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    environ: dict[str, str],
    names: tuple[str, ...],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert active_trackers(valid(**keys)) == names


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
@pytest.mark.parametrize(
    ("version", "why"),
    [
        pytest.param(None, "found no {}", id="missing"),
        pytest.param("0.1", "found {} 0.1", id="too old"),
        pytest.param("99", "found {} 99, which is broken", id="broken"),
    ],
)
def test_a_package_that_can_not_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, why: str
) -> None:
    def installed(distribution: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(distribution)
        return version

    monkeypatch.setattr("attnimg.train.trackers.version", installed)
    if version == "99":  # what is left of an uninstalled package: an empty folder
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    with pytest.raises(AttnimgError) as caught:
        require_package(name)
    assert caught.value.code == "not-installed"
    assert caught.value.why.startswith(why.format(name))
    assert f"pip install '{PACKAGES[name].requirement}'" in caught.value.do


def test_the_example_installs_what_is_needed() -> None:
    text = (ROOT / "examples/trackers/Dockerfile").read_text()
    assert re.findall(r"'(.+?)'", text) == [package.requirement for package in PACKAGES.values()]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_an_installed_package_is_accepted(name: str) -> None:
    require_package(name)


@pytest.mark.parametrize(
    ("keys", "environ", "why"),
    [
        pytest.param({"use_mlflow": True, "mlflow_tracking_uri": "http://127.0.0.1:9"}, {},
                     "Connection refused", id="no server"),
        pytest.param({"use_mlflow": True}, {"MLFLOW_TRACKING_URI": "http://me:PLANTED@127.0.0.1:9"},
                     "Connection refused", id="no server, with a password in its URI"),
        pytest.param({"use_mlflow": True, "mlflow_tracking_uri": "file:///proc/none"},
                     {"MLFLOW_ALLOW_FILE_STORE": "false"}, "maintenance mode",
                     id="a folder, without MLflow's permission"),
        pytest.param({"use_mlflow": True, "mlflow_tracking_uri": "ftp://x"}, {},
                     "unsupported URI", id="no store"),
    ],
)  # fmt: skip
def test_a_tracker_that_can_not_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], environ: dict[str, str], why: str
) -> None:
    import mlflow

    mlflow.set_tracking_uri(None)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(AttnimgError) as caught:
        require_trackers(valid(**keys))
    assert time.monotonic() - began < 30
    assert caught.value.code == "tracker-unavailable"
    assert why in caught.value.why
    assert ("MLFLOW_ALLOW_FILE_STORE=true" in caught.value.do) is ("file:" in str(keys))
    assert "PLANTED" not in str(caught.value)


REQUIRE = """
import sys
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.trackers import require_trackers
try:
    require_trackers(Config(wandb_project="p", wandb_mode=sys.argv[1]))
except AttnimgError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("mode", "environ", "refusal"),
    [
        pytest.param("online", {}, "found no WANDB_API_KEY", id="no login"),
        pytest.param("online", {"WANDB_API_KEY": "PLANTEDshort"}, "API key must have 40+",
                     id="a wrong key"),
        pytest.param("online", {"WANDB_API_KEY": SECRETS["WANDB_API_KEY"],
                                "WANDB_BASE_URL": "http://127.0.0.1:9"},
                     "Failed to authenticate with http://127.0.0.1:9", id="no network"),
        pytest.param("offline", {}, None, id="offline"),
    ],
)  # fmt: skip
def test_wandb_is_refused_without_login_and_network(
    mode: str, environ: dict[str, str], refusal: str | None
) -> None:
    began = time.monotonic()
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    done = subprocess.run([sys.executable, "-c", REQUIRE, mode], env=environ, capture_output=True,
                          text=True, check=False, stdin=subprocess.DEVNULL)  # fmt: skip
    assert time.monotonic() - began < 60
    if refusal is None:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return
    assert refusal in done.stderr
    assert "set wandb_mode: offline" in done.stderr
    for secret in ("PLANTED", SECRETS["WANDB_API_KEY"]):
        assert secret not in done.stdout + done.stderr


@pytest.mark.parametrize("password", ["PLANTEDright", "PLANTEDwrong", None])
def test_mlflow_needs_the_password_of_its_server(
    monkeypatch: pytest.MonkeyPatch, server: MLflowServer, password: str | None
) -> None:
    server.password = "PLANTEDright"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    if password is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    config = valid(use_mlflow=True, mlflow_tracking_uri=server.url)
    if password == server.password:
        require_trackers(config)
        return
    with pytest.raises(AttnimgError) as caught:
        require_trackers(config)
    assert "who are you?" in caught.value.why
    assert "PLANTED" not in str(caught.value)


@pytest.mark.parametrize("uri", ["sqlite:///none.db", "file:///tmp", "mlruns", "http://host:5000/x",
                                 "databricks", "https://host/a@b"])  # fmt: skip
def test_a_uri_without_password_is_accepted(uri: str) -> None:
    assert not errors(mlflow_tracking_uri=uri)


def errors(**keys: Any) -> list[tuple[str, str | None, str]]:
    checked = check_values(
        {"base_model": "m", "learning_rate": 1e-3, "datasets": [{"path": "d"}], **keys}, file="x"
    )
    return [(e.code, e.key, f"{e.what} {e.why} {e.do}") for e in checked.errors]


SECRET_KEYS = [
    ({"comet_api_key": "PLANTED"}, "unsupported-key", "comet_api_key", "remove comet_api_key"),
    ({"wandb_api_key": "PLANTED"}, "unknown-key", "wandb_api_key", "variable WANDB_API_KEY"),
    ({"swanlab_api_key": "PLANTED"}, "unsupported-key", "swanlab_api_key", "remove"),
    ({"swanlab_lark_secret": "PLANTED"}, "unsupported-key", "swanlab_lark_secret", "remove"),
    ({"hub_token": "PLANTED"}, "unknown-key", "hub_token", "variable HF_TOKEN"),
    ({"push_to_hub_token": "PLANTED"}, "unknown-key", "push_to_hub_token", "variable HF_TOKEN"),
    ({"hf_use_auth_token": "PLANTED"}, "unsupported-key", "hf_use_auth_token", "variable HF_TOKEN"),
    ({"hub_model_id": "https://me:PLANTED@huggingface.co/org/name"}, "bad-value", "hub_model_id",
     "without a user, a password or a token"),
    *(({"mlflow_tracking_uri": uri}, "bad-value", "mlflow_tracking_uri",
       "variable MLFLOW_TRACKING_URI")
      for uri in ("https://me:PLANTED@host/", "postgresql://me:PLANTED@host/db",
                  "https://PLANTED@host/", "http://me:PLANTED/x@h", "http://me:PLANTED#x@h",
                  "http://h/?token=PLANTED")),
    *(({key: "https://me:PLANTED@host/x"}, "bad-value", key, "without a user")
      for key in ("base_model", "tokenizer_config", "output_dir", "dataset_prepared_path")),
    *(({"datasets": [{"path": path}]}, "bad-value", "datasets[0].path", "without a user")
      for path in ("https://me:PLANTED@host/x.jsonl", "https://host/x.jsonl?sig=PLANTED",
                   "me:PLANTED@host")),
    *(({key: {"a": {name: "PLANTED"}}}, "bad-value", f"{key}.a.{name}", f"remove {key}.a.{name}")
      for key in ("chat_template_kwargs", "deepspeed", "fsdp_config", "lr_scheduler_kwargs")
      for name in ("api_key", "token", "password")),
    *(({key: value}, "unsupported-key", path, "remove")
      for key, value, path in (("env", {"WANDB_API_KEY": "PLANTED"}, "env.WANDB_API_KEY"),
                               ("secrets", ["PLANTED"], "secrets[0]"),
                               ("vllm", {"api_key": "PLANTED"}, "vllm.api_key"),
                               ("otel_metrics_host", "me:PLANTED@host", "otel_metrics_host"))),
    ({"plugins": ["https://me:PLANTED@host"]}, "unknown-key", "plugins[0]", "remove"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "code", "path", "do"), SECRET_KEYS, ids=str)
def test_a_secret_in_a_config_is_refused_and_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], code: str, path: str,
    do: str,
) -> None:  # fmt: skip
    found = {key: (c, text) for c, key, text in errors(**keys)}
    assert found[path][0] == code
    assert do in found[path][1]
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"base_model": "m", "learning_rate": 1, "datasets": [{"path": "d"}], **keys})
    )
    for command in (["check"], ["check", "--json"], ["train"]):
        assert attnimg([*command, str(tmp_path / "c.yaml")]) == 2
    assert "PLANTED" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("setting", [
    "datasets.9.token=PLANTED", "seed.token=PLANTED", "hub_token=[PLANTED", "hub_token=PLANTED",
])  # fmt: skip
def test_a_secret_in_an_argument_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    (tmp_path / "c.yaml").write_text("{base_model: m, learning_rate: 1, datasets: [{path: d}]}")
    assert attnimg(["train", str(tmp_path / "c.yaml"), setting]) == 2
    printed = "".join(capsys.readouterr())
    assert setting.partition("=")[0] in printed
    assert "PLANTED" not in printed


@pytest.mark.parametrize("keys", [
    {"special_tokens": {"eos_token": "<|end|>", "pad_token": "<pad>"}, "eot_tokens": ["<|end|>"]},
    {"datasets": [{"path": "https://host:8080/a@b/x.jsonl?download=true"}]},
    {"attn_implementation": "kernels-community/flash-attn2@v1:flash_attn_func"},
    {"default_system_message": "Mail me@host, or see https://host/@me and http://host:80/a@b."},
    {"hub_model_id": "me/token-classifier", "hf_use_auth_token": True},
], ids=str)  # fmt: skip
def test_values_that_are_no_secrets_are_accepted(keys: dict[str, Any]) -> None:
    assert not [text for *_, text in errors(**keys) if "secret" in text]


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("hub_model_id", ["me/model", "model", "a.b/c_d-1", ""],
         ["<your-hub-model-id>", "a/b/c", "/x", "a--b", "x.git", "./x"]),
        ("hub_strategy", ["end", "every_save", "checkpoint", "all_checkpoints", ""], ["always"]),
        ("wandb_mode", ["online", "offline", "disabled", ""], ["off"]),
        ("wandb_watch", ["gradients", "all", "parameters", "false", "", False], ["weights", True]),
        ("wandb_log_model", ["checkpoint", "end", "false", "", False], ["true", True]),
        ("wandb_project", ["p", ""], [3, ["p"]]),
        ("use_mlflow", [True, False, 1], ["yes, please"]),
    ],
)  # fmt: skip
def test_values_of_the_keys(key: str, right: list[Any], wrong: list[Any]) -> None:
    for value in right:
        assert not errors(**{key: value}), value
    for value in wrong:
        assert [code for code, *_ in errors(**{key: value})] == ["bad-value"], value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/x and ftp://u@h", "https://***@host/x and ftp://***@h"),
        ("the key is PLANTEDcometkey.", "the key is ***."),
        ("hf_abcdefghijklmnopqrst", "***"),
        (
            "http://me:a/b#c@host/x and https://h/x?sig=abc&n=1",
            "http://***@host/x and https://h/x?sig=***&n=1",
        ),
        ("nonnumeric port: 'PLANTEDuri'", "nonnumeric port: '***'"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("https://host/a@b, me@host and HF_HOME=/x", "https://host/a@b, me@host and HF_HOME=/x"),
        ("kernels-community/flash-attn2@v1", "kernels-community/flash-attn2@v1"),
        ("1", "1"),
    ],
)
def test_secrets_are_replaced(text: str, shown: str) -> None:
    environ = {"COMET_API_KEY": "PLANTEDcometkey", "MY_TOKEN": "1", "HF_HOME": "/x",
               "MLFLOW_TRACKING_URI": "http://me:PLANTEDuri/b@127.0.0.1:9/"}  # fmt: skip
    assert redact(text, environ) == shown
