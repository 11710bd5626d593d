"""Count the bytes that autograd keeps for the backward pass, layer by layer, and of the loss.

Each term is a tensor that an operation of transformers' Llama saves, in eager mode; a tensor that
two operations save counts once. T tokens of a batch, C bytes of the run's precision.
Sources: transformers 5.22.2, models/llama/modeling_llama.py, integrations/moe.py,
sdpa_attention.py; peft 0.21.2, tuners/lora/layer.py, bnb.py, dora.py; trl 1.16,
kernels/chunked_logprob.py; torch 2.13, derivatives.yaml (2026-11-27).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnimg.memory.amounts import Amount, amount
from attnimg.memory.architecture import Architecture, LayerShape, Linear
from attnimg.memory.settings import ADAPTER_BYTES, RunSettings, trains_head

# The tokens and vocabulary entries whose logits TRL's loss has in memory at once.
LOSS_TOKENS, LOSS_COLUMNS = 4096, 32768
# Float32 tensors of those logits in the backward and in the forward pass of the code for CPUs.
# Source: trl 1.16, kernels/chunked_logprob.py, _backward_tile and _forward_tile
# (2026-11-27).
_LOSS_TENSORS, _FORWARD_TENSORS = 7, 3
# Float32 tensors of the model's own logits in the backward pass: log-probabilities, two gradients.
# Source: attnimg/train/loss.py, _log_probs; torch 2.13, log_softmax and nll_loss.
_KEPT_TENSORS = 3
# Float32 tensors of the logits in the comparison of the loss: in the model's own loss, and in its
# tolerance. Source: attnimg/train/loss.py, loss_tolerance.
_CHECK_TENSORS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBytes:
    """The bytes of one layer.

    Attributes:
        kept: the tensors that autograd keeps from the forward to the backward pass.
        working: the most that the layer's backward pass needs in addition.
        input: the layer's input, which is all that checkpointing keeps.
    """

    kept: Amount
    working: Amount
    input: Amount


def layer_bytes(
    layer: LayerShape, model: Architecture, run: RunSettings, *, quadratic: int
) -> LayerBytes:
    """Return the bytes of one layer in a training step.

    Args:
        layer: the layer.
        model: the sizes of the model.
        run: the run.
        quadratic: bytes of its attention that grow with the square of the row length.
    """
    tokens, c = run.rows * run.length, run.compute
    group = layer.attention
    state = tokens * model.hidden * run.hidden
    trains_norms = not run.adapter
    # A norm keeps its input in float32, and the normalized input for the gradient of its weight.
    norm = [tokens * model.hidden * 4, *([state] if trains_norms else [])]
    kept = [*layer.norms * norm, *_inputs(layer.qkv, run, source=run.hidden)]
    if layer.qk_norm:
        for heads in (group.heads, group.kv_heads):
            size = tokens * heads * group.head_dim_qk
            kept += [size * 4, *([size * c] if trains_norms else [])]
    kv_heads = group.heads if run.masked or run.eager else group.kv_heads
    q = tokens * group.heads * group.head_dim_qk * c
    k, v = (tokens * kv_heads * size * c for size in (group.head_dim_qk, group.head_dim_v))
    out = tokens * group.heads * group.head_dim_v * c
    kept += [q, k, v, quadratic]
    if run.eager:
        kept += [] if run.adapter and not run.adapts(layer.out) else [out]
    else:
        kept += [out, tokens * group.heads * 4]
        # The input of o_proj is the attention's output, unless it is cast for the adapter.
        if run.adapter and run.adapts(layer.out):
            of_out = _inputs((layer.out,), run, source=c)
            kept += of_out[1:] if c == ADAPTER_BYTES and not run.dropout else of_out
    attention = [q, k, v, out, q, k, v, out, quadratic, quadratic]
    block, working = _experts(layer, model, run) if layer.experts else _dense(layer, run)
    most = max(attention, working, key=sum)
    dequantized: list[int] = []
    if run.bits:
        dequantized = [max(linear.weights for linear in layer.linears) * c]
    if run.dora:
        largest = max(layer.linears, key=lambda linear: linear.weights)
        dequantized = [largest.inputs**2 * ADAPTER_BYTES, *3 * [largest.weights * ADAPTER_BYTES]]
    return LayerBytes(
        kept=amount([*kept, *block]),
        working=amount([*most, state, state, *dequantized]),
        input=amount([state]),
    )


def _inputs(linears: tuple[Linear, ...], run: RunSettings, *, source: int) -> list[int]:
    """Return the inputs that linear layers with the same input keep, in bytes.

    Args:
        linears: the layers.
        run: the run.
        source: bytes of an element of their input.
    """
    tokens, width, c = run.rows * run.length, linears[0].inputs, run.compute
    if not run.adapter:
        copies = len(linears) if run.autocast and source != c else 1
        return copies * [tokens * width * c]
    adapted = [linear for linear in linears if run.adapts(linear)]
    whole = [tokens * width * source] if run.bits == 8 else []
    if not adapted:
        return whole
    element = c if run.autocast else ADAPTER_BYTES
    shared = source == element and not run.dropout and not run.autocast
    found = [] if shared else whole
    found += (1 if shared else len(adapted)) * [tokens * width * element]
    found += len(adapted) * [tokens * run.rank * element]
    if run.dropout:
        found += len(adapted) * [tokens * width]  # the masks
    if run.dora:
        found += [tokens * linear.outputs * element for linear in adapted for _ in range(2)]
    return found


def _dense(layer: LayerShape, run: RunSettings) -> tuple[list[int], list[int]]:
    """Return what a gated feed-forward block keeps, and what its backward pass needs."""
    assert layer.down is not None
    wide = run.rows * run.length * layer.size * run.compute
    inputs = _inputs(layer.gate_up, run, source=run.hidden)
    return [*inputs, wide, wide, wide, *_inputs((layer.down,), run, source=run.compute)], 2 * [wide]


def _experts(
    layer: LayerShape, model: Architecture, run: RunSettings
) -> tuple[list[int], list[int]]:
    """Return what a block of experts keeps, and what its backward pass needs."""
    assert layer.experts is not None
    tokens, experts = run.rows * run.length, layer.experts
    pairs = tokens * experts.used
    wide, states = pairs * experts.size * run.weight, pairs * model.hidden * run.weight
    kept = [tokens * (experts.count * 8 + experts.used * 24), 2 * wide, wide, states]
    if not run.adapter:
        kept += [tokens * model.hidden * run.compute, states, wide]
    return kept, [2 * wide, 2 * states]


def loss_bytes(model: Architecture, run: RunSettings) -> tuple[Amount, Amount]:
    """Return what the loss keeps, and what its backward pass needs beside the gradients."""
    tokens, c = run.rows * run.length, run.compute
    state = tokens * model.hidden
    rotary = tokens * model.layers[0].attention.head_dim_qk * run.hidden
    # The last norm, the hidden states that are scored, rotary embeddings and token numbers.
    kept = [state * 4, state * run.hidden, rotary, rotary, tokens * 24]
    kept += [] if run.adapter else [state * run.hidden]
    if run.keeps_logits:
        working = _KEPT_TENSORS * [tokens * model.vocabulary * 4]
        if run.embedding != c:
            # Autocast's copy of the output layer, and its gradient.
            working += (2 if trains_head(model, run) else 1) * [model.embeddings * c]
        return amount(kept), amount(working)
    rows, columns = min(tokens, LOSS_TOKENS), min(model.vocabulary, LOSS_COLUMNS)
    working = [rows * LOSS_COLUMNS * c, state * 4]
    working += [state * run.hidden] if run.hidden != 4 else []
    if run.cpu:
        working += _LOSS_TENSORS * [rows * columns * 4] + [rows * columns]
    if run.embedding != c:
        working.append(columns * model.hidden * c)
    if trains_head(model, run) and run.embedding != 4:
        # The gradient of the output layer is summed in float32 and cast at the end.
        working.append(model.embeddings * 4)
    return amount(kept), amount(working)


def untouched_bytes(model: Architecture, run: RunSettings, *, rows: int) -> int:
    """Return the bytes that the loss allocates and does not write, which take no memory on a CPU.

    The buffer for logits has LOSS_COLUMNS columns even if the vocabulary is smaller.

    Args:
        model: the sizes of the model.
        run: the run.
        rows: rows of the batch.
    """
    if run.keeps_logits:
        return 0
    tokens = min(rows * run.length, LOSS_TOKENS)
    return tokens * max(0, LOSS_COLUMNS - model.vocabulary) * run.compute


def evaluation_bytes(model: Architecture, run: RunSettings) -> Amount:
    """Return the bytes of an evaluation batch, for which autograd keeps nothing."""
    tokens, c = run.eval_rows * run.length, run.compute
    if not tokens:
        return amount([])
    wide = max((layer.experts.used if layer.experts else 1) * layer.size for layer in model.layers)
    rows, columns = min(tokens, LOSS_TOKENS), min(model.vocabulary, LOSS_COLUMNS)
    loss = [rows * LOSS_COLUMNS * c]
    if run.keeps_logits:
        logits = tokens * model.vocabulary
        loss = [logits * c, logits * 4, *([logits * 4] if c != 4 else [])]
    elif run.cpu:
        loss += [*_FORWARD_TENSORS * [rows * columns * 4], rows * columns]
    block = 3 * [tokens * wide * c]
    largest = max(linear.weights for layer in model.layers for linear in layer.linears)
    state = tokens * model.hidden * run.hidden
    dequantized = [largest * c] if run.bits else []
    return amount([state, state, state, *max(loss, block, key=sum), *dequantized])


def loss_check_bytes(model: Architecture, run: RunSettings) -> Amount:
    """Return the bytes that train/own_loss.py needs to compare the loss with the model's own.

    It runs forward and backward in eval mode, without checkpointing.
    """
    tokens = max(32, min(512, (128 << 20) // (4 * model.vocabulary), run.rows * run.length))
    of_check = replace(run, rows=1, length=tokens, dropout=False)
    total = amount([])
    for layer in model.layers:
        total += layer_bytes(layer, model, of_check, quadratic=0).kept.times(layer.count)
    logits = tokens * model.vocabulary
    head = [model.embeddings * 4] if run.embedding != 4 else []
    return total + amount([logits * run.compute, *_CHECK_TENSORS * [logits * 4], *head])
