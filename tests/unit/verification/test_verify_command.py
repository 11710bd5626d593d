"""`verify` and the proof inside `train`, on real kernels served from folders."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import served_kernels

from attnimg.__main__ import run as attnimg
from attnimg.machine import kernel_cache

FIXTURES = Path(__file__).parents[2] / "fixtures"
FLASH = "kernels-community/flash-attn2"
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
CONFIG = (
    "base_model: ./model\nlearning_rate: 1e-3\nsequence_len: 64\nsample_packing: true\n"
    "bf16: false\nmax_steps: 1\noutput_dir: ./out\ndatasets: [{path: d.jsonl, type: completion}]\n"
)


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTNIMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(MODEL))
    Path("c.yaml").write_text(CONFIG)
    Path("d.jsonl").write_text('{"text": "a day at sea"}\n')


def serve(fault: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Serve a kernel with a fault in the place of flash-attn2's hub kernel."""
    build = Path("kernel/build/torch-cpu")
    build.mkdir(parents=True)
    metadata = json.loads(
        (FIXTURES / "flash_attn2/build/torch-cpu/metadata.json").read_text(encoding="utf-8")
    )
    (build / "metadata.json").write_text(json.dumps(metadata))
    source = (FIXTURES / "wrong_kernels/kernel.py").read_text(encoding="utf-8")
    (build / "__init__.py").write_text(source.replace('FAULT = "none"', f'FAULT = "{fault}"'))
    monkeypatch.setenv("LOCAL_KERNELS", f"{FLASH}={Path('kernel').resolve()}")
    return build / "__init__.py"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = attnimg(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def verified(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code, out, _ = run(capsys, "verify", "c.yaml", "--json")
    (line,) = out.splitlines()
    return code, json.loads(line)


def test_verify_proves_what_fits_and_reads_it_from_the_disk_after(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, first = verified(capsys)
    assert (code, first["ok"], first["on"]) == (0, True, "cpu")
    assert {"sdpa", "eager"} <= {proof["backend"] for proof in first["proofs"]}
    for proof in first["proofs"]:
        assert {figure["quantity"] for figure in proof["figures"]} == {"out", "dq", "dk", "dv"}
        assert (proof["passed"], proof["packing"], proof["cached"]) == (True, True, False)
    code, second = verified(capsys)
    assert code == 0
    assert all(proof["cached"] for proof in second["proofs"])


def test_verify_names_a_wrong_kernel_and_ends_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = serve("dk of one head in a group", monkeypatch)
    code, out, _ = run(capsys, "verify", "c.yaml")
    assert code == 1
    assert "numerics-bwd flash_attention_2" in out
    corrected = source.read_text().replace('FAULT = "dk of one head in a group"', 'FAULT = "none"')
    source.write_text(corrected)
    code, found = verified(capsys)
    reasons = [proof["reasons"] for proof in found["proofs"]]
    assert (code, [r for r in reasons if r]) == (0, []), "a fixed kernel is proven again"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(["verify", "none.yaml"], "none.yaml", id="no such file"),
        pytest.param(["verify", "bad.yaml"], "missing-key", id="a config that check refuses"),
        pytest.param(["verify", "--fast"], "unrecognized arguments", id="an unknown option"),
    ],
)
def test_wrong_arguments_end_with_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    Path("bad.yaml").write_text("attn_implementation: sdpa\n")
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert told in err


def make_model() -> None:
    """Write a model that loads up to its weights, which are none."""
    sys.path.insert(0, str(FIXTURES))
    import tiny_run

    tiny_run.make_model(Path("model"))
    Path("model/model.safetensors").write_bytes(b"no weights")


def test_train_refuses_a_wrong_kernel_by_name_before_any_weights_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model()
    serve("leak of one token", monkeypatch)
    code, out, err = run(capsys, "train", "c.yaml", "attn_implementation=flash_attention_2")
    assert (code, out) == (1, "")
    assert "attnimg: flash_attention_2 failed its proof" in err
    assert "packing-not-isolated" in err
    assert "do:" in err
    assert "no weights" not in err


# Faults of sly kernels, which test_wrong_kernels.py proves too; the others with PROOFS=all.
SLY = [
    ("cu_seqlens changed", True, "numerics-fwd"),
    ("keys kept by shape", False, "numerics-fwd"),
    ("leak backward", True, "packing-not-isolated"),
    ("documents past 64", True, "numerics-fwd"),
    ("without gradients", False, "numerics-fwd"),
]


@pytest.mark.parametrize(
    ("fault", "packing", "code"),
    [
        *(SLY if os.environ.get("PROOFS") == "all" else SLY[1:3]),
        pytest.param("none", True, None, id="a right one, packed"),
        pytest.param("none", False, None, id="a right one"),
    ],
)
def test_train_proves_a_hub_kernel_that_nobody_here_has_read(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    packing: bool,
    code: str | None,
) -> None:
    make_model()
    folder = served_kernels.serve(Path("kernel").resolve(), fault, source=served_kernels.SLY)
    monkeypatch.setenv("LOCAL_KERNELS", f"org/sly={folder}")
    settings = [
        "attn_implementation=org/sly",
        "trust_remote_code=true",
        f"sample_packing={packing}",
    ]
    _, out, err = run(capsys, "train", "c.yaml", *settings)
    assert out == ""
    if code is None:
        assert "proof: org/sly passed" in err
        assert "model could not be loaded" in err, "the proof comes before the weights"
        return
    assert "attnimg: org/sly failed its proof" in err
    assert f"found {code}:" in err
    assert "no weights" not in err


def test_auto_goes_on_to_the_next_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model()
    serve("zeros", monkeypatch)
    code, _, err = run(capsys, "train", "c.yaml")
    assert "proof: flash_attention_2 failed: zeros" in err
    assert "proof: sdpa passed" in err
    assert "model could not be loaded" in err, "the proof comes before the weights"
    assert code == 2


def test_train_refuses_a_bad_file_of_rules(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text("[[rule]]\nid = 3\n")
    code, _, err = run(capsys, "explain", "c.yaml")
    assert code == 0
    Path("c.yaml").write_text(CONFIG + "attn_known_bad: mine.toml\n")
    code, _, err = run(capsys, "train", "c.yaml")
    assert code == 2
    assert "mine.toml, rule 1" in err
    assert "remove attn_known_bad" in err


def test_verify_compares_s2_with_a_reference_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    keys = CONFIG.replace("sample_packing: true", "sample_packing: false")
    Path("c.yaml").write_text(keys + "attn_implementation: s2\n")
    code, found = verified(capsys)
    assert code == 0, [proof["reasons"] for proof in found["proofs"]]
    (proof,) = (proof for proof in found["proofs"] if proof["backend"] == "s2")
    assert {figure["quantity"] for figure in proof["figures"]} == {"out", "dq", "dk", "dv"}
    assert all(0 < figure["error"] <= figure["allowed"] for figure in proof["figures"])


# FlashAttention-2 of a kernel without windows: a model's sliding layers must run something else.
WITHOUT_WINDOW = """
from . import whole

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, softcap=0.0):
    return whole.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)

def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, softcap=0.0,
):
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return whole.flash_attn_varlen_func(
        q, k, v, *bounds, softmax_scale=softmax_scale, causal=causal
    )
"""


def test_verify_proves_what_a_router_would_call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = serve("none", monkeypatch)
    source.rename(source.with_name("whole.py"))
    source.write_text(WITHOUT_WINDOW)
    gemma = MODEL | {"model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 16,
                     "sliding_window": 8}  # fmt: skip
    Path("model/config.json").write_text(json.dumps(gemma))
    code, found = verified(capsys)
    assert code == 0, [proof["reasons"] for proof in found["proofs"]]
    backends = [proof["backend"] for proof in found["proofs"]]
    assert backends.count("sdpa") == 2, "once for all layers, once as the router calls it"
    assert backends.count("flash_attention_2") == 1, "for the layers without a window"


@pytest.mark.parametrize("command", ["train", "verify"])
def test_shipped_kernels_are_named_before_any_kernel_is_imported(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kernel_cache, "settings_for", lambda machine, _: {name: machine.gpu})
    Path("c.yaml").write_text(CONFIG.replace("base_model", "base_modle"))
    assert attnimg([command, "c.yaml"]) == 2
    assert os.environ.pop(name) == "cpu"
