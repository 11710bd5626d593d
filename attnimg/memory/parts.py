"""Count the bytes of weights, gradients and optimizer states.

Sources: bitsandbytes 0.50.2, functional.py, quantize_4bit, and optim/optimizer.py, init_state;
transformers 5.22.2, optimization.py, Adafactor, and trainer.py, create_optimizer; torch 2.13,
torch/optim; torchao's 8-bit and 4-bit AdamW have the same layout as bitsandbytes' in blocks of 256
and 128 (2026-11-27).
"""

from __future__ import annotations

from attnimg.memory.amounts import Amount, amount
from attnimg.memory.architecture import Architecture
from attnimg.memory.settings import RunSettings, trained_weights

# Weights of a 4-bit block, and scales of a block of scales.
_BLOCK, _NESTED = 64, 256
# Tensors with fewer weights have 32-bit states.
_SMALLEST_8BIT = 4096

# Optimizer -> bytes of states for each weight, where they do not depend on the weight's dtype.
_FIXED = {
    "paged_adamw": 8.0, "paged_adamw_32bit": 8.0, "lion_32bit": 4.0, "paged_lion_32bit": 4.0,
    "sgd": 0.0,
}  # fmt: skip
# Optimizer -> number of states in the weight's dtype.
_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1}
# Optimizer -> number of states, bits of each, weights per block, which has a 32-bit scale.
BLOCKWISE = {
    "adamw_8bit": (2, 8, 256), "adamw_bnb_8bit": (2, 8, 256), "paged_adamw_8bit": (2, 8, 256),
    "lion_8bit": (1, 8, 256), "paged_lion_8bit": (1, 8, 256), "adamw_torch_8bit": (2, 8, 256),
    "adamw_torch_4bit": (2, 4, 128),
}  # fmt: skip
OPTIMIZERS = (*_FIXED, *_STATES, *BLOCKWISE, "adafactor")


def frozen_linear_bytes(weights: int, run: RunSettings) -> int:
    """Return the bytes of frozen weights of linear layers, with the scales of quantized ones."""
    if run.bits == 8:
        return weights  # and a scale for each row, which is less than a thousandth
    if run.bits == 4:
        scales = weights / _BLOCK
        return int(weights / 2 + (scales * (1 + 4 / _NESTED) if run.nested else scales * 4))
    return weights * run.weight


def weight_bytes(model: Architecture, run: RunSettings) -> int:
    """Return the bytes of all weights, the adapter's included."""
    embeddings = model.embeddings * (1 if model.tied else 2) * run.embedding
    small = model.small_weights * run.embedding
    experts = model.expert_weights * run.weight  # bitsandbytes leaves fused experts as they are
    if not run.adapter:
        return embeddings + small + experts + model.linear_weights * run.weight
    trained = sum(count * size * each for count, size, each in trained_weights(model, run))
    return embeddings + small + experts + frozen_linear_bytes(model.linear_weights, run) + trained


def mapped_bytes(model: Architecture, run: RunSettings) -> int:
    """Return the bytes of weights that a CPU run maps from the model's file and does not train.

    Weights that are loaded without a change stay in the mapped file. All of its pages that were
    read are in memory, also the originals of weights that were quantized or cast.
    """
    quantized = model.linear_weights * run.weight if run.bits else 0
    cast = run.embedding != run.weight
    return quantized + (model.embeddings * (1 if model.tied else 2) * run.weight if cast else 0)


def gradient_bytes(model: Architecture, run: RunSettings) -> Amount:
    """Return the bytes of the gradients of all trained weights."""
    total = Amount()
    for count, size, each in trained_weights(model, run):
        total += amount([size * each]).times(count)
    return total


def optimizer_bytes(model: Architecture, run: RunSettings) -> Amount:
    """Return the bytes of the optimizer's states."""
    total = Amount()
    for count, size, each in trained_weights(model, run):
        states = [int(size * state) for state in _states(size, each, model, run)]
        total += amount(states).times(count)
    name = run.optimizer
    if name in BLOCKWISE and not name.startswith("adamw_torch") and _trains_embeddings(run):
        # transformers keeps the states of input embeddings in 32 bits with bitsandbytes.
        count, bits, block = BLOCKWISE[name]
        total += amount(count * [int(model.embeddings * (4 - bits / 8 - 4 / block))])
    return total


def _states(size: int, each: int, model: Architecture, run: RunSettings) -> list[float]:
    """Return the bytes of each state of a tensor, for each of its weights."""
    name = run.optimizer
    if name in _FIXED:
        return (2 if _FIXED[name] == 8 else 1) * [min(_FIXED[name], 4.0)]
    if name in _STATES:
        return _STATES[name] * [float(each)]
    if name in BLOCKWISE:
        count, bits, block = BLOCKWISE[name]
        return count * [4.0 if size < _SMALLEST_8BIT else bits / 8 + 4 / block]
    return [_adafactor(size, model) * each / size]


def _trains_embeddings(run: RunSettings) -> bool:
    return not run.adapter or run.saves("embed_tokens")


def _adafactor(size: int, model: Architecture) -> float:
    """Return the states of a weight: a row and a column of a matrix, or all of a vector."""
    if size < model.hidden * 2:
        return size
    return model.hidden + size / model.hidden
