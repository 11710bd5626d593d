"""`attnimg preprocess` as a user runs it: what it refuses, and that `train` reuses what it kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked_runs import Fork
from tiny_run import make_model, make_tokenizer, sentences

QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a model that has a tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("home")
    make_tokenizer(folder / "llama")
    (folder / "llama" / "config.json").write_text('{"model_type": "llama"}')
    lines = [json.dumps({"text": text}) for text in ["", *sentences(60, seed=3)]]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write(home: Path, out: Path, **keys: Any) -> str:
    config = {
        "base_model": str(home / "llama"),
        "datasets": [{"path": str(home / "data.jsonl"), "type": "completion"}],
        "learning_rate": 1e-2,
        "sequence_len": 64,
        "sample_packing": True,
        "save_strategy": "no",
        "max_steps": 1,
        "output_dir": str(out / "out"),
        **keys,
    }
    (out / "run.yaml").write_text(yaml.safe_dump(config))
    return str(out / "run.yaml")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run attnimg in a fork."""
    fork = Fork(["-m", "attnimg", *words], env=os.environ | QUIET)
    stdout, stderr = fork.communicate()
    assert fork.returncode is not None
    assert "Traceback" not in stderr
    return subprocess.CompletedProcess([], fork.returncode, stdout, stderr)


def test_train_reuses_what_was_prepared(home: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "llama")
    kept = tmp_path / "kept"
    file = write(home, tmp_path, val_set_size=0.1, base_model=str(tmp_path / "llama"))
    done = run("preprocess", file, f"dataset_prepared_path={kept}", "--json", "--show", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["datasets"][0]["empty"] == 1
    assert found["datasets"][0]["places"] == {"empty": ["data.jsonl, line 1"]}
    assert [sample["split"] for sample in found["samples"]] == 2 * ["training"] + 2 * ["evaluation"]
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    assert not (tmp_path / "out").exists()
    trained = run("train", file, f"dataset_prepared_path={kept}")
    assert trained.returncode == 0, trained.stderr
    assert "(prepared earlier, reused)" in trained.stderr
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == before
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    for split, name in (("training", "train"), ("evaluation", "eval")):
        figures = {key: found[split][key] for key in receipt["packing"][name]}
        assert figures == receipt["packing"][name]
    assert receipt["schedule"]["steps_per_epoch"] == found["steps_per_epoch"]
    assert receipt["data"][0] == found["datasets"][0] | {"reused": True}


def test_it_prints_figures_and_samples_and_writes_a_page(home: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("preprocess", write(home, tmp_path), "--show", "1", "--html", str(page))
    assert done.returncode == 0, done.stderr
    for text in ("datasets[0]", "training ", "rows ", "steps ", "set dataset_prepared_path",
                 "\u27e6", "data.jsonl, line", "row "):  # fmt: skip
        assert text in done.stdout, text
    assert done.stdout.splitlines()[-1] == str(page)
    assert page.read_text().count("<article>") > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run.yaml"]


@pytest.mark.parametrize(
    ("words", "keys", "named"),
    [
        pytest.param(["--show", "-1"], {}, "--show", id="fewer than no samples"),
        pytest.param(["--seed", "x"], {}, "--seed", id="a seed that is no number"),
        pytest.param(["--html", "{run}"], {}, "cannot be written by --html", id="another file"),
        pytest.param(["--html", "no/such/x.html"], {}, "no such file", id="no such folder"),
        pytest.param(["--html", ""], {}, "--html has no file name", id="no name"),
        pytest.param(["sequence_le=5"], {}, "sequence_len", id="an unknown key"),
        pytest.param([], {"base_model": "no/such/folder"}, "no folder", id="no such model"),
        pytest.param([], {"dataset_prepared_path": "~nobody-here/x"}, "without ~", id="no home"),
        pytest.param(
            [],
            {"datasets": [{"path": "none.jsonl", "type": "completion"}]},
            "not found",
            id="no such data",
        ),
    ],
)
def test_what_cannot_be_prepared_is_refused(
    home: Path, tmp_path: Path, words: list[str], keys: dict[str, Any], named: str
) -> None:
    file = write(home, tmp_path, **keys)
    done = run("preprocess", file, *(word.replace("{run}", file) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_a_stopped_run_leaves_nothing_that_is_used(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "day night " * 200}) + "\n")
    with data.open("a") as file:
        file.writelines([data.read_text()] * 20_000)
    kept = tmp_path / "kept"
    config = write(home, tmp_path, dataset_prepared_path=str(kept),
                   datasets=[{"path": str(data), "type": "completion"}])  # fmt: skip
    fork = Fork(["-m", "attnimg", "preprocess", config], env=os.environ | QUIET)
    while not list(kept.glob(".partial-*/documents.arrow")):
        time.sleep(0.05)
        assert fork.poll() is None
    fork.send_signal(signal.SIGTERM)
    _, stderr = fork.communicate()
    assert fork.returncode == 143, stderr
    assert [path.name[:6] for path in kept.iterdir()] == [".lock-"]
