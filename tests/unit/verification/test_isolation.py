"""The isolation proof: it passes where documents are apart and fails wherever they are not."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from run_facts import a_context
from tiny_models import tiny_model

from attnimg.errors import AttnimgError
from attnimg.verification.isolation import IsolationProof, check_isolation, require_isolation

BY_MASK = [
    *("llama", "mistral", "qwen3", "gemma3_text", "phi3"),
    *("gpt2", "mixtral", "deepseek_v3", "olmo2", "stablelm"),
]
ISOLATED = [
    *(
        (model_type, implementation)
        for model_type in BY_MASK
        for implementation in ("eager", "sdpa")
    ),
    ("gemma2", "eager"),
]
LEAKING = [
    ("gpt_oss", "eager"),
    ("falcon", "eager"),
    ("falcon", "sdpa"),
    ("bloom", "eager"),
    ("opt", "eager"),
    ("opt", "sdpa"),
    ("mpt", "eager"),
    ("afmoe", "sdpa"),
    ("mamba2", "eager"),
    ("jamba", "sdpa"),
    ("qwen3_next", "sdpa"),
]
# Linear-attention models say once, at the first forward, that they run without their kernels.
pytestmark = pytest.mark.filterwarnings("ignore:.*is falling back to its reference PyTorch")


def names(pairs):
    return [pytest.param(*pair, id=" on ".join(pair)) for pair in pairs]


def change_in_second_document(model):
    """Change the first document of a row and tell how far the second one's logits move."""
    draw = torch.Generator().manual_seed(5)
    first, other, second = (torch.randint(3, 128, (n,), generator=draw) for n in (13, 13, 21))
    positions = torch.cat([torch.arange(13), torch.arange(21)])[None]
    with torch.no_grad():
        logits = [
            model(
                input_ids=torch.cat([document, second])[None],
                position_ids=positions,
                use_cache=False,
            ).logits[0, 13:]
            for document in (first, other)
        ]
    return (logits[0] - logits[1]).abs().max().item()


class OncePerForward(torch.autograd.Function):
    """Return its input; a second backward pass through one forward raises, as kernels may."""

    @staticmethod
    def forward(ctx, x):
        ctx.left = 1
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if not ctx.left:
            raise RuntimeError("this kernel can go backward once")
        ctx.left -= 1
        return grad


def test_a_kernel_that_goes_backward_once_for_each_forward_is_right():
    model = tiny_model("llama", "sdpa")
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda _m, _i, output: (OncePerForward.apply(output[0]), *output[1:])
        )
    proof = check_isolation(model, implementation="sdpa", context=a_context())
    assert proof.isolated, proof.why


@pytest.mark.parametrize(
    ("share", "isolated"),
    [
        pytest.param(2e-8, True, id="less than a rounding of float32"),
        pytest.param(1e-4, False, id="a leak of a ten-thousandth"),
    ],
)
def test_a_rounding_is_no_leak_and_a_small_leak_is_one(share, isolated):
    model = tiny_model("llama", "sdpa")

    def mix(_module, _inputs, output):
        return output + share * output.mean(1, keepdim=True)

    model.model.layers[0].register_forward_hook(mix)
    proof = check_isolation(model, implementation="sdpa", context=a_context(rows=1))
    assert proof.leaked_gradient > 0
    assert proof.isolated is isolated, proof.why


def test_full_memory_is_not_called_an_error_of_the_model():
    model = tiny_model("llama", "sdpa")
    model.model.embed_tokens.register_forward_hook(lambda *_: torch.empty(1 << 60))
    with pytest.raises(AttnimgError) as caught:
        check_isolation(model, implementation="sdpa", context=a_context())
    assert (caught.value.code, caught.value.exit_code) == ("out-of-memory", 1)


def test_what_the_model_raised_is_told_and_not_called_a_leak():
    model = tiny_model("llama", "sdpa")

    def fail(_module, _inputs):
        raise KeyError("no table for that")

    model.model.layers[1].register_forward_pre_hook(fail)
    proof = check_isolation(model, implementation="sdpa", context=a_context())
    with pytest.raises(AttnimgError) as caught:
        require_isolation(proof)
    assert (caught.value.code, caught.value.exit_code) == ("model-raised", 1)
    assert "KeyError: 'no table for that'" in caught.value.why
    assert "does not keep" not in str(caught.value)


@pytest.mark.parametrize("padding_free", [True, False], ids=["one row", "rows by mask"])
@pytest.mark.parametrize(("model_type", "implementation"), names(ISOLATED))
def test_isolated(model_type, implementation, padding_free):
    model = tiny_model(model_type, implementation).eval()
    assert change_in_second_document(model) < 1e-5
    proof = check_isolation(
        model, implementation=implementation, context=a_context(padding_free=padding_free)
    )
    assert proof.isolated, proof.why
    assert proof.leaked_gradient == 0.0
    assert proof.own_gradient > 1e-3
    assert proof.logits_error < 1e-5
    require_isolation(proof)


@pytest.mark.parametrize("padding_free", [True, False], ids=["one row", "rows by mask"])
@pytest.mark.parametrize(("model_type", "implementation"), names(LEAKING))
def test_not_isolated(model_type, implementation, padding_free):
    model = tiny_model(model_type, implementation).eval()
    assert change_in_second_document(model) > 1e-2
    proof = check_isolation(
        model, implementation=implementation, context=a_context(padding_free=padding_free)
    )
    assert not proof.isolated
    with pytest.raises(AttnimgError) as caught:
        require_isolation(proof)
    assert model_type in caught.value.what
    assert implementation in caught.value.what
    assert proof.why in caught.value.why
    # Its convolution raises where it is given the bounds that it can't follow.
    raised = (model_type, padding_free) == ("qwen3_next", True)
    assert caught.value.code == ("model-raised" if raised else "packing-not-isolated")
    assert caught.value.key == "sample_packing"
    assert caught.value.exit_code == 1


def test_qwen3_next_in_one_row_fails_with_its_own_words():
    model = tiny_model("qwen3_next", "sdpa")
    proof = check_isolation(model, implementation="sdpa", context=a_context(padding_free=True))
    assert "can't keep packed sequences apart" in proof.why
    assert proof.logits_error is None


def test_a_wrong_position_shows_in_the_logits_even_where_nothing_leaks():
    # Transformers 5.22.2 counts llama4's chunks from the start of the row, not of the document.
    model = tiny_model("llama4_text", "sdpa")
    proof = check_isolation(model, implementation="sdpa", context=a_context(padding_free=False))
    assert not proof.isolated
    assert proof.leaked_gradient == 0.0
    assert proof.logits_error > 0.1


@pytest.fixture
def linear_attention_kernels(monkeypatch):
    """Stand in for causal-conv1d, which follows seq_idx, and flash-linear-attention, cu_seqlens.

    Both need a GPU; these call transformers' own reference document by document.
    """
    from transformers.models.qwen3_next import modeling_qwen3_next as code

    convolve, scan = code.causal_conv1d_fn, code.torch_chunk_gated_delta_rule

    def causal_conv1d_fn(x, weight, bias=None, activation=None, seq_idx=None, **_):
        if seq_idx is None:
            return convolve(x, weight, bias, activation=activation)
        _, sizes = seq_idx[0].unique_consecutive(return_counts=True)
        parts = x.split(sizes.tolist(), -1)
        return torch.cat([convolve(x, weight, bias, activation=activation) for x in parts], -1)

    def chunk_gated_delta_rule(query, key, value, *, g, beta, cu_seqlens=None, **_):
        sizes = cu_seqlens.diff().tolist() if cu_seqlens is not None else query.shape[1]
        parts = zip(*(x.split(sizes, 1) for x in (query, key, value, g, beta)), strict=True)
        outputs = [
            scan(q, k, v, g=g, beta=b, use_qk_l2norm_in_kernel=True)[0] for q, k, v, g, b in parts
        ]
        return torch.cat(outputs, 1), None

    monkeypatch.setattr(code, "causal_conv1d_fn", causal_conv1d_fn)
    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", chunk_gated_delta_rule)


@pytest.mark.parametrize("seq_idx", [True, False])
def test_linear_attention_is_isolated_with_seq_idx_alone(linear_attention_kernels, seq_idx):
    # sdpa_math takes one row with its bounds; here sdpa gets the same row under a mask.
    model = tiny_model("qwen3_next", "sdpa")
    context = a_context(padding_free=True, seq_idx=seq_idx)
    proof = check_isolation(model, implementation="sdpa", context=context)
    assert proof.isolated is seq_idx, proof.why


def without_restart(kwargs):
    shape = kwargs["input_ids"].shape
    return {**kwargs, "position_ids": torch.arange(shape[1]).expand(shape)}


def without_positions(kwargs):
    return {name: x for name, x in kwargs.items() if name != "position_ids"}


def with_mask(kwargs):
    return {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}


def with_cache(kwargs):
    return {**kwargs, "use_cache": True}


def one_late(kwargs):
    """Make every document but the first begin one token late."""
    positions = kwargs["position_ids"].clone()
    starts = positions.roll(1, -1) > positions
    starts[:, 0] = False
    positions[starts] = positions.roll(1, -1)[starts] + 1
    moved = positions.roll(-1, -1)
    moved[starts.roll(-1, -1)] = positions[starts]
    return {**kwargs, "position_ids": positions}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("padding_free", [True, False], ids=["one row", "rows by mask"])
@pytest.mark.parametrize(
    "break_layout", [without_restart, without_positions, with_mask, with_cache, one_late]
)
def test_a_broken_layout_is_caught(model_type, padding_free, break_layout):
    model = tiny_model(model_type, "sdpa")

    def spoil(_module, args, kwargs):
        packed = kwargs["input_ids"].shape[1] > 21
        return args, break_layout(kwargs) if packed else kwargs

    hook = model.register_forward_pre_hook(spoil, with_kwargs=True)
    assert not check_isolation(
        model, implementation="sdpa", context=a_context(padding_free=padding_free)
    ).isolated
    hook.remove()
    assert check_isolation(
        model, implementation="sdpa", context=a_context(padding_free=padding_free)
    ).isolated


def test_absolute_positions_that_do_not_start_at_zero_are_caught_by_the_logits():
    model = tiny_model("gpt2", "sdpa")

    def shift(_module, args, kwargs):
        return args, {
            **kwargs,
            "position_ids": kwargs["position_ids"] + (kwargs["input_ids"].shape[1] > 21),
        }

    model.register_forward_pre_hook(shift, with_kwargs=True)
    proof = check_isolation(model, implementation="sdpa", context=a_context(padding_free=False))
    assert proof.leaked_gradient == 0.0
    assert not proof.isolated


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lambda x: x * float("nan"), "not finite", id="NaN logits"),
        pytest.param(
            lambda x: x.detach().requires_grad_(),
            "no gradient on the document itself",
            id="a cut backward pass",
        ),
    ],
)
def test_a_proof_needs_numbers_it_can_trust(spoil, words):
    model = tiny_model("llama", "sdpa")
    model.lm_head.register_forward_hook(lambda _m, _i, output: spoil(output))
    proof = check_isolation(model, implementation="sdpa", context=a_context(padding_free=False))
    assert not proof.isolated
    assert words in proof.why
    json.loads(json.dumps(dataclasses.asdict(proof), allow_nan=False))


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        pytest.param("float32", "bfloat16", id="float32 under bfloat16"),
        pytest.param("float32", "float16", id="float32 under float16"),
        pytest.param("bfloat16", None, id="bfloat16"),
        pytest.param("bfloat16", "bfloat16", id="bfloat16 under bfloat16"),
        pytest.param("float16", None, id="float16"),
        pytest.param("float16", "float16", id="float16 under float16"),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_low_precision_is_judged_by_its_own_measure(model_type, dtype, autocast):
    model = tiny_model(model_type, "sdpa").to(getattr(torch, dtype))
    proof = check_isolation(
        model, implementation="sdpa", context=a_context(padding_free=False, autocast=autocast)
    )
    assert proof.isolated, proof.why
    assert proof.own_gradient > 0
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: (args, without_restart(kwargs)), with_kwargs=True
    )
    assert not check_isolation(
        model, implementation="sdpa", context=a_context(padding_free=False, autocast=autocast)
    ).isolated


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"max_position_embeddings": 16}, id="fewer positions than the usual documents"
        ),
        pytest.param({"vocab_size": 4}, id="a vocabulary of one ordinary token"),
        pytest.param({"eos_token_id": [2, 3, 4]}, id="several end tokens"),
        pytest.param({"attention_dropout": 0.5}, id="dropout"),
    ],
)
def test_odd_configs_are_judged_too(changes):
    model = tiny_model("llama", "sdpa", **changes)
    assert check_isolation(
        model, implementation="sdpa", context=a_context(padding_free=False)
    ).isolated


def lora(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.5))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return adapted


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def frozen(model):
    return model.requires_grad_(False)


@pytest.mark.parametrize("wrap", [lora, checkpointed, frozen])
@pytest.mark.parametrize("padding_free", [True, False], ids=["one row", "rows by mask"])
def test_a_model_as_training_has_it_is_judged_right(wrap, padding_free):
    model = wrap(tiny_model("llama", "sdpa"))
    proof = check_isolation(
        model, implementation="sdpa", context=a_context(padding_free=padding_free)
    )
    assert proof.isolated, proof.why
    leaking = wrap(tiny_model("opt", "sdpa"))
    assert not check_isolation(
        leaking, implementation="sdpa", context=a_context(padding_free=padding_free)
    ).isolated


@pytest.mark.parametrize("padding_free", [True, False], ids=["one row", "rows by mask"])
@pytest.mark.parametrize(
    ("model_type", "isolated"),
    [
        pytest.param("llama", True, id="llama is isolated"),
        pytest.param("opt", False, id="opt leaks"),
    ],
)
def test_a_qlora_model_is_judged_right(model_type, isolated, padding_free, tmp_path):
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Blocks of 64 weights are quantized together.
    tiny_model(model_type, "sdpa", intermediate_size=128, ffn_dim=128).save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=four_bit, attn_implementation="sdpa"
    )
    model = lora(prepare_model_for_kbit_training(model)).train()
    # In evaluation mode bitsandbytes repacks 4-bit weights for a kernel that can't train.
    before = [weight.detach().clone() for weight in model.parameters()]
    proof = check_isolation(
        model, implementation="sdpa", context=a_context(padding_free=padding_free)
    )
    assert proof.isolated is isolated, proof.why
    assert proof.logits_error is not None, proof.why
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("model_type", "wrap", "autocast"),
    [
        pytest.param("llama", None, None, id="llama"),
        pytest.param("qwen3_next", None, None, id="qwen3_next"),
        pytest.param("llama", None, "bfloat16", id="under autocast"),
        pytest.param("llama", lambda x: lora(checkpointed(x)), "bfloat16", id="as LoRA has it"),
    ],
)
def test_the_model_is_left_as_it_was(model_type, wrap, autocast):
    model = tiny_model(model_type, "sdpa")
    model = wrap(model) if wrap else model
    ids = torch.randint(3, 128, (1, 9))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.get_input_embeddings().eval()
    use_cache = model.config.use_cache

    def state():
        return (
            [module.training for module in model.modules()],
            [len(module._forward_hooks) for module in model.modules()],
            [weight.requires_grad for weight in model.parameters()],
            model.config.use_cache == use_cache,
            torch.is_grad_enabled(),
            torch.get_rng_state().tolist(),
        )

    before = state()
    weights = [weight.detach().clone() for weight in model.parameters()]
    gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    context = a_context(padding_free=True, autocast=autocast)
    check_isolation(model, implementation="sdpa", context=context)
    assert state() == before
    assert all(map(torch.equal, weights, model.parameters()))
    kept = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(map(torch.equal, gradients, kept))


def test_the_error_says_what_was_found_and_needed_and_what_to_do():
    proof = IsolationProof(
        model_type="opt",
        backend="sdpa",
        context=a_context(),
        isolated=False,
        code="packing-not-isolated",
        why="logits differ by 2.2",
    )
    with pytest.raises(AttnimgError) as caught:
        require_isolation(proof)
    assert str(caught.value) == (
        "attnimg: opt on sdpa does not isolate packed documents\n"
        "  why: logits differ by 2.2\n"
        "       needed: the same logits for a document packed and alone, no gradient between "
        "documents\n"
        "  do:  set sample_packing: false, or set attn_implementation: flash_attention_2"
        " (its kernels get document boundaries)"
    )
