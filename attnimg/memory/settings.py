"""Read what the memory of a run depends on: precision, batches, adapter, attention."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from attnimg.config.schema import Config, offloading_mode
from attnimg.facts import Backend, Machine
from attnimg.memory.architecture import Architecture, Linear
from attnimg.run_facts import Problem

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# PEFT keeps the matrices of an adapter in float32 beside a base model in 16 bits.
# Source: peft 0.21.2, tuners/tuners_utils.py, cast_adapter_dtype (2026-11-27).
ADAPTER_BYTES = 4
# Keys that change weights or layers in ways that the forecast does not know.
_UNKNOWN = (
    "unfrozen_parameters", "lora_target_parameters", "lora_rank_pattern",
    "peft_layers_to_transform", "quantize_moe_experts", "model_type", "model_quantization_config",
    "batch_flattening", "rl", "lora_model_dir", "optim_args", "use_kernels", "qat",
)  # fmt: skip
EMBEDDINGS = ("embed_tokens", "lm_head")
# The largest size of a batch's logits in float32 for which a run keeps them. A backward pass needs
# three to four such tensors, as the comparison of the loss before the first step does.
SMALL_LOGITS = 128 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """What the memory of a run depends on.

    Attributes:
        rows: rows of a training batch.
        eval_rows: rows of an evaluation batch; 0 without evaluation.
        length: tokens of a row.
        compute: bytes per element of the inputs of matrix products.
        hidden: bytes per element of the hidden states between layers.
        autocast: whether torch.autocast casts the inputs of linear layers.
        weight: bytes per weight of linear layers.
        embedding: bytes per weight of embeddings and norms.
        adapter: whether an adapter is trained instead of all weights.
        bits: bits per frozen weight of linear layers: 4, 8, or 0 if not quantized.
        nested: whether the scales of 4-bit weights are quantized too.
        rank: rank of the adapter.
        dora: whether the adapter is a DoRA.
        dropout: whether the adapter has dropout.
        targets: names of the layers with an adapter, or a regular expression; None for all.
        saved: names of the modules that are trained as a whole beside an adapter.
        optimizer: name of the optimizer.
        accumulates: whether gradients are kept over several batches.
        checkpointing: whether activations are computed again in the backward pass.
        offloads: whether the inputs of layers are moved to CPU memory.
        cpu: whether the run is on a CPU.
        masked: whether attention gets a mask, for which keys and values are repeated.
        eager: whether attention stores its scores for the backward pass.
        keeps_logits: whether the loss is computed from the model's own logits.
        processes: processes that train together.
    """

    rows: int
    eval_rows: int
    length: int
    compute: int
    hidden: int
    autocast: bool
    weight: int
    embedding: int
    adapter: bool
    bits: Literal[0, 4, 8]
    nested: bool
    rank: int
    dora: bool
    dropout: bool
    targets: tuple[str, ...] | str | None
    saved: tuple[str, ...]
    optimizer: str
    accumulates: bool
    checkpointing: bool
    offloads: bool
    cpu: bool
    masked: bool
    eager: bool
    keeps_logits: bool
    processes: int = 1

    @property
    def casts(self) -> bool:
        """Return whether a linear layer makes a copy of its input in the run's precision."""
        return self.autocast and self.hidden != self.compute

    def adapts(self, linear: Linear) -> bool:
        """Return whether a linear layer gets an adapter, by PEFT's rule."""
        if not self.adapter:
            return False
        if self.targets is None:
            return True
        name = f"model.layers.0.{linear.name}"
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.targets)

    @property
    def adapts_experts(self) -> bool:
        """Return whether the targets of an adapter may be parts of experts."""
        text = self.targets if isinstance(self.targets, str) else " ".join(self.targets or ())
        return self.targets is None or re.search(r"gate|up|down|expert|w[123]", text) is not None

    def saves(self, name: str) -> bool:
        """Return whether an embedding is trained as a whole beside an adapter."""
        return any(entry == name or entry.endswith(f".{name}") for entry in self.saved)


def read_settings(
    config: Config,
    problem: Problem,
    machine: Machine,
    backend: Backend,
    *,
    vocabulary: int,
    processes: int = 1,
    small_logits: int = SMALL_LOGITS,
) -> RunSettings | str:
    """Return what a run's memory depends on, or why it is not known.

    Args:
        config: the validated run.
        problem: what its attention computes.
        machine: the machine of the run.
        backend: the chosen backend.
        vocabulary: size of the model's vocabulary.
        processes: processes that train together.
        small_logits: bytes of a batch's float32 logits up to which a run keeps them.
    """
    for key in ("fsdp", "fsdp_config", "deepspeed"):
        if getattr(config, key):
            return f"{key} shards the weights, which the forecast does not know"
    for key in _UNKNOWN:
        if getattr(config, key):
            return f"the forecast does not know {key}"
    if backend.name == "sdpa_math":
        return "sdpa_math keeps the scores of each document, and their lengths are not known"
    if problem.compiled:
        return "torch.compile fuses operations, so other activations are kept"
    dtype, adapter = problem.dtype, config.adapter is not None
    compute = BYTES[dtype]
    # Source: attnimg/train/model.py, _loading_dtype and _keeps_float32.
    weight = 4 if dtype == "float16" and not adapter else compute
    keeps = (
        dtype == "bfloat16" and problem.autocast and not adapter and not backend.needs_dtype_cast
    )
    embedding = 4 if keeps else weight
    bits: Literal[0, 4, 8] = 0
    if config.load_in_8bit:
        bits = 8
    elif config.load_in_4bit or config.adapter == "qlora":
        bits = 4
    targets: tuple[str, ...] | str | None = None
    if config.lora_target_modules and not config.lora_target_linear:
        found = config.lora_target_modules
        targets = found if isinstance(found, str) else tuple(found)
        targets = None if targets == "all-linear" else targets
        if any(re.search(r"\d", text) for text in ([found] if isinstance(found, str) else found)):
            return "the forecast does not know lora_target_modules of single layers"
    validates = bool(config.val_set_size or config.test_datasets) and config.eval_strategy != "no"
    packed = bool(config.sample_packing)
    return RunSettings(
        rows=config.micro_batch_size,
        eval_rows=(config.eval_batch_size or config.micro_batch_size) if validates else 0,
        length=config.sequence_len,
        compute=compute,
        hidden=embedding,
        autocast=problem.autocast,
        weight=weight,
        embedding=embedding,
        adapter=adapter,
        bits=bits,
        nested=(config.bnb_config_kwargs or {}).get("bnb_4bit_use_double_quant", True) is not False,
        rank=config.lora_r,
        dora=bool(config.peft_use_dora),
        dropout=config.lora_dropout > 0,
        targets=targets,
        saved=tuple(config.lora_modules_to_save or ()) if adapter else (),
        optimizer=config.optimizer,
        accumulates=config.gradient_accumulation_steps > 1,
        checkpointing=bool(config.gradient_checkpointing) or offloading_mode(config) is not None,
        offloads=offloading_mode(config) is not None and machine.arch.vendor != "cpu",
        cpu=machine.arch.vendor == "cpu",
        masked=packed and backend.packing == "mask",
        eager=backend.name == "eager",
        keeps_logits=keeps_logits(config, vocabulary, limit=small_logits),
        processes=processes,
    )


def keeps_logits(config: Config, vocabulary: int | None, *, limit: int = SMALL_LOGITS) -> bool:
    """Return whether a run computes its loss from the model's own logits, because they are small.

    It depends on nothing that a resumed run may find different, such as free memory.

    Args:
        config: the validated run.
        vocabulary: size of the model's vocabulary; None where it is not known.
        limit: bytes of the logits in float32.
    """
    if not vocabulary or config.fsdp or config.fsdp_config or config.deepspeed:
        return False
    rows = max(config.micro_batch_size, config.eval_batch_size or 0)
    return 4 * rows * config.sequence_len * vocabulary <= limit


def trains_head(model: Architecture, run: RunSettings) -> bool:
    """Return whether the output layer is trained."""
    tied = model.tied and run.saves("embed_tokens")
    return not run.adapter or run.saves("lm_head") or tied


def trained_weights(model: Architecture, run: RunSettings) -> list[tuple[int, int, int]]:
    """Return the trained weights as (tensors, weights of each, bytes of each weight).

    Args:
        model: the sizes of the model.
        run: the run.
    """
    found: list[tuple[int, int, int]] = []
    names = EMBEDDINGS[:1] if model.tied else EMBEDDINGS
    if run.adapter:
        for layer in model.layers:
            for linear in layer.linears:
                if run.adapts(linear):
                    found.append((layer.count, run.rank * linear.inputs, ADAPTER_BYTES))
                    found.append((layer.count, run.rank * linear.outputs, ADAPTER_BYTES))
                    if run.dora:
                        found.append((layer.count, linear.outputs, ADAPTER_BYTES))
        saved = [name for name in EMBEDDINGS if run.saves(name)]
        if saved:
            found.append((1 if model.tied else len(saved), model.embeddings, run.embedding))
        return found
    found.append((len(names), model.embeddings, run.embedding))
    for layer in model.layers:
        for linear in layer.linears:
            found.append((layer.count, linear.weights, run.weight))
            if linear.bias:
                found.append((layer.count, linear.outputs, run.weight))
        if layer.experts:
            each = layer.experts.count * layer.experts.size * model.hidden
            found += [(layer.count, 2 * each, run.weight), (layer.count, each, run.weight)]
            found.append((layer.count, layer.experts.count * model.hidden, run.weight))
        found.append((layer.count * layer.norms, model.hidden, run.embedding))
        if layer.qk_norm:
            found.append((layer.count * 2, layer.qk_norm // 2, run.embedding))
    found.append((1, model.hidden, run.embedding))
    return found
