"""Run `attnimg convert`: what goes to stdout, to stderr and to the file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_cli import run, write

from attnimg.config.read import parse_yaml

OLD = """\
model_name_or_path: org/model
dataset_name: chat.jsonl
learning_rate: 1e-4
use_peft: true
lora_target_modules: [q_proj, v_proj]
ddp_backend: gloo
"""


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("old.yaml", OLD)
    write("chat.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n')


def test_the_config_goes_to_stdout_and_the_report_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(capsys, "convert", "old.yaml")
    assert code == 0
    found = parse_yaml(out, name="out")
    assert (found["learning_rate"], found["adapter"]) == (1e-4, "lora")
    assert found["datasets"] == [{"path": "chat.jsonl", "type": "chat_template"}]
    for key in parse_yaml(OLD, name="old"):
        assert f" {key} " in err
    assert "hint-not-used" in err
    assert "TRL's defaults: " in err
    write("new.yaml", out)
    assert run(capsys, "check", "new.yaml")[0] == 0


def test_a_file_is_written_once_and_never_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "convert", "old.yaml", "--output", "new.yaml")
    assert (code, out) == (0, "")
    before = Path("new.yaml").read_text()
    assert sorted(path.name for path in Path().iterdir()) == ["chat.jsonl", "new.yaml", "old.yaml"]
    code, _, err = run(capsys, "convert", "old.yaml", "--output", "new.yaml")
    assert code == 2
    assert "exists already" in err
    assert Path("new.yaml").read_text() == before
    code, _, err = run(capsys, "convert", "old.yaml", "--output", "no/such/new.yaml")
    assert code == 2
    assert "can't be written" in err


def test_a_refused_key_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    write("old.yaml", f"{OLD}label_smoothing_factor: 0.1\noptim_args: x=1\n")
    code, out, err = run(capsys, "convert", "old.yaml", "--output", "new.yaml")
    assert (code, out) == (2, "")
    assert not Path("new.yaml").exists()
    assert "label_smoothing_factor can't be converted" in err
    assert "optim_args can't be converted" in err
    assert "do:  remove it" in err


def test_json_has_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "convert", "old.yaml", "--json", "--output", "new.yaml")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["from"], found["ok"], found["output"]) == ("trl", True, "new.yaml")
    assert found["yaml"] == Path("new.yaml").read_text()
    assert [entry["key"] for entry in found["keys"]] == list(parse_yaml(OLD, name="old"))
    assert found["added"]["lr_scheduler"] == "linear"
    write("old.yaml", f"{OLD}optim_args: .nan\n")
    code, out, _ = run(capsys, "convert", "old.yaml", "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["config"], found["yaml"]) == (2, False, None, None)
    assert found["errors"][0]["code"] == "unsupported-key"


def test_without_the_packages_of_train_the_format_must_be_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "attnimg.train.data.sources", None)
    code, _, err = run(capsys, "convert", "old.yaml")
    assert code == 2
    assert "--dataset-format" in err
    code, out, _ = run(capsys, "convert", "old.yaml", "--dataset-format", "messages")
    assert code == 0
    assert "type: chat_template" in out


def test_the_trainer_may_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    write("both.yaml", "model_name_or_path: m\nlearning_rate: 1e-4\n")
    code, _, err = run(capsys, "convert", "both.yaml")
    assert code == 2
    assert "TRL" in err
    assert "LLaMA-Factory" in err
    assert "--from trl" in err
    code, _, err = run(capsys, "convert", "both.yaml", "--from", "trl")
    assert code == 2
    assert "dataset_name is missing" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", "has the key a twice"),
        ("[1, 2]\n", "is not a mapping"),
        ("a: [\n", "is not YAML"),
        ("# " + "x" * 1_100_000 + "\n", "too large"),
        ("\x1b[31m: 1\nuse_peft: true\n", "\\x1b"),
    ],
)
def test_foreign_text_is_refused(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("old.yaml", text)
    code, out, err = run(capsys, "convert", "old.yaml")
    assert (code, out) == (2, "")
    assert words in err or "not text" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_secret_is_never_printed(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    write("old.yaml", f"{OLD}env: {{WANDB_API_KEY: s3cr3t}}\n"
          "model_init_kwargs: {token: s3cr3t, url: 'https://bob:s3cr3t@h'}\n")  # fmt: skip
    code, out, err = run(capsys, "convert", "old.yaml", "--output", "new.yaml", *options)
    assert code == 2
    assert "s3cr3t" not in out + err
    assert "WANDB_API_KEY" in out + err
    assert not Path("new.yaml").exists()


def test_a_terminal_gets_no_characters_that_reorder_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("old.yaml", f'{OLD}run_name: "a\u202eb"\nreport_to: wandb\n')
    code, out, _ = run(capsys, "convert", "old.yaml")
    assert (code, parse_yaml(out, name="out")["wandb_name"]) == (0, "a\u202eb")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    code, out, _ = run(capsys, "convert", "old.yaml")
    assert code == 0
    assert "wandb_name: a\\u202eb" in out
    assert "\u202e" not in out


@pytest.mark.parametrize("character", ["\u202e", "\u2066", "\u200f", "\x9b", "\x7f"])
def test_json_escapes_what_would_change_a_terminal(
    character: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"a{character}b"
    write("old.yaml", f'{OLD}run_name: "{json.dumps(name)[1:-1]}"\nreport_to: wandb\n')
    code, out, _ = run(capsys, "convert", "old.yaml", "--json")
    assert code == 0
    assert character not in out
    found = json.loads(out)
    assert found["config"]["wandb_name"] == name
    assert parse_yaml(found["yaml"], name="new")["wandb_name"] == name
