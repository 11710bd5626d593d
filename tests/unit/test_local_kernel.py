"""The CPU stand-in for FlashAttention-2: right by itself, and through transformers' flash path."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from run_facts import a_context
from tiny_models import tiny_model

from attnimg.train.rows import PackedCollator
from attnimg.verification.isolation import check_isolation

FOLDER = Path(__file__).parents[1] / "fixtures" / "flash_attn2"


@pytest.fixture(scope="module")
def kernel():
    spec = importlib.util.spec_from_file_location(
        "flash_attn2_fixture", FOLDER / "build/torch-cpu/__init__.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference(q, k, v, *, scale=None, causal=False, window=(-1, -1), softcap=0.0):
    """Attend query by query in float64; q (T, H, D), k and v (S, G, D)."""
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n_queries, n_keys, group = len(q), len(k), q.shape[1] // k.shape[1]
    rows = []
    for t in range(n_queries):
        position = t + n_keys - n_queries
        first = 0 if window[0] < 0 else max(0, position - window[0])
        right = 0 if causal else window[1]
        last = n_keys if right < 0 else min(n_keys, position + right + 1)
        heads = []
        for h in range(q.shape[1]):
            keys, values = (
                k[first : max(first, last), h // group],
                v[first : max(first, last), h // group],
            )
            scores = keys @ q[t, h] * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            heads.append(scores.softmax(0) @ values if len(keys) else torch.zeros_like(v[0, 0]))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def draw(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def close(found, expected, *leaves):
    """Compare outputs, and gradients of a weighted sum of them."""
    assert torch.allclose(found.double(), expected, atol=1e-6)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).reshape(found.shape)
    gradients = [
        torch.autograd.grad((x.double() * weights).sum(), leaves, retain_graph=True)
        for x in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


OPTIONS = [
    pytest.param({}, id="all keys"),
    pytest.param({"causal": True}, id="causal"),
    pytest.param({"window_size": (3, 2)}, id="a window to both sides"),
    pytest.param({"causal": True, "window_size": (3, 0)}, id="a causal window"),
    pytest.param({"causal": True, "window_size": (3, 5)}, id="causal hides what a window shows"),
    pytest.param({"causal": True, "softcap": 0.7}, id="softcap"),
    pytest.param({"causal": True, "softmax_scale": 0.3}, id="scale"),
    pytest.param({"window_size": (0, 0)}, id="each its own key"),
]


def as_reference(options):
    names = {"softmax_scale": "scale", "window_size": "window"}
    return {names.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads"),
    [
        pytest.param(7, 7, 2, 2, id="square"),
        pytest.param(13, 13, 6, 2, id="grouped heads"),
        pytest.param(3, 11, 4, 1, id="fewer queries than keys, as in decoding"),
        pytest.param(9, 5, 2, 2, id="more queries than keys"),
    ],
)
def test_dense_equals_the_reference(kernel, queries, keys, heads, kv_heads, options):
    q, k, v = draw(2, queries, heads, 8), draw(2, keys, kv_heads, 8), draw(2, keys, kv_heads, 4)
    found = kernel.flash_attn_func(q, k, v, **options)
    expected = torch.stack(
        [reference(*x, **as_reference(options)) for x in zip(q, k, v, strict=True)]
    )
    close(found, expected, q, k, v)


@pytest.mark.parametrize("options", OPTIONS)
def test_varlen_equals_the_reference_of_each_document(kernel, options):
    lengths_q, lengths_k = [1, 13, 4, 7], [1, 13, 9, 7]
    q, k, v = draw(25, 4, 8), draw(30, 2, 8), draw(30, 2, 8)
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    found = kernel.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 13, 13, **options)
    documents = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    expected = torch.cat([reference(*x, **as_reference(options)) for x in documents])
    close(found, expected, q, k, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_queries_comes_back(kernel, dtype):
    q = draw(1, 5, 2, 8).detach().to(dtype)
    found = kernel.flash_attn_func(q, q, q, causal=True)
    assert found.dtype == dtype
    assert torch.allclose(found[0].double(), reference(q[0], q[0], q[0], causal=True), atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param({"dropout_p": 0.1}, NotImplementedError, id="dropout"),
        pytest.param({"alibi_slopes": torch.ones(2)}, NotImplementedError, id="alibi"),
        pytest.param({"return_attn_probs": True}, NotImplementedError, id="probabilities"),
        pytest.param({"block_table": torch.ones(1)}, NotImplementedError, id="paged keys"),
        pytest.param({"max_seqlen_q": 2}, ValueError, id="a longest length that is too short"),
        pytest.param(
            {"cu_seqlens_k": torch.tensor([0, 4]).int()}, ValueError, id="tokens left over"
        ),
        pytest.param({"cu_seqlens_q": torch.tensor([0, 5])}, ValueError, id="int64 boundaries"),
    ],
)
def test_what_it_does_not_honour_it_refuses(kernel, arguments, error):
    q, cu = draw(5, 2, 8), torch.tensor([0, 5]).int()
    given = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5, "max_seqlen_k": 5}
    with pytest.raises(error):
        kernel.flash_attn_varlen_func(q, q, q, **{**given, **arguments})


@pytest.fixture
def served(monkeypatch):
    """Serve the folder in place of the hub's kernels, whatever this process loaded before."""
    import transformers.modeling_flash_attention_utils as flash

    served = ("kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3")
    # The list is parsed once a string, so it need not be the first one of this process.
    monkeypatch.setenv("LOCAL_KERNELS", ":".join(f"{name}={FOLDER}" for name in served))
    # One slot for all flash kernels, which also stays set when loading failed (5.22.2).
    monkeypatch.setattr(flash, "_loaded_implementation", None)


def test_packed_logits_and_gradients_through_transformers_equal_sdpa(served):
    draw_ids = torch.Generator().manual_seed(0)
    rows = [[13, 21, 1], [30], [5, 2, 9, 8]]
    examples = []
    for row in rows:
        ids = torch.randint(3, 128, (sum(row),), generator=draw_ids).tolist()
        examples.append({"input_ids": ids, "labels": ids, "document_lengths": row})
    batch = PackedCollator(pad_token_id=0, seq_idx=False, padding_free=True, pad_to=40)(examples)
    found = {}
    for implementation in ("flash_attention_2", "sdpa"):
        model = tiny_model("llama", implementation)
        output = model(**batch, use_cache=False)
        output.loss.backward()
        found[implementation] = output, [weight.grad for weight in model.parameters()]
        if implementation != "sdpa":
            assert model.config._attn_implementation == "kernels-community/flash-attn2"
    (flash, flash_gradients), (sdpa, sdpa_gradients) = found.values()
    assert (flash.logits - sdpa.logits).abs().max() < 1e-5
    assert flash.loss.item() == pytest.approx(sdpa.loss.item(), abs=1e-6)
    for one, other in zip(flash_gradients, sdpa_gradients, strict=True):
        assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize(
    "model_type",
    [
        *["llama", "mistral", "gemma2", "deepseek_v3"],
        pytest.param("opt", id="opt, which leaks by mask"),
        pytest.param("gpt_oss", id="gpt_oss, which leaks by mask"),
        pytest.param("afmoe", id="afmoe, which leaks by mask"),
    ],
)
def test_the_flash_path_isolates(served, model_type):
    model = tiny_model(model_type, "flash_attention_2")
    proof = check_isolation(
        model, implementation="flash_attention_2", context=a_context(padding_free=True)
    )
    assert proof.isolated, proof.why


def test_the_flash_path_does_not_isolate_rows_without_boundaries(served):
    model = tiny_model("llama", "flash_attention_2")
    assert not check_isolation(
        model, implementation="flash_attention_2", context=a_context(padding_free=False)
    ).isolated


def test_the_flash_path_does_not_isolate_linear_attention(served):
    model = tiny_model("qwen3_next", "flash_attention_2")
    proof = check_isolation(
        model, implementation="flash_attention_2", context=a_context(padding_free=True)
    )
    # transformers 5.22 raises for it; 5.16 leaks.
    assert not proof.isolated
    assert proof.code in ("model-raised", "packing-not-isolated")
