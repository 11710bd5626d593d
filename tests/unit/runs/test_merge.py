"""Merged models compute what the adapter computed; merges that can't are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from attnimg.errors import AttnimgError

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
from random_adapters import make_base, write_adapter
from tiny_run import make_model, run

TINY_SHARDS = 10**5


class Quiet:
    """A report that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, task: str, done: int, total: int) -> None:
        pass


def merged(found: Any, output: Path, *, dtype: str | None = None, **options: Any) -> Any:
    from attnimg.runs.merge import merge

    options = {"shard_bytes": TINY_SHARDS, "report": Quiet(), **options}
    return merge(found, output=output, dtype=dtype, **options)


def by_peft(base: Path, adapter: Path, *, bits: int | None, rows: int) -> Any:
    """PEFT's own merge: plain transformers, no code of attnimg."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": "auto"}
    if bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    elif bits == 8:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    if bits:
        model = model.dequantize()
    if len(model.get_input_embeddings().weight) < rows:
        model.resize_token_embeddings(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out, once Conv1D is dequantized
        return PeftModel.from_pretrained(model, adapter).merge_and_unload().float()


def logits_of(model: Any, rows: int) -> Any:
    import torch

    ids = torch.randint(0, rows, (3, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


SAVED = {"lora_modules_to_save": ["lm_head", "embed_tokens"], "tokens": ["<a>", "<b>"]}
EXPERTS = {"lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CASES = [
    pytest.param("llama", {}, None, id="lora"),
    pytest.param("llama", {"peft_use_dora": True, "peft_use_rslora": True}, None,
                 id="dora and rslora"),
    pytest.param("llama", SAVED, None, id="new tokens and saved embeddings"),
    pytest.param("tied", {"lora_modules_to_save": ["embed_tokens"], "tokens": ["<a>"]}, None,
                 id="tied embeddings"),
    pytest.param("llama", {"adapter": "qlora"}, 4, id="4 bits"),
    pytest.param("llama", {"adapter": "qlora", "peft_use_dora": True}, 4, id="dora on 4 bits"),
    pytest.param("gpt2", {"adapter": "qlora", "lora_fan_in_fan_out": True}, 4,
                 id="Conv1D in 4 bits"),
    pytest.param("llama", {"load_in_8bit": True}, 8, id="8 bits"),
    pytest.param("gpt2", {"lora_fan_in_fan_out": True}, None, id="Conv1D"),
    pytest.param("mixtral", EXPERTS, None, id="weights of experts"),
    pytest.param("mixtral", {"adapter": "qlora", "lora_target_modules": ["q_proj"]}, 4,
                 id="experts beside 4 bits"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "keys", "bits"), CASES)
def test_the_merged_model_is_that_of_peft(
    tmp_path: Path, kind: str, keys: dict[str, Any], bits: int | None
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sizes = {"tie_word_embeddings": True} if kind == "tied" else {}
    base = make_base(tmp_path / "model", "llama" if kind == "tied" else kind, **sizes)
    found, _ = write_adapter(base, tmp_path / "out", **keys)
    result = merged(found, tmp_path / "merged")
    assert result.logits.agrees
    assert result.logits.effect > 0.2, "the adapter changes the model"
    assert (result.dequantized is not None) == (bits is not None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    rows = len(loaded.get_input_embeddings().weight)
    expected = by_peft(base, tmp_path / "out", bits=bits, rows=rows)
    error = (logits_of(loaded, rows) - logits_of(expected, rows)).norm()
    assert error < 1e-4 * logits_of(expected, rows).norm()
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    before = json.loads((base / "config.json").read_text())
    changed = {key for key in config if config.get(key) != before.get(key)}
    assert changed <= {"vocab_size", "transformers_version"}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) <= rows
    total = sum(weight.numel() for weight in loaded.parameters())
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * total, "no weight is stored twice"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_keeps_the_base_models_dtype(tmp_path: Path, dtype: Any) -> None:
    from attnimg.runs.logits import TOLERANCES
    from attnimg.train.model_files import read_tensor_headers

    base = make_base(tmp_path / "model", dtype=dtype)
    found, _ = write_adapter(base, tmp_path / "out", dtype=dtype, **SAVED)
    result = merged(found, tmp_path / "merged", shard_bytes=10**9)
    assert (result.dtype, result.files[0]) == (dtype, "model.safetensors")
    assert result.logits.tolerance == TOLERANCES[dtype]
    assert 1e-5 < result.logits.difference < TOLERANCES[dtype]
    stored = {tensor.dtype for tensor in read_tensor_headers(tmp_path / "merged").values()}
    assert stored == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}
    finer = merged(found, tmp_path / "finer", dtype="float32")
    assert finer.logits.difference < 1e-4


@pytest.mark.parametrize("fault", ["a layer left out", "twice the scale", "another layer's change"])
def test_a_wrong_merge_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    import torch
    from peft.tuners.lora.layer import Linear

    base = make_base(tmp_path / "model", dtype="bfloat16")
    found, _ = write_adapter(base, tmp_path / "out", dtype="bfloat16", scale=0.03)
    right, calls = Linear.get_delta_weight, list[int]()

    def wrong(self: Any, adapter: str) -> Any:
        calls.append(1)
        delta = right(self, adapter)
        if fault == "twice the scale":
            return 2 * delta
        if len(calls) != 3:
            return delta
        return torch.zeros_like(delta) if "left out" in fault else delta.flip(0)

    monkeypatch.setattr(Linear, "get_delta_weight", wrong)
    with pytest.raises(AttnimgError) as caught:
        merged(found, tmp_path / "merged")
    assert (caught.value.code, caught.value.exit_code) == ("merge-differs", 1)
    assert "allowed 8e-02" in caught.value.why
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_small_adapter_that_is_lost_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft.tuners.lora.layer import Linear

    base = make_base(tmp_path / "model", dtype="bfloat16")
    found, _ = write_adapter(base, tmp_path / "out", dtype="bfloat16", scale=0.001)
    right = merged(found, tmp_path / "right").logits
    assert right.effect < right.tolerance / 4, "smaller than the tolerance"
    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *at: torch.zeros_like(delta(*at)))
    with pytest.raises(AttnimgError) as caught:
        merged(found, tmp_path / "merged")
    assert "has 0% of the adapter's effect" in caught.value.why
    assert "--dtype float32" in caught.value.do


def test_an_adapter_that_rounding_loses_is_reported(tmp_path: Path) -> None:
    from attnimg.cli.merge import logits_lines

    base = make_base(tmp_path / "model", dtype="bfloat16")
    said = {}
    for scale in (0.0, 0.0002, 0.05):
        folder = tmp_path / f"out-{scale}"
        found, _ = write_adapter(base, folder, dtype="bfloat16", scale=scale)
        logits = merged(found, folder / "merged").logits
        said[scale] = logits_lines(logits, dtype="bfloat16")
        assert (logits.kept is None) == (scale == 0)
    assert "the adapter has no effect" in said[0.0][-1]
    assert "equal the adapter's" not in "".join(said[0.0002])
    assert re.fullmatch(
        r"warning: \d+\.\d% of the adapter's effect survives in bfloat16; pass --dtype float32",
        said[0.0002][-1],
    )
    (line,) = said[0.05]
    assert "equal the adapter's" in line
    finer = merged(
        write_adapter(base, tmp_path / "out", dtype="bfloat16", scale=0.0002)[0],
        tmp_path / "merged", dtype="float32",
    )  # fmt: skip
    assert len(logits_lines(finer.logits, dtype="float32")) == 1, "the advice helps"
    assert finer.logits.kept == pytest.approx(1, abs=0.02)


def write_peft(base: Path, folder: Path, config: Any) -> Any:
    """Write an adapter as other programs do, and return its folder."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from attnimg.runs.folder import find_run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of what can't be merged
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        torch.manual_seed(1)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += torch.randn_like(weight) * 0.05
        model.save_pretrained(folder)
    return find_run(str(folder), command="merge")


@pytest.mark.parametrize(
    ("kind", "named", "keys"),
    [
        ("llama", "lora_bias", {"target_modules": ["q_proj"], "lora_bias": True}),
        ("gpt2", "", {"target_modules": ["c_attn"], "lora_bias": True}),
        ("llama", "layer_replication", {"layer_replication": [[0, 2], [1, 2]]}),
        ("tied", "tied", {"target_modules": ["embed_tokens"]}),
        ("tied", "tied", {"target_modules": ["lm_head", "q_proj"]}),
        ("tied", "", {"target_modules": ["q_proj"]}),
        ("llama", "", {"target_modules": ["lm_head", "embed_tokens"]}),
        ("llama", "PREFIX_TUNING", None),
    ],
)
def test_adapters_of_other_programs(
    tmp_path: Path, kind: str, named: str, keys: dict[str, Any] | None
) -> None:
    from peft import LoraConfig, PrefixTuningConfig

    sizes = {"tie_word_embeddings": True} if kind == "tied" else {}
    base = make_base(tmp_path / "model", "llama" if kind == "tied" else kind, **sizes)
    config = (
        LoraConfig(r=4, task_type="CAUSAL_LM", **keys)
        if keys is not None
        else PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    found = write_peft(base, tmp_path / "out", config)
    if not named:
        assert merged(found, tmp_path / "merged").logits.agrees
        return
    with pytest.raises(AttnimgError) as caught:
        merged(found, tmp_path / "merged")
    assert caught.value.code == "not-mergeable"
    assert named in caught.value.why
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_what_is_refused_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "model")
    found, _ = write_adapter(base, tmp_path / "out")

    def refused(output: Path, **options: Any) -> AttnimgError:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(AttnimgError) as caught:
            merged(found, output, **options)
        assert sorted(tmp_path.iterdir()) == before
        return caught.value

    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.safetensors").touch()
    assert refused(tmp_path / "full").code == "output-dir-not-empty"
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file").code == "output-dir-not-empty"
    assert refused(tmp_path / "file/below").code == "output-dir"
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    for current in (Path(), tmp_path / "current"):
        error = refused(current)
        assert (error.code, error.do) == ("output-dir", f"pass --output {current / 'merged'}")
    monkeypatch.undo()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert refused(tmp_path / "dangling").code == "output-dir-not-empty"
    settings = (base / "config.json").read_bytes()
    (base / "config.json").write_text("{")
    assert refused(tmp_path / "merged").code == "damaged-run"
    (base / "config.json").write_bytes(settings)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = refused(tmp_path / "merged")
    assert (error.code, error.exit_code) == ("disk-full", 2)
    assert "found 0.0 MiB free" in error.why
    assert "needed 0.00" not in error.why
    monkeypatch.undo()

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attnimg.runs.merged_weights.save_file", fails)
    error = refused(tmp_path / "merged")
    assert (error.code, error.exit_code, error.do) == (
        "disk-full",
        1,
        "free space, and run it again",
    )
    monkeypatch.undo()
    (tmp_path / "merged").mkdir()
    assert merged(found, tmp_path / "merged").files, "an empty folder is used"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    merged(found, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty/model.safetensors.index.json").is_file()


def test_a_killed_merge_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    base = make_base(tmp_path / "model")
    found, _ = write_adapter(base, tmp_path / "out")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from attnimg.__main__ import run\n"
        "import attnimg.runs.merged_weights as weights\n"
        "def slow(*args, **options):\n"
        "    save_file(*args, **options)\n"
        "    Path(sys.argv[1], 'written').touch()\n"
        "    time.sleep(60)\n"
        "weights.save_file = slow\n"
        "sys.exit(run(['merge', str(Path(sys.argv[1], 'out')), '--max-shard-size', '100KB']))\n"
    )
    for number, exit_code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL
        )
        while not (tmp_path / "written").exists():
            time.sleep(0.05)
            assert process.poll() is None
        assert len(partial_folders(tmp_path / "out")) == 1
        process.send_signal(number)
        assert process.wait(30) == exit_code
        assert not (tmp_path / "out/merged").exists()
        left = partial_folders(tmp_path / "out")
        assert len(left) == (number == signal.SIGKILL)
        if left:
            (left[0] / "additional_chat_templates").mkdir()
        (tmp_path / "written").unlink()
    result = merged(found, tmp_path / "out/merged")
    assert not partial_folders(tmp_path / "out")
    assert "shard-0.safetensors" not in result.files
    assert sorted(result.files) == sorted(p.name for p in (tmp_path / "out/merged").iterdir())


def partial_folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ".partial-" in path.name]


def test_a_leftover_of_a_killed_merge_is_removed_and_nothing_else(tmp_path: Path) -> None:
    from attnimg.runs.merge import _lock, _staging_folder

    victim = tmp_path / "victim"
    for folder in (tmp_path / "mine.partial", tmp_path / ".mine.partial-1", victim):
        folder.mkdir()
        (folder / "thesis.tex").write_text("x")
    (victim / ".attnimg-merge").touch()
    (tmp_path / ".mine.partial-2").symlink_to(victim)
    left = tmp_path / ".mine.partial-3"
    (left / "additional_chat_templates").mkdir(parents=True)
    (left / ".attnimg-merge").touch()
    before = set(tmp_path.rglob("*"))
    handle = _lock(left)
    with pytest.raises(AttnimgError) as caught, _staging_folder(tmp_path / "mine"):
        pass
    assert caught.value.code == "output-dir-busy"
    os.close(handle)
    with suppress(ZeroDivisionError), _staging_folder(tmp_path / "mine") as staging:
        (staging / "shard").touch()
        assert staging.stat().st_mode == victim.stat().st_mode, "others may read the model"
        raise ZeroDivisionError
    assert set(tmp_path.rglob("*")) == before - {left, *before.intersection(
        [left / ".attnimg-merge", left / "additional_chat_templates"])}  # fmt: skip


MEMORY = """
import sys, threading, time
from pathlib import Path
sys.path.append(sys.argv[2])
from random_adapters import write_adapter
from attnimg.runs.merge import merge
import attnimg.runs.merged_weights, attnimg.runs.logits, attnimg.runs.weights
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
class Quiet:
    def log(self, text): pass
    def advance(self, *_): pass
from attnimg.runs.folder import find_run
found = find_run(sys.argv[1] + "/out", command="merge")
before, peak = anonymous(), [0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
output = Path(sys.argv[1]) / "merged"
merge(found, output=output, dtype=None, shard_bytes=30 * 10**6, report=Quiet())
print(peak[0] - before)
"""


def test_the_memory_is_that_of_the_base_and_one_shard(tmp_path: Path) -> None:
    base = make_base(
        tmp_path / "model", hidden_size=768, intermediate_size=3072, num_hidden_layers=4
    )
    write_adapter(base, tmp_path / "out")
    size = (base / "model.safetensors").stat().st_size
    assert size > 110 * 10**6
    fixtures = str(Path(__file__).parents[2] / "fixtures")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), fixtures],
        capture_output=True, text=True, env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < size + 30 * 10**6
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    make_model(folder / "model")
    run(folder, folder / "lora", adapter="lora", max_steps=3, save_steps=2)
    run(folder, folder / "full", max_steps=1)
    return folder


def command(*arguments: str) -> int:
    from attnimg.__main__ import run as run_command

    return run_command(["merge", *arguments])


def test_the_command_merges_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    assert command(str(trained / "lora")) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(trained / "lora/merged")
    assert "equal the adapter's" in said.err
    AutoModelForCausalLM.from_pretrained(trained / "lora/merged")
    record = json.loads((trained / "lora/merged/merge.json").read_text())
    assert record["logits"]["difference"] < record["logits"]["tolerance"] == 1e-4
    assert command(str(trained / "lora")) == 2
    assert "it is not overwritten" in capsys.readouterr().err
    assert command(str(trained / "lora"), "--json", "--output", str(trained / "other")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["folder"] == str(trained / "other")
    assert printed["logits"] == record["logits"]


def test_a_merged_checkpoint_stays_intact(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnimg.train.intact import find_damage

    assert command(str(trained / "lora/checkpoint-2")) == 0
    assert capsys.readouterr().out.strip() == str(trained / "lora/merged-checkpoint-2")
    assert not find_damage(trained / "lora/checkpoint-2")


def test_the_command_refuses_what_it_can_not_merge(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(trained / "full")) == 2
    assert "it has a whole model" in capsys.readouterr().err
    assert command(str(trained / "lora"), "--max-shard-size", "5 apples") == 2
    assert "5GB" in capsys.readouterr().err
    assert command(str(trained / "lora"), "--max-shard-size", "9" * 400) == 2
    assert "is not a size" in capsys.readouterr().err
