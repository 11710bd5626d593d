"""A window that is not shorter than the row hides nothing, and is not judged, not proven."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
from run_facts import a_context, a_problem

from attnimg.config import check_values
from attnimg.facts import LocalKernel, Machine
from attnimg.run_facts import LayerGroup, Model, Problem, Verdict
from attnimg.selection.gpus_and_images import parse_gpu
from attnimg.selection.judge import with_effective_windows
from attnimg.selection.plan import choose
from attnimg.task import build_problem
from attnimg.verification.proofs import list_geometries

LAYER = LayerGroup(
    count=26, heads=8, kv_heads=4, head_dim_qk=256, head_dim_v=256, window=4096, softcap=None
)
MODEL = Model(type="gemma3_text", layers=(LAYER,))


def run(*, sequence_len: int | None, packing: bool, rows: int) -> Problem:
    return a_problem(
        model=MODEL, dtype="bfloat16", sequence_len=sequence_len, packing=packing, rows=rows
    )


@pytest.mark.parametrize(
    ("sequence_len", "packing", "rows", "window"),
    [
        pytest.param(4095, False, 1, None, id="a row shorter than the window"),
        pytest.param(4096, False, 1, None, id="a row as long as the window"),
        pytest.param(4097, False, 1, 4096, id="a row one token longer"),
        pytest.param(4096, False, 8, None, id="rows of one document stay apart"),
        pytest.param(4096, True, 1, None, id="one packed row"),
        pytest.param(4096, True, 2, 4096, id="packed rows reach the kernel as one"),
        pytest.param(512, True, 8, None, id="and are then no longer than the window"),
        pytest.param(None, False, 1, 4096, id="a length that is not known"),
    ],
)
def test_a_window_counts_where_it_is_shorter_than_the_row(
    sequence_len: int | None, packing: bool, rows: int, window: int | None
) -> None:
    problem = run(sequence_len=sequence_len, packing=packing, rows=rows)
    found = with_effective_windows(problem)
    assert found.model is not None
    assert [layer.window for layer in found.model.layers] == [window]
    context = a_context(packing=packing, rows=rows, sequence_len=sequence_len)
    (geometry,) = list_geometries(
        problem, context, dense=True, deterministic=False, every_length=False
    )
    assert geometry.window == window, "what is not judged is not proven, and the other way round"


@pytest.mark.parametrize("key_length", [4095, 4096, 4097])
def test_transformers_passes_the_window_by_the_same_rule(key_length: int) -> None:
    from transformers.modeling_flash_attention_utils import _process_flash_attention_kwargs

    takes = defaultdict(bool, window_size=True)
    passed = partial(
        _process_flash_attention_kwargs, is_causal=True, sliding_window=4096, supports_mapping=takes
    )(query_length=key_length, key_length=key_length)
    row = run(sequence_len=key_length, packing=False, rows=1)
    model = with_effective_windows(row).model
    assert model is not None
    assert ("window_size" in passed) == (model.layers[0].window is not None)


def verdict(problem: Problem, backend: str, gpu: str = "b200", **more: object) -> Verdict:
    target = parse_gpu(gpu)
    arch, label = target.arch, target.label
    machine = Machine(arch=arch, gpu=label, **more)  # type: ignore[arg-type]  # a test's values
    return next(v for v in choose(None, machine, problem).verdicts if v.backend.name == backend)


def test_a_window_that_hides_nothing_refuses_no_backend() -> None:
    # FlashAttention-4 has no window at head_dim 256 on sm_100.
    short = run(sequence_len=4096, packing=False, rows=1)
    assert verdict(short, "flash_attention_4").fits
    longer = run(sequence_len=8192, packing=False, rows=1)
    assert [reason.code for reason in verdict(longer, "flash_attention_4").reasons] == ["window"]


def test_a_local_kernel_without_the_argument_is_not_asked_for_it(tmp_path: Path) -> None:
    kernel = LocalKernel(
        repo="kernels-community/flash-attn2", path=str(tmp_path), vendor="nvidia", version="1",
        exports=frozenset({"flash_attn_func", "flash_attn_varlen_func"}),
        varlen_takes=frozenset({"q", "k", "v"}),
    )  # fmt: skip
    asked = partial(verdict, backend="flash_attention_2", gpu="h100", local_kernels=(kernel,))
    assert asked(run(sequence_len=4096, packing=False, rows=1)).fits
    longer = asked(run(sequence_len=4097, packing=False, rows=1))
    assert "window" in [reason.code for reason in longer.reasons]


def test_the_largest_batch_counts() -> None:
    values = {
        "base_model": "m", "learning_rate": 1e-4, "datasets": [{"path": "d"}],
        "sample_packing": True, "sequence_len": 4096, "micro_batch_size": 1, "eval_batch_size": 4,
    }  # fmt: skip
    checked = check_values(values, file="x.yaml")
    assert checked.config is not None
    arch = parse_gpu("h100").arch
    problem = build_problem(checked.config, model=MODEL, dropout=0.0, arch=arch)
    found = with_effective_windows(problem).model
    assert found is not None
    assert found.layers[0].window == 4096, "evaluation hands the kernel four rows as one"


def test_explain_keeps_the_window_of_a_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnimg.__main__ import run as attnimg

    monkeypatch.chdir(tmp_path)
    settings = {"model_type": "gemma3_text", "sliding_window": 1024}
    Path("config.json").write_text(json.dumps(settings))
    config = "base_model: config.json\nlearning_rate: 1.0e-4\ndatasets: [{path: d}]\n"
    Path("short.yaml").write_text(config + "sequence_len: 1024\n")
    Path("long.yaml").write_text(config + "sequence_len: 2048\n")
    fits = {}
    for target in ("config.json", "short.yaml", "long.yaml"):
        assert attnimg(["explain", target, "--on", "b200", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        (found,) = (c for c in shown["candidates"] if c["backend"] == "flash_attention_4")
        fits[target] = found["fits"]
        assert {layer["window"] for layer in shown["layers"]} == {1024, None}, "as the model has it"
    assert fits == {"config.json": False, "short.yaml": True, "long.yaml": False}
