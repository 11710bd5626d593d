"""Two processes train what one would, stop together and resume exactly.

Where torchrun's agent takes part in what is tested, torchrun starts them: the uninterrupted run,
signals, lost processes, another config. The others run in forks that have torchrun's variables.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_preferences as preferences
import torch
from forked_runs import Fork, Ranks, free_port
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_run import make_tokenizer, run
from tracked import tensorboard_metrics

PROGRAM = Path(__file__).parents[1] / "fixtures" / "tiny_run.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
KEYS = {"max_steps": 8, "save_steps": 2, "logging_steps": 1, "micro_batch_size": 1,
        "val_set_size": 0.1, "eval_steps": 4, "eval_batch_size": 5,
        "auto_resume_from_checkpoints": True}  # fmt: skip


def torchrun(program: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(free_port()), str(program), *arguments],
        env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def arguments(folder: Path, **keys: object) -> list[str]:
    return [str(folder), *(f"{k}={json.dumps(v)}" for k, v in keys.items())]


def start(folder: Path, **keys: object) -> subprocess.Popen[str]:
    return torchrun(PROGRAM, *arguments(folder, **keys))


def finish(ranks: Ranks) -> str:
    output = ranks.communicate(timeout=200)
    assert ranks.returncode == 0, output
    return output


def forked(folder: Path, **keys: object) -> Ranks:
    return Ranks([PROGRAM, *arguments(folder, **keys)], env=ENV)


def curve(out: Path, *others: str) -> list[dict[str, float]]:
    same = ("step", "loss", "eval_loss", "grad_norm", "tokens", *others)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in same if key in line} for line in lines]


def wait_for(process: Ranks, there: Path) -> None:
    while not there.exists() and process.poll() is None:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nobody interrupted; its folder also holds the model."""
    folder = tmp_path_factory.mktemp("pair")
    alone = {**KEYS, "micro_batch_size": 2, "output_dir": f"{folder}/single"}
    one = Fork([PROGRAM, *arguments(folder, **alone)], env=ENV)
    errors = one.communicate(timeout=120)[1]
    assert one.returncode == 0, errors
    two = start(folder, use_tensorboard=True, **KEYS)
    output = two.communicate(timeout=200)[0]
    assert two.returncode == 0, output
    assert output.count("step 1/8") == 1, "one process prints"
    return folder


def test_two_processes_of_one_row_train_as_one_of_two(pair: Path) -> None:
    single, double = curve(pair / "single"), curve(pair / "out")
    for ours, theirs in zip(double, single, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


def test_one_of_two_processes_reports_to_trackers(pair: Path) -> None:
    (file,) = (pair / "out/runs").rglob("events.out.tfevents.*")
    tracked = tensorboard_metrics(file.parent)
    for line in curve(pair / "out"):
        for name in line.keys() & {"loss", "eval_loss"}:
            assert tracked[int(line["step"])][name] == pytest.approx(line[name], rel=1e-6)


def test_two_processes_train_each_row_once_an_epoch(tmp_path: Path) -> None:
    """An epoch ends with rows for one of the processes alone; the second one is resumed."""
    common: dict[str, object] = {
        "micro_batch_size": 9, "num_epochs": 2, "logging_steps": 1, "lr_scheduler": "constant",
        "save_steps": 5, "auto_resume_from_checkpoints": True,
    }  # fmt: skip
    save_model(tmp_path, "llama")
    two = forked(tmp_path, **common, max_steps=5)
    single = tmp_path / "single"
    run(tmp_path, single, gradient_accumulation_steps=2, engine=None, **common, max_steps=6)
    finish(two)
    finish(forked(tmp_path, **common, max_steps=6))
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    assert 0 < receipt["packing"]["train"]["rows"] % 18 <= 9
    for ours, theirs in zip(curve(tmp_path / "out"), curve(single), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_two_processes_of_one_pair_train_as_one_of_two(tmp_path: Path, adapter: str | None) -> None:
    """They are stopped after step 3 of 6, by max_steps, and resumed."""
    common: dict[str, object] = {
        "rl": "dpo", "adapter": adapter, "lr_scheduler": "constant", "logging_steps": 1,
        "save_steps": 3, "auto_resume_from_checkpoints": True,
        **preferences.write(tmp_path / "pairs.jsonl", preferences.pairs(16)),
    }  # fmt: skip
    save_model(tmp_path, "llama")
    run(tmp_path, tmp_path / "single", micro_batch_size=2, max_steps=6, **common)
    for steps in (3, 6):
        finish(forked(tmp_path, micro_batch_size=1, max_steps=steps, **common))
    names = ("rewards/margins", "logps/chosen")
    single = curve(tmp_path / "single", *names)
    for ours, theirs in zip(curve(tmp_path / "out", *names), single, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5, rel=1e-4)


@pytest.mark.parametrize("rl", ["kto", "orpo"])
def test_two_processes_train_by_preferences(tmp_path: Path, rl: str) -> None:
    """Fifteen or thirty records do not divide into batches of two processes."""
    records = preferences.labeled(15) if rl == "kto" else preferences.pairs(15)
    save_model(tmp_path, "llama")
    finish(
        forked(
            tmp_path, rl=rl, micro_batch_size=2, num_epochs=2, max_steps=None, save_steps=None,
            logging_steps=1, learning_rate=1e-3,
            **preferences.write(tmp_path / "data.jsonl", records),
        )
    )  # fmt: skip
    found = [line["loss"] for line in curve(tmp_path / "out")]
    assert len(found) == 2 * (8 if rl == "kto" else 4)
    assert sum(found[-4:]) < sum(found[:4])


ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def save_model(folder: Path, model_type: str, **changes: object) -> None:
    tokenizer = make_tokenizer(folder / "model")
    tiny_model(model_type, vocab_size=len(tokenizer), **changes).save_pretrained(folder / "model")


@pytest.mark.parametrize(
    ("model_type", "changes", "keys", "weights"),
    [
        pytest.param("llama", {}, {"adapter": "lora"}, "adapter_model", id="lora"),
        pytest.param("mixtral", ROUTED, {"eval_steps": 2}, "model", id="experts"),
    ],
)
def test_two_processes_train_an_adapter_and_experts_as_one(
    tmp_path: Path, model_type: str, changes: dict[str, object], keys: dict[str, object],
    weights: str,
) -> None:  # fmt: skip
    save_model(tmp_path, model_type, **changes)
    # Adam would turn a rounding error of a gradient near zero into a part of a step.
    common: dict[str, object] = {
        "optimizer": "sgd", "max_steps": 2, "logging_steps": 1, "micro_batch_size": 1,
        "save_steps": None, "save_strategy": "no", **keys,
    }  # fmt: skip
    if "eval_steps" in keys:  # 6 rows: one of the processes evaluates 1 row, and added ones
        common |= {"val_set_size": 0.1, "eval_batch_size": 5}
    two = forked(tmp_path, gradient_accumulation_steps=2, **common)
    single = tmp_path / "single"
    run(tmp_path, single, gradient_accumulation_steps=4, engine=None, **common)
    finish(two)
    losses = ("aux_loss", "eval_aux_loss")
    for ours, theirs in zip(curve(tmp_path / "out", *losses), curve(single, *losses), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    ours, theirs = (load_file(out / f"{weights}.safetensors") for out in (tmp_path / "out", single))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6, msg=name)


def prepare(tmp_path: Path, pair: Path) -> None:
    (tmp_path / "model").symlink_to(pair / "model")


def test_a_killed_pair_resumes_to_the_same_curve(pair: Path, tmp_path: Path) -> None:
    prepare(tmp_path, pair)
    pair_of_forks = forked(tmp_path, **KEYS, delay=0.05)
    wait_for(pair_of_forks, tmp_path / "out/checkpoint-4")
    for fork in pair_of_forks.forks:
        fork.send_signal(signal.SIGKILL)
    pair_of_forks.communicate()
    assert pair_of_forks.returncode == -signal.SIGKILL
    output = finish(forked(tmp_path, **KEYS))
    assert "resuming from" in output
    assert curve(tmp_path / "out") == curve(pair / "out")


def test_a_stopped_pair_saves_one_checkpoint_and_resumes(pair: Path, tmp_path: Path) -> None:
    prepare(tmp_path, pair)
    process = start(tmp_path, **{**KEYS, "save_steps": 100}, delay=0.3)
    metrics = tmp_path / "out/metrics.jsonl"
    while not (metrics.exists() and '"step": 3' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # torchrun hands it to its workers
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    saved = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert len(saved) == 1, output
    assert json.loads((tmp_path / "out/receipt.json").read_text())["status"] == "stopped"
    finish(forked(tmp_path, **{**KEYS, "save_steps": 100}))
    assert curve(tmp_path / "out") == curve(pair / "out")


def worker(tmp_path: Path, rank: int) -> int:
    """Return the process of a rank that trains in a folder."""
    for child in Path("/proc").glob("[0-9]*/cmdline"):
        words = child.read_bytes().split(b"\0") if child.exists() else []
        # torchrun itself has the folder in its arguments, and no RANK.
        if str(tmp_path).encode() not in words:
            continue
        if f"RANK={rank}".encode() in (child.parent / "environ").read_bytes().split(b"\0"):
            return int(child.parent.name)
    raise LookupError(f"no process of rank {rank}")


def test_a_process_that_is_suspended_ends_the_run_after_ddp_timeout(
    pair: Path, tmp_path: Path
) -> None:
    prepare(tmp_path, pair)
    process = start(tmp_path, **{**KEYS, "save_steps": 2, "ddp_timeout": 5}, delay=0.3)
    metrics = tmp_path / "out/metrics.jsonl"
    while not (metrics.exists() and '"step": 3' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    suspended, began = worker(tmp_path, 1), time.monotonic()
    os.kill(suspended, signal.SIGSTOP)
    assert process.stdout
    answer = next(line for line in process.stdout if "did not answer" in line)
    why = process.stdout.readline()
    took = time.monotonic() - began
    os.kill(suspended, signal.SIGKILL)  # torchrun would wait 30 s for it
    output = process.communicate(timeout=100)[0]
    assert "rank 1 of 2" in answer
    assert "ddp_timeout: 5 s" in why
    assert took < 30
    assert process.returncode != 0, output


AGREE = """
import sys, time
from attnimg.errors import AttnimgError
from attnimg.train.distributed import end_process, join_group, rank, require_same_on_all_ranks
odd, hangs = int(sys.argv[1]), sys.argv[2] == "hangs"
join_group(cpu=True, timeout_s=4 if hangs else None)
if hangs and rank() == odd:
    time.sleep(60)
try:
    facts = {"learning_rate": 1e-4 if rank() == odd else 1e-5, "seed": 42}
    require_same_on_all_ranks(facts, cpu=True, timeout_s=4 if hangs else None)
except AttnimgError as error:
    print(error.code, error, flush=True)
    end_process(error.exit_code)
end_process(0)
"""


@pytest.mark.parametrize(
    ("odd", "refused"),
    [
        pytest.param("1", True, id="two values are refused"),
        pytest.param("9", False, id="one is fine"),
    ],
)
def test_processes_must_agree(tmp_path: Path, odd: str, refused: bool) -> None:
    program = tmp_path / "agree.py"
    program.write_text(AGREE)
    process = Ranks([program, odd, "answers"], env=ENV)
    output = process.communicate(timeout=120)
    assert process.returncode == (1 if refused else 0), output
    assert ("rank-mismatch" in output) is refused
    if refused:
        assert "learning_rate: rank 0 has 1e-05, rank 1 has 0.0001" in output
        assert "seed:" not in output


def test_a_process_that_does_not_answer_is_named_after_ddp_timeout(tmp_path: Path) -> None:
    program = tmp_path / "agree.py"
    program.write_text(AGREE)
    began = time.monotonic()
    process = torchrun(program, "1", "hangs")
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0, output
    assert time.monotonic() - began < 50
    assert "rank 1 of 2 did not answer" in output, output
    assert "ddp_timeout: 4 s" in output


COMMAND = """
import sys
from attnimg.__main__ import run
from attnimg.train.distributed import end_process, rank
end_process(run(["train", sys.argv[1], *sys.argv[2:][rank():rank() + 1]]))
"""


def test_another_config_on_a_rank_is_refused_by_its_key(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(COMMAND)
    (tmp_path / "data.jsonl").write_text('{"text": "one two three"}\n' * 8)
    (tmp_path / "run.yaml").write_text(
        f"base_model: {pair / 'model'}\noutput_dir: {tmp_path / 'out'}\nmax_steps: 1\n"
        f"learning_rate: 0.0001\nmicro_batch_size: 1\nsequence_len: 32\n"
        f"datasets: [{{path: {tmp_path / 'data.jsonl'}, type: completion}}]\n"
    )
    process = torchrun(tmp_path / "train.py", str(tmp_path / "run.yaml"), "seed=1", "seed=2")
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "the processes do not agree: seed" in output, output
    assert "rank 0 has 1, rank 1 has 2" in output
    assert not (tmp_path / "out").exists()


OWN_FOLDER = """
import os, sys
from attnimg.__main__ import run
from attnimg.train.distributed import end_process, rank
os.chdir(sys.argv[2 + rank()])
end_process(run(["train", sys.argv[1]]))
"""


def test_another_model_of_the_same_name_on_a_rank_is_refused(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(OWN_FOLDER)
    (tmp_path / "data.jsonl").write_text('{"text": "one two three"}\n' * 8)
    for name in ("0", "1"):
        shutil.copytree(pair / "model", tmp_path / name / "model")
    config = tmp_path / "1/model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.1}))
    (tmp_path / "run.yaml").write_text(
        f"base_model: model\noutput_dir: {tmp_path / 'out'}\nmax_steps: 1\n"
        f"learning_rate: 0.0001\nmicro_batch_size: 1\nsequence_len: 32\n"
        f"datasets: [{{path: {tmp_path / 'data.jsonl'}, type: completion}}]\n"
    )
    process = Ranks([tmp_path / name for name in ("train.py", "run.yaml", "0", "1")], env=ENV)
    output = process.communicate()
    assert process.returncode != 0, output
    assert "the processes do not agree: base_model" in output, output
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_high_loss_stops_both(tmp_path: Path, pair: Path) -> None:
    shutil.copytree(pair / "model", tmp_path / "model")
    both = forked(tmp_path, loss_watchdog_threshold=1.0, micro_batch_size=1, save_steps=1)
    output = both.communicate(timeout=200)
    assert both.returncode == 1, output
    assert output.count("loss_watchdog_threshold since step 1") == 2, "each rank prints it"
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == [
        "checkpoint-1", "checkpoint-2"
    ]  # fmt: skip
