"""Kernels of the hub: loaded when named, by what they export, and never with a traceback."""

from __future__ import annotations

import json

import pytest
from attention_cases import LAYER, draw, gradients, packed, plainly, same_document

from attnimg import application
from attnimg.backends import find_backend
from attnimg.backends._transformers import attention_function
from attnimg.errors import AttnimgError

SDPA = "torch.nn.functional.scaled_dot_product_attention"
SOURCES = {
    "dense": f"""
import torch
def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return {SDPA}(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)
""",
    "sage-style": f"""
import torch
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, **kwargs):
    assert tensor_layout == "HND" and not kwargs
    with torch.no_grad():
        return {SDPA}(q, k, v, is_causal=is_causal, scale=sm_scale, enable_gqa=True)
""",
    "interface": f"""
import torch
def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    out = {SDPA}(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None
""",
    "none": "def rms_norm(x): return x",
    "odd": "def attention(foo, bar): return foo",
    "raises": "raise OSError('libcudart.so.13: cannot open shared object file')",
    "asserts": "assert False",
    "syntax": "def broken(:",
}


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Serve a kernel of some source as org/<kind>."""

    def served(kind):
        variant = tmp_path / kind / "build" / "torch-cpu"
        variant.mkdir(parents=True)
        described = {
            "id": f"_{kind.replace('-', '_')}_{tmp_path.name}", "name": kind, "version": 1,
            "license": "Apache-2.0", "python-depends": [], "backend": {"type": "cpu"},
        }  # fmt: skip
        (variant / "metadata.json").write_text(json.dumps(described))
        (variant / "__init__.py").write_text(SOURCES[kind])
        # A name a test: what was loaded under one stays loaded.
        name = f"org/{kind}-{tmp_path.name}"
        monkeypatch.setenv("LOCAL_KERNELS", f"{name}={tmp_path / kind}")
        return name

    with application.restore_registries():
        yield served


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        pytest.param("dense", "", id="FlashAttention's dense entry"),
        pytest.param("dense", ":flash_attn_func", id="the same, named"),
        pytest.param("sage-style", "", id="SageAttention's entry"),
        pytest.param("sage-style", ":sageattn", id="the same, named"),
        pytest.param("interface", ":attend", id="transformers' own interface"),
    ],
)
def test_what_a_kernel_exports_is_called_as_it_wants(serve, kind, function):
    backend = find_backend(serve(kind) + function)
    q, k, v = draw(rows=2)
    found = attention_function(backend)(LAYER, q, k, v, None, scaling=0.4)[0]
    assert (found - plainly(q, k, v, scale=0.4)).abs().max() < 1e-5
    assert all(gradient.any() for gradient in gradients(found, (q, k, v)))


def test_a_sage_style_kernel_gets_one_document_at_a_time(serve):
    q, k, v = draw()
    attend = attention_function(find_backend(serve("sage-style")))
    found = attend(LAYER, q, k, v, None, scaling=0.4, **packed([6, 7]))[0]
    assert (found - plainly(q, k, v, seen=same_document([6, 7]), scale=0.4)).abs().max() < 1e-5


def test_a_dense_kernel_does_not_get_packed_rows(serve):
    attend = attention_function(find_backend(serve("dense")))
    with pytest.raises(AttnimgError) as caught:
        attend(LAYER, *draw(), None, scaling=0.4, **packed([6, 7]))
    assert caught.value.code == "packing-not-isolated"


@pytest.mark.parametrize(
    ("kind", "function", "code", "shown"),
    [
        pytest.param("none", "", "not-a-kernel", "found rms_norm", id="no attention"),
        pytest.param("dense", ":nope", "not-a-kernel", "flash_attn_func", id="no such function"),
        pytest.param("odd", ":attention", "not-a-kernel", "foo, bar", id="unknown arguments"),
        pytest.param("raises", "", "import-error", "libcudart.so.13", id="an import that fails"),
        pytest.param("asserts", "", "import-error", "AssertionError", id="one that asserts"),
        pytest.param("syntax", "", "import-error", "SyntaxError", id="one that is no Python"),
    ],
)
def test_a_kernel_that_can_not_be_used_is_an_error_of_three_parts(
    serve, kind, function, code, shown
):
    with pytest.raises(AttnimgError) as caught:
        application.load_and_register(find_backend(serve(kind) + function))
    assert caught.value.code == code
    assert caught.value.exit_code == 1
    assert shown in caught.value.why
    assert caught.value.do


def test_a_kernel_that_is_nowhere_is_an_error_and_no_traceback(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AttnimgError) as caught:
        application.load_and_register(find_backend("org/nowhere@abc123"))
    assert caught.value.exit_code == 1
    assert "org/nowhere" in caught.value.what


def test_a_publisher_the_hub_does_not_vouch_for_needs_trust(monkeypatch):
    import kernels

    def install_kernel(repo, **options):
        if not options["trust_remote_code"]:
            raise ValueError(f"{repo} is not from a trusted publisher")
        raise FileNotFoundError(repo)

    monkeypatch.setattr(kernels, "install_kernel", install_kernel)  # asks the hub: not here
    with pytest.raises(AttnimgError) as caught:
        application.load_and_register(find_backend("stranger/kernel"))
    assert caught.value.code == "untrusted-kernel"
    assert caught.value.key == "trust_remote_code"
    with pytest.raises(AttnimgError) as caught:
        application.load_and_register(find_backend("stranger/kernel"), trusted=True)
    assert caught.value.code == "import-error"


@pytest.mark.parametrize(
    ("path", "native"),
    [
        ("kernels-community/flash-attn2", True),
        ("kernels-community/flash-attn3@v1", True),
        ("kernels-community/flash-attn2:flash_attn_func", False),
        ("kernels-community/sage-attention", False),
        ("org/flash-attn", False),
    ],
)
def test_only_flash_paths_without_a_function_are_left_to_transformers(path, native):
    backend = find_backend(path)
    assert (backend.applied_as == path) == native
    assert (backend.load_function is None) == native
    assert find_backend(path) == backend
