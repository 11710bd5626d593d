"""check and explain as a user meets them: output, exit codes, no torch, no network."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnimg.__main__ import COMMANDS
from attnimg.__main__ import run as attnimg
from attnimg.backends import all_backends
from attnimg.selection import gpus_and_images
from attnimg.selection.gpus_and_images import image_catalogue

GOOD = "base_model: org/model\nlearning_rate: 1e-4\ndatasets: [{path: d.jsonl, type: alpaca}]\n"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = attnimg(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_check_prints_one_object_a_file_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    files = [write("b.yaml", GOOD), write("a.yaml", "attn_implementation: fa2\n"), "none.yaml"]
    code, out, err = run(capsys, "check", *files, "--json", "--on", "h200")
    good, bad, missing = objects(out)
    assert code == 2
    assert err == ""
    assert [line["file"] for line in (good, bad, missing)] == files
    assert set(good) == {"file", "ok", "on", "attn", "config", "errors", "warnings"}
    assert good["ok"] is True
    assert good["on"] == "sm_90"
    assert good["attn"] == {
        "requested": None,
        "attn_implementation": None,
        "attn_supports_packing": False,
        "attn_uses_flash_lib": False,
        "attn_needs_dtype_cast": False,
    }
    assert good["config"]["learning_rate"] == 1e-4
    assert set(bad["errors"][0]) == {"code", "key", "what", "why", "do"}
    assert bad["attn"]["requested"] == "fa2"
    assert missing["attn"] is missing["config"] is None
    assert missing["errors"][0]["code"] == "file-missing"


def test_check_passes_with_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    file = write("x.yaml", GOOD + "attn_implementation: sdpa\nsample_packing: true\n")
    code, out, _ = run(capsys, "check", file, "--json")
    (line,) = objects(out)
    assert code == 0
    assert line["ok"] is True
    assert [set(w) for w in line["warnings"]] == [{"code", "key", "what", "do"}]


def test_check_tells_people_what_why_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", write("x.yaml", "sample_packin: true\n" + GOOD))
    assert code == 2
    assert "x.yaml" in out
    for part in ("unknown-key", "why:", "do:", "did you mean sample_packing?"):
        assert part in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("check",),
        ("check", "x.yaml", "--on", "h1000"),
        ("check", "x.yaml", "--on", ""),
        ("check", "x.yaml", "--torch", ""),
        ("explain", "x.yaml", "--image", ""),
        ("check", "x.yaml", "--torch", "new"),
        ("check", "x.yaml", "--nonsense"),
        ("explain", "x.yaml", "--on", "H100"),
        ("nonsense",),
        ("train",),
        ("train", "x.yaml", "learning_rate"),
        ("train", "none.yaml"),
    ],
)
def test_wrong_arguments_exit_2_without_a_traceback(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    write("x.yaml", GOOD)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err
    assert "Traceback" not in err


@pytest.mark.filterwarnings("ignore:flash_attention is deprecated:DeprecationWarning")
def test_explain_answers_for_a_gpu_that_is_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    write("model/config.json", json.dumps(LLAMA))
    file = write("x.yaml", GOOD.replace("org/model", "model") + "flash_attention: true\n")
    code, out, _ = run(capsys, "explain", file, "--on", "h100", "--json")
    (line,) = objects(out)
    assert code == 0
    assert line["on"] == "sm_90"
    assert line["image"] == "hopper"
    assert line["model"]["type"] == "llama"
    assert line["layers"] == [
        {"count": 32, "heads": 32, "kv_heads": 8, "head_dim_qk": 128, "head_dim_v": 128,
         "window": None, "softcap": None, "sinks": False}
    ]  # fmt: skip
    assert {c["backend"] for c in line["candidates"]} == {b.name for b in all_backends()}
    assert all(c["fits"] or c["reasons"] for c in line["candidates"])
    assert set(line["chosen"]) == {"backend", "kernel", "because"}
    assert line["chosen"]["backend"] == "flash_attention_4"


@pytest.mark.parametrize("target", ["model", "model/config.json"])
def test_explain_takes_a_model(capsys: pytest.CaptureFixture[str], target: str) -> None:
    Path("model").mkdir()
    write("model/config.json", json.dumps(LLAMA))
    code, out, _ = run(capsys, "explain", target, "--on", "t4", "--json")
    (line,) = objects(out)
    assert (code, line["ok"], line["chosen"]["backend"]) == (0, True, "sdpa")


@pytest.mark.parametrize(
    ("fields", "errors"),
    [
        ({"model_type": "t5"}, ["not-causal-lm"]),
        ({"model_type": "bert"}, ["not-causal-lm"]),
        ({"model_type": "bert", "is_decoder": True}, []),
        ({"model_type": "llama"}, []),
    ],
)
def test_explain_says_what_train_refuses_of_a_config(
    capsys: pytest.CaptureFixture[str], fields: dict[str, Any], errors: list[str]
) -> None:
    Path("model").mkdir()
    write("model/config.json", json.dumps(LLAMA | fields))
    file = write("x.yaml", GOOD.replace("org/model", "./model"))
    code, out, _ = run(capsys, "explain", file, "--on", "h100", "--json")
    (line,) = objects(out)
    assert (code, [error["code"] for error in line["errors"]]) == (0, errors)


def test_explain_answers_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    file = write("x.yaml", GOOD + "attn_implementation: flash_attention_3\n")
    code, out, _ = run(capsys, "explain", file, "--on", "a100", "--json")
    (line,) = objects(out)
    assert code == 0
    assert line["chosen"] is None
    assert [e["code"] for e in line["errors"]] == ["arch-mismatch"]


def test_explain_says_what_it_could_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", write("x.yaml", GOOD), "--json", "--on", "h100")
    (line,) = objects(out)
    assert code == 0
    assert line["model"] is None
    assert line["layers"] == []
    assert [w["code"] for w in line["warnings"]] == ["model-not-at-hand"]


def test_explain_still_answers_on_a_config_with_unsupported_keys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write("x.yaml", GOOD + "plugins: [axolotl.integrations.kd.KDPlugin]\n")
    code, out, _ = run(capsys, "explain", file, "--on", "a100", "--json")
    (line,) = objects(out)
    assert code == 2
    assert [e["code"] for e in line["errors"]] == ["unsupported-key"]
    assert line["chosen"]["backend"] == "flash_attention_2"


def test_explain_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", write("x.yaml", GOOD), "--on", "h100")
    assert code == 0
    assert [word for word in ("asked", "got", "because") if word not in out] == []
    assert len(out.splitlines()) <= 50


def test_the_quick_commands_import_no_torch() -> None:
    write("x.yaml", GOOD)
    code = (
        "import sys; from attnimg.__main__ import run;"
        "run(['check', 'x.yaml']); run(['explain', 'x.yaml']);"
        "heavy = {'torch', 'transformers', 'datasets', 'trl', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_debug_shows_the_traceback_and_nothing_else_does() -> None:
    for arguments, shown in (([], False), (["--debug"], True)):
        done = subprocess.run(
            [sys.executable, "-m", "attnimg", "check", "--on", "h1000", "x.yaml", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert ("Traceback" in done.stderr) is shown
        assert "attnimg:" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "on", "image", "notes"),
    [
        (("--on", "t4"), "sm_75", "turing", []),
        (("--on", "v100"), "sm_70", None, ["no-image"]),
        (("--on", "gb200"), "sm_100", "blackwell", []),
        (("--image", "ada"), "sm_80", "ampere", []),
        (("--image", "hopper", "--on", "t4"), "sm_75", "hopper", ["wrong-image"]),
        ((), "cpu", None, []),
    ],
)
def test_explain_assumes_the_packages_of_an_image(
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    on: str,
    image: str | None,
    notes: list[str],
) -> None:
    file = write("x.yaml", GOOD)
    code, out, _ = run(capsys, "explain", file, "--json", *arguments)
    (line,) = objects(out)
    found = [w["code"] for w in line["warnings"] if w["code"] != "model-not-at-hand"]
    assert (code, line["on"], line["image"], found) == (0, on, image, notes)


def test_an_unknown_image_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "explain", write("x.yaml", GOOD), "--image", "hoper")
    assert code == 2
    assert "hopper" in err


@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"model_type": "llama", "num_attention_heads": -1}']
)
def test_explain_still_answers_on_a_broken_model(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    Path("model").mkdir()
    write("model/config.json", text)
    code, out, _ = run(capsys, "explain", "model", "--on", "h100", "--json")
    (line,) = objects(out)
    assert code == 2
    assert [e["code"] for e in line["errors"]] == ["bad-model"]
    assert line["layers"] == []
    assert len(line["candidates"]) == len(all_backends())


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"model_type": "llama", "num_attention_heads": -1}', "x.json: num_attention_heads"),
        (
            '{"model_type": "gemma3", "text_config": {"num_attention_heads": "4"}}',
            "x.json: text_config: num_attention_heads",
        ),
        ('{"model_type": "llama", "attention_dropout": 2}', "x.json: attention_dropout"),
        ('{"model_type": 5}', "x.json: model_type"),
    ],
)
def test_explain_names_the_file_that_it_was_given(
    capsys: pytest.CaptureFixture[str], text: str, what: str
) -> None:
    code, out, _ = run(capsys, "explain", write("x.json", text), "--on", "h100", "--json")
    (error,) = objects(out)[0]["errors"]
    assert (code, error["what"]) == (2, f"{what} cannot be used")
    assert error["do"].endswith(" in the model's x.json")


def test_explain_takes_a_hub_name_that_is_not_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", "org/model", "--on", "h100", "--json")
    (line,) = objects(out)
    assert code == 0
    assert [w["code"] for w in line["warnings"]] == ["model-not-at-hand"]
    assert "learning_rate" not in line["config"]


def test_explain_says_when_a_model_has_no_attention(capsys: pytest.CaptureFixture[str]) -> None:
    write("config.json", '{"model_type": "mamba2", "num_hidden_layers": 2}')
    code, out, _ = run(capsys, "explain", "config.json", "--on", "h100", "--json")
    (line,) = objects(out)
    assert code == 0
    assert [w["code"] for w in line["warnings"]] == ["no-attention-layers", "slow-layers"]


def test_a_config_in_json_is_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"base_model": "m", "learning_rate": 1e-4, "datasets": [{"path": "d"}]}
    file = write("run.json", json.dumps(values))
    _, out, _ = run(capsys, "explain", file, "--on", "h100", "--json")
    (line,) = objects(out)
    assert line["config"]["base_model"] == "m"


@pytest.mark.parametrize(
    ("gpu", "arch", "image", "platform"),
    [
        pytest.param("dgx-spark", "sm_121", "blackwell", "linux/arm64", id="DGX Spark"),
        pytest.param("gh200", "sm_90", "hopper", "linux/arm64", id="GH200"),
        pytest.param("gb200", "sm_100", "blackwell", "linux/arm64", id="GB200"),
        pytest.param("gb300", "sm_103", "blackwell", "linux/arm64", id="GB300"),
        pytest.param("sm_121", "sm_121", "blackwell", "linux/arm64", id="all with it have arm64"),
        pytest.param("h100", "sm_90", "hopper", "linux/amd64", id="H100"),
        pytest.param("sm_90", "sm_90", "hopper", "linux/amd64", id="an architecture of both kinds"),
        pytest.param("a100", "sm_80", "ampere", "linux/amd64", id="an image of one platform"),
    ],
)
def test_explain_names_the_image_and_its_platform(
    capsys: pytest.CaptureFixture[str], gpu: str, arch: str, image: str, platform: str
) -> None:
    file = write("x.yaml", GOOD)
    status, out, _ = run(capsys, "explain", file, "--on", gpu, "--json")
    (said,) = objects(out)
    found = (said["on"], said["image"], said["platform"])
    assert (status, *found) == (0, arch, image, platform)
    assert not [w for w in said["warnings"] if w["code"] in ("no-image", "wrong-image")]
    _, out, _ = run(capsys, "explain", file, "--on", gpu)
    text = " ".join(out.split())
    assert f", in attnimg:{image}" in text
    assert ("its linux/arm64 build" in text) == (platform == "linux/arm64")


def test_the_arm64_build_lacks_the_kernels_that_it_has_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write("x.yaml", GOOD)
    fits = {}
    for gpu in ("h100", "gh200"):
        _, out, _ = run(capsys, "explain", file, "--on", gpu, "--json")
        found = objects(out)[0]["candidates"]
        fits[gpu] = {candidate["backend"] for candidate in found if candidate["fits"]}
        reasons = {c["backend"]: [r["code"] for r in c["reasons"]] for c in found}
        assert ("fp8-torchao" in reasons["fp8"]) == (gpu == "gh200")
    assert fits["h100"] >= fits["gh200"]
    assert "flash_attention_3" in fits["gh200"]


@pytest.mark.parametrize(
    "gpu", [pytest.param("jetson-thor", id="Thor"), pytest.param("v100", id="V100")]
)
def test_explain_says_where_no_image_starts(capsys: pytest.CaptureFixture[str], gpu: str) -> None:
    file = write("x.yaml", GOOD)
    status, out, _ = run(capsys, "explain", file, "--on", gpu, "--json")
    (said,) = objects(out)
    assert (status, said["image"], said["platform"]) == (0, None, None)
    (note,) = (w for w in said["warnings"] if w["code"] == "no-image")
    assert f"none has kernels for {said['on']}" in note["what"]
    assert any(candidate["fits"] for candidate in said["candidates"]), "it is judged all the same"


def test_explain_refuses_an_image_that_does_not_start_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write("x.yaml", GOOD)
    _, out, _ = run(capsys, "explain", file, "--on", "gb200", "--image", "ampere", "--json")
    (note,) = (w for w in objects(out)[0]["warnings"] if w["code"] == "wrong-image")
    assert "no kernels for sm_100" in note["what"]
    assert note["do"] == "use the image blackwell"


def test_explain_refuses_an_image_without_the_platform_of_the_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = dict(image_catalogue())
    images["hopper"] = replace(images["hopper"], platforms=("linux/amd64",))
    monkeypatch.setattr(gpus_and_images, "image_catalogue", lambda: images)
    file = write("x.yaml", GOOD)
    _, out, _ = run(capsys, "explain", file, "--on", "gh200", "--image", "hopper", "--json")
    (note,) = (w for w in objects(out)[0]["warnings"] if w["code"] == "wrong-image")
    assert "is for linux/amd64, and NVIDIA GH200 96GB has an arm64 CPU" in note["what"]
    assert note["do"] == "leave --image out: no image runs on that GPU"
    _, out, _ = run(capsys, "explain", file, "--on", "gh200", "--json")
    (note,) = (w for w in objects(out)[0]["warnings"] if w["code"] == "no-image")
    assert "its CPU is arm64, and hopper is for linux/amd64" in note["what"]


def test_check_imports_nothing_that_it_can_do_without() -> None:
    heavy = [
        "rich", "typer", "torch", "transformers", "attnimg.selection", "attnimg.train",
        "attnimg.run_facts",
    ]  # fmt: skip
    code = (
        "import sys; from attnimg.__main__ import run; code = run(['check', 'x.yaml']); "
        f"print(code, [name for name in {heavy} if name in sys.modules])"
    )
    write("x.yaml", GOOD + "attn_implementation: sdpa\nsample_packing: true\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_check_does_not_load_the_plugins_of_pydantic(tmp_path: Path) -> None:
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pydantic]\nplugin = plugin:PLUGIN\n")
    (tmp_path / "plugin.py").write_text("print('the plugin is loaded')\nraise SystemExit\n")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "attnimg", "check", write("x.yaml", GOOD)]
    # "" is what a user sets who wants the plugins.
    for more, says in (
        ({}, "ok  x.yaml  auto  "),
        ({"PYDANTIC_DISABLE_PLUGINS": ""}, "the plugin is loaded"),
    ):
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True)
        assert done.stdout.splitlines()[0] == says, done.stderr


def test_options_may_stand_between_files(capsys: pytest.CaptureFixture[str]) -> None:
    files = [write("b.yaml", GOOD), write("a.yaml", GOOD)]
    code, out, _ = run(capsys, "check", files[0], "--on", "h100", files[1], "--json")
    assert code == 0
    assert [line["file"] for line in objects(out)] == files


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    for name in COMMANDS:
        assert f"  {name} " in out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert out.startswith(f"usage: attnimg {name} ")


def test_a_wrong_argument_is_printed_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = run(capsys, "che\x1b[31mck")
    assert code == 2
    assert "\x1b" not in err


def test_a_terminal_gets_the_same_words_as_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for terminal in (True, False):
        out, err = io.StringIO(), io.StringIO()
        for name, stream in (("stdout", out), ("stderr", err)):
            monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
            monkeypatch.setattr(sys, name, stream)
        file = write("x[bold].yaml", GOOD + "sample_packin: '[red]'\neval_steps: 3\n")
        assert attnimg(["check", file]) == 2
        texts.append(re.sub("\x1b\\[[0-9;]*m", "", out.getvalue() + err.getvalue()))
    assert texts[0] == texts[1]
    assert "x[bold].yaml" in texts[0]


def test_train_refuses_a_base_model_whose_path_does_not_exist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("model").mkdir()
    file = write("x.yaml", GOOD.replace("org/model", "./modle"))
    code, out, err = run(capsys, "train", file)
    assert (code, out) == (2, "")
    assert "there is no folder ./modle" in err
    assert "set base_model: ./model\n" in err


def test_explain_takes_the_settings_that_train_takes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    write("model/config.json", json.dumps(LLAMA))
    file = write("x.yaml", GOOD.replace("org/model", "./model"))
    for target, settings in (
        (file, ["sample_packing=true", "attn_implementation=sdpa"]),
        ("model", ["attn_implementation=sdpa", "sequence_len=4096", "sample_packing=true"]),
    ):
        code, out, _ = run(capsys, "explain", target, *settings, "--on", "h100", "--json")
        (line,) = objects(out)
        assert (code, line["chosen"]["backend"]) == (0, "sdpa"), target
        assert "packing-by-mask" in [warning["code"] for warning in line["warnings"]], target
        assert line["quadratic_memory"] is not None, target
        code, out, err = run(capsys, "explain", target, "sample_packing", "--on", "h100")
        assert code == 2
        assert "'sample_packing' is not key=value" in err


def test_check_sets_keys_in_every_config(capsys: pytest.CaptureFixture[str]) -> None:
    files = [write("x.yaml", GOOD), write("y.yaml", GOOD), write("seed=3.yaml", GOOD)]
    code, out, _ = run(capsys, "check", "seed=7", *files, "datasets.0.path=more.jsonl", "--json")
    assert code == 0
    assert [line["file"] for line in objects(out)] == files
    for line in objects(out):
        assert (line["config"]["seed"], line["config"]["datasets"][0]["path"]) == (7, "more.jsonl")
    code, _, err = run(capsys, "check", *files, "sead=7", "datasets.5.path=more.jsonl")
    assert (code, err.count("the key 'datasets.5.path' does not fit the config")) == (2, 3)


@pytest.mark.parametrize("command", ["check", "explain", "verify", "train", "preprocess"])
def test_settings_are_checked_beside_the_config(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    file = write("x.yaml", GOOD)
    code, _, err = run(capsys, command, file, "sead=7")
    assert code == 2
    assert "sead is not a known key" in err


@pytest.mark.parametrize(
    "words",
    [(command, "seed=7") for command in ("check", "explain", "verify", "train", "preprocess")]
    + [(command, "seed=7", "x.yaml") for command in ("explain", "verify", "train", "preprocess")],
)
def test_settings_without_a_config_before_them_are_refused(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    write("x.yaml", GOOD)
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "seed=... is a setting, not a config" in err
    assert "write the config's path before seed=..." in err


def test_explain_prints_no_trailing_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "explain", write("x.yaml", GOOD), "--on", "h100")
    assert [line for line in out.splitlines() if line != line.rstrip()] == []
    assert len(out.splitlines()) > 10


def test_train_refuses_the_same_as_check(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "lr_scheduler: linear\ncosine_min_lr_ratio: 0.1\neval_steps: 5\nwarmup_steps: 0\n"
    file = write("x.yaml", f"{GOOD}{wrong}warmup_ratio: 0.1\n")
    code, _, checked = run(capsys, "check", file)
    assert code == 2
    assert checked.count("error bad-value:") == 3
    code, out, trained = run(capsys, "train", file)
    assert (code, out) == (2, "")
    assert checked in trained


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ("cpu", "flash_attention_3 needs a GPU of sm_90 (Hopper); found none (CPU)"),
        ("a100", "found sm_80, flash_attention_3 needs sm_90 (Hopper)"),
    ],
)
def test_a_backend_of_another_gpu_is_refused_with_what_was_found(
    capsys: pytest.CaptureFixture[str], gpu: str, words: str
) -> None:
    file = write("x.yaml", GOOD + "attn_implementation: flash_attention_3\n")
    code, _, err = run(capsys, "check", file, "--on", gpu)
    assert code == 2
    assert words in err
    _, out, _ = run(capsys, "explain", file, "--on", gpu, "--json")
    (line,) = objects(out)
    (judged,) = [c for c in line["candidates"] if c["backend"] == "flash_attention_3"]
    assert judged["reasons"][0]["text"] == words.replace("flash_attention_3 ", "")


@pytest.mark.parametrize(
    ("variable", "added", "codes"),
    [
        ("sdpa", "", []),
        ("auto", "", []),
        ("fp8", "", ["packing-not-isolated"]),
        ("fp8", "attn_implementation: sdpa\n", []),
        ("fp8", "attn_implementation: auto\n", ["packing-not-isolated"]),
        ("fa2", "", ["bad-environment"]),
        ("s2", "attn_backends: {full: sdpa}\n", []),
    ],
)
def test_check_refuses_what_train_refuses_of_the_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    variable: str, added: str, codes: list[str],
) -> None:  # fmt: skip
    file = write("x.yaml", f"{GOOD}sample_packing: true\n{added}")
    monkeypatch.setenv("ATTNIMG_BACKEND", variable)
    code, out, _ = run(capsys, "check", file, "--json")
    (line,) = objects(out)
    assert (code, [error["code"] for error in line["errors"]]) == (2 if codes else 0, codes)
    replaced = variable in ("sdpa", "fp8") and "sdpa" not in added
    assert replaced is any(w["code"] == "backend-of-environment" for w in line["warnings"])
    assert line["attn"]["attn_implementation"] in (None, "auto", "sdpa")
