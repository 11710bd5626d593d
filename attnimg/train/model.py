"""Load the model of a run, with its precision, quantization, attention and adapter."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attnimg.config.class_rules import DEFAULT
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, bad_value, counted, out_of_memory_error
from attnimg.facts import DType
from attnimg.run_facts import RunContext
from attnimg.selection.model_config import LANGUAGE_PARTS
from attnimg.selection.model_types import (
    find_quantization,
    quantization_method,
    quantizations,
)
from attnimg.train.base_model import class_to_load, require_known_weights
from attnimg.train.changed_config import change_fields, require_tied, unfit_fields
from attnimg.train.distributed import rank
from attnimg.train.experts import (
    experts_implementation,
    has_fused_experts,
    quantized_experts,
    require_experts,
)
from attnimg.train.frozen import freeze_except, require_trained_weights
from attnimg.train.lora import add_adapter, freeze_other_parts, untrained_embeddings
from attnimg.train.model_files import (
    DOWNLOAD_AGAIN,
    bad_model,
    read_tensor_headers,
    unused_weights,
)
from attnimg.train.pickled_weights import advice_for_hub
from attnimg.train.saved_adapter import layer_keys, load_saved_weights, require_same_layers

if TYPE_CHECKING:
    import torch

# Names of modules with embeddings in the various model types.
EMBEDDING_NAMES = (
    "embed_tokens", "lm_head", "embed_in", "embed_out", "word_embeddings", "embeddings", "wte",
)  # fmt: skip


def load_model(
    config: Config,
    *,
    tokenizer: Any,
    implementation: str,
    context: RunContext,
    needs_dtype_cast: bool,
    replace_layers: Callable[[Any], None] | None = None,
    log: Callable[[str], None] | None = None,
) -> Any:
    """Load the weights, cast them, and add the adapter.

    Args:
        config: the validated run.
        tokenizer: as `load_tokenizer` returns it; the embeddings are resized to its tokens.
        implementation: transformers' name of the selected attention.
        context: how the run calls the model; decides the precision of the weights.
        needs_dtype_cast: whether the backend takes q, k, v in that precision only.
        replace_layers: replaces layers of the model before the adapter is added.
        log: prints a line, for example which weights are not loaded.

    Returns:
        A transformers model, or a PEFT model around it, in training precision.

    Raises:
        AttnimgError: the model can't be loaded, or lacks weights (bad-model), or a weight is NaN or
            inf (weights-not-finite).
    """
    _check_without_weights(config, log=log)
    model = load_base(
        config,
        tokens=len(tokenizer),
        implementation=implementation,
        dtype=context.dtype,
        log=log,
    )
    if keeps_float32(config, context=context, needs_dtype_cast=needs_dtype_cast):
        cast_embeddings_and_norms(model)
    if config.unfrozen_parameters:
        freeze_except(model, config.unfrozen_parameters, log=log)
    freeze_other_parts(model)
    require_trained_weights(model)
    if replace_layers is not None:
        replace_layers(model)
    if config.qat:
        from attnimg.train.qat import simulate_quantization  # imports transformers

        rounded = simulate_quantization(model, config.qat, dtype=context.dtype)
        if log is not None:
            log(f"qat: {rounded}")
    loaded = add_adapter(model, config) if config.adapter else model
    if config.adapter and config.lora_model_dir:
        load_saved_weights(loaded, config)
    move_to_gpu(loaded, config)
    return loaded


def load_base(
    config: Config,
    *,
    tokens: int,
    implementation: str,
    dtype: DType,
    log: Callable[[str], None] | None = None,
) -> Any:
    """Load the weights of base_model, and resize the embeddings; no adapter is added.

    Args:
        config: the validated run.
        tokens: the number of tokens in the tokenizer.
        implementation: transformers' name of an attention.
        dtype: the precision of the weights.
        log: prints a line.

    Raises:
        AttnimgError: as `load_model` does.
    """
    from transformers import set_seed

    # New embeddings and LoRA matrices are random: with the seed, two runs start with the same ones.
    set_seed(config.seed)
    model, loading = _from_pretrained(config, implementation=implementation, dtype=dtype)
    if loading is not None:
        _check_loaded(model, loading, config, log=log)
    require_tied(model, config.overrides_of_model_config)
    _keep_packing(model)
    _resize_embeddings(model, tokens, config)
    return model


def move_to_gpu(model: Any, config: Config) -> None:
    """Move a loaded model to the GPU, if there is one; quantized weights are there already."""
    if (device := _device(config)) is not None and not getattr(model, "is_quantized", False):
        model.to(device)


def _check_without_weights(config: Config, *, log: Callable[[str], None] | None) -> None:
    """Raise for keys that do not fit the model's class, before its weights are loaded.

    Raises:
        AttnimgError: code bad-value.
    """
    keys = (config.adapter, config.experts_implementation, config.unfrozen_parameters, config.qat)
    if not any(keys):
        return
    if (shape := load_without_weights(config)) is None:
        return
    require_experts(shape, config)
    if config.unfrozen_parameters:
        freeze_except(shape, config.unfrozen_parameters)
    if config.qat:
        from attnimg.train.qat import require_fitting_layers  # imports transformers

        require_fitting_layers(shape, config.qat)
    if config.quantize_moe_experts and log is not None and not has_fused_experts(shape):
        kind = type(shape).__name__
        log(f"warning: quantize_moe_experts has no effect: {kind} has no fused experts")
    if config.adapter:
        adapted = add_adapter(shape, config)
        if config.lora_model_dir and layer_keys(config):
            written = config.model_copy(update={"lora_model_dir": None})
            require_same_layers(adapted, add_adapter(load_without_weights(config), written), config)


def _check_loaded(
    model: Any, loading: Any, config: Config, *, log: Callable[[str], None] | None
) -> None:
    """Raise for missing, unknown or non-finite weights; print which weights are not part of it."""
    folder = _loaded_folder(config)
    require_known_weights(
        config, folder, json.loads((folder / "config.json").read_text(encoding="utf-8"))
    )
    missing = sorted(loading.get("missing_keys", ()))
    if missing and config.overrides_of_model_config:
        count = counted(len(missing), "weight")
        why = f"the model's files lack {count}, such as {', '.join(missing[:3])}"
        raise unfit_fields(config.overrides_of_model_config, why)
    if missing:
        raise bad_model(
            f"{config.base_model} lacks {counted(len(missing), 'weight')} of its architecture",
            why=f"missing {', '.join(missing[:3])}; they would start random",
            do=DOWNLOAD_AGAIN,
        )
    files = folder.glob("*.safetensors") if getattr(model, "is_quantized", False) else ()
    require_finite(model, name=str(config.base_model), files=sorted(files))
    unused = unused_weights(model, read_tensor_headers(folder), loading.get("unexpected_keys", ()))
    if unused and log is not None:
        log(
            f"warning: {counted(len(unused), 'weight')} of {config.base_model} will not be saved, "
            f"since {type(model).__name__} does not have them: {', '.join(unused[:3])}"
            + ("..." if len(unused) > 3 else "")
        )


def _keep_packing(model: Any) -> None:
    """Keep 4-bit weights as they are during evaluation on a CPU with AVX512-BF16.

    bitsandbytes repacks them there for a kernel without a backward pass, which it then uses in
    training too. Source: bitsandbytes 0.50.2, nn/modules.py, Linear4bit.forward;
    autograd/_functions.py, matmul_4bit (2026-11-27).
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def _resize_embeddings(model: Any, tokens: int, config: Config) -> None:
    """Resize the embeddings to the tokenizer's tokens, where they have fewer rows.

    Source: axolotl 0.19.0, loaders/model.py, _resize_token_embeddings (2026-11-27).

    Args:
        model: the loaded model.
        tokens: the number of tokens in the tokenizer.
        config: the validated run; it may round the rows up to 32, or remove unused ones.

    Raises:
        AttnimgError: an adapter could not be loaded again on the resized model (bad-value).
    """
    rows = len(model.get_input_embeddings().weight)
    needed = math.ceil(tokens / 32) * 32 if config.resize_token_embeddings_to_32x else tokens
    if needed == rows or (needed < rows and not config.shrink_embeddings):
        return
    if config.adapter and (missing := untrained_embeddings(model, config)):
        if needed > rows and not config.resize_token_embeddings_to_32x:
            # Rows that are not trained are not added: as they are not saved, the adapter could not
            # be loaded again.
            return
        key = "shrink_embeddings" if needed < rows else "resize_token_embeddings_to_32x"
        saved = ", ".join((*(config.lora_modules_to_save or ()), *missing))
        raise bad_value(
            key,
            f"{key} contradicts adapter: {config.adapter}",
            why=f"the embeddings have {rows} rows and would have {needed}; lora_modules_to_save "
            f"does not name {' and '.join(missing)}, so that the adapter is saved without them and "
            "does not fit the base model",
            do=f"remove {key}, or set lora_modules_to_save: [{saved}]",
        )
    model.resize_token_embeddings(needed, mean_resizing=bool(config.mean_resizing_embeddings))


def load_model_config(config: Config) -> Any:
    """Load the configuration of the model, and change the fields in model_config.

    Returns:
        A transformers configuration.

    Raises:
        AttnimgError: it can't be loaded (bad-model), or the installed transformers does not have
            the class that the config names (bad-value).
    """
    import transformers

    _find_model_class(config.model_type or DEFAULT)
    with _load_errors(config):
        found = transformers.AutoConfig.from_pretrained(
            config.base_model,
            revision=config.revision_of_model,
            trust_remote_code=bool(config.trust_remote_code),
        )
        stored, _ = type(found).get_config_dict(
            config.base_model, revision=config.revision_of_model
        )
    change_fields(found, config.overrides_of_model_config, stored=stored)
    return found


def load_without_weights(config: Config) -> Any:
    """Return the model on the meta device; None where its class can't be built without weights."""
    import torch

    model_config = load_model_config(config)
    loader = _find_model_class(class_to_load(config, model_config.to_dict()))
    trusted = bool(config.trust_remote_code)
    try:
        with torch.device("meta"):
            if hasattr(loader, "from_config"):
                return loader.from_config(model_config, trust_remote_code=trusted)
            return loader._from_config(model_config)
    except Exception:  # the model's own code may run here; loading the model reports its errors
        return None


def _from_pretrained(config: Config, *, implementation: str, dtype: DType) -> tuple[Any, Any]:
    """Load the model with from_pretrained; return it and transformers' report on its weights.

    With reinit_weights, the weights are random and there is no report.
    """
    import torch

    quantized = quantization_config(config, dtype=dtype)
    model_config = load_model_config(config)
    loader = _find_model_class(class_to_load(config, model_config.to_dict()))
    stored = use_stored_quantization(model_config, dtype=dtype)
    options = {"quantization_config": quantized} if quantized and stored != "kept" else {}
    weights_dtype = getattr(torch, _loading_dtype(config, dtype))
    if (experts := experts_implementation(config)) is not None:
        options["experts_implementation"] = experts
    if config.reinit_weights:
        attention = attention_by_part(model_config, implementation)
        return _random_model(config, loader, model_config, weights_dtype, attention, options), None
    with _load_errors(config), quantized_experts(config, quantized):
        model, loading = loader.from_pretrained(
            config.base_model,
            config=model_config,
            revision=config.revision_of_model,
            dtype=weights_dtype,
            attn_implementation=attention_by_part(model_config, implementation),
            trust_remote_code=bool(config.trust_remote_code),
            use_safetensors=True,
            device_map=_device_map() if quantized or stored == "kept" else None,
            output_loading_info=True,
            **options,
            **({"allow_all_kernels": True} if config.trust_remote_code else {}),
        )
    if stored is not None:
        cast_unquantized(model, weights_dtype)
    if stored == "dequantized":
        save_dequantized(model)
    return model, loading


def _random_model(
    config: Config,
    loader: Any,
    model_config: Any,
    dtype: torch.dtype,
    attention: str | dict[str, str],
    options: dict[str, Any],
) -> Any:
    """Return the model with the random weights that its class starts training with.

    Source: axolotl 0.19.0, loaders/model.py, _load_model_from_config (2026-11-27).
    """
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    arguments = {"dtype": dtype, "attn_implementation": attention, **options}
    trusted = bool(config.trust_remote_code)
    with _load_errors(config):
        if hasattr(loader, "from_config"):
            return loader.from_config(model_config, trust_remote_code=trusted, **arguments)
        return loader._from_config(model_config, **arguments)


def _loaded_folder(config: Config) -> Path:
    """Return the folder that a model was just loaded from."""
    from transformers.utils import cached_file

    found = cached_file(
        config.base_model, "config.json", revision=config.revision_of_model, local_files_only=True
    )
    return Path(found).parent


def find_class(key: str, name: str | None, *, default: str) -> Any:
    """Return the class of transformers that a config key names, or the default.

    config/class_rules.py has checked the name against the pinned transformers.

    Raises:
        AttnimgError: transformers has no such class with from_pretrained (code bad-value).
    """
    import transformers

    found = getattr(transformers, name or default, None)
    if not hasattr(found, "from_pretrained"):
        raise bad_value(
            key,
            f"transformers has no class {name} that can be loaded",
            why=f"found {key}: {name}; needed a class of transformers {transformers.__version__}",
            do=f"remove {key}: {default} finds the right one",
        )
    return found


def _find_model_class(name: str) -> Any:
    """Return the class of transformers that loads the model."""
    return find_class("model_type", name, default=DEFAULT)


def _device_map() -> dict[str, int | str]:
    """Return the device map for quantized weights, which can't be moved after loading."""
    import torch

    return {"": int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"}


@contextmanager
def _load_errors(config: Config) -> Iterator[None]:
    """Turn errors that transformers raises while loading into an AttnimgError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (
        OSError, ValueError, ImportError, LookupError, RuntimeError, TypeError, AttributeError,
        AssertionError, SafetensorError, StrictDataclassError,
    ) as error:  # fmt: skip
        if "loaded with `safetensors`" in str(error):  # of a model on the hub
            raise AttnimgError(
                f"{config.base_model} has no weights in safetensors",
                why="found pickled weights or none; a pickle can run code while it is loaded",
                do=advice_for_hub(str(config.base_model)),
                code="pickled-weights",
                key="base_model",
            ) from error
        if (refusal := out_of_memory_error(error)) is not None:
            raise refusal from error
        text = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if "ignore_mismatched_sizes" in str(error):  # the shapes are only in a log
            text = _other_shapes(config) or text
        if config.overrides_of_model_config and Path(config.base_model or "").is_dir():
            raise unfit_fields(config.overrides_of_model_config, "\n".join(text[:3])) from error
        raise bad_model(
            f"{config.base_model} could not be loaded",
            why="\n".join(text[:3]),
            do=_loading_advice(config, error),
        ) from error


def _other_shapes(config: Config) -> list[str]:
    """Return a line on each weight that has another shape in the files than in the model."""
    shape = load_without_weights(config)
    needed = {} if shape is None else {name: tuple(w.shape) for name, w in shape.named_parameters()}
    stored = read_tensor_headers(_loaded_folder(config))
    return [
        f"{name} has the shape {stored[name].shape} in the model's files, needed {wanted}"
        for name, wanted in needed.items()
        if name in stored and stored[name].shape != wanted
    ]


def _loading_advice(config: Config, error: Exception) -> str:
    """Return advice on an error; only missing or damaged files have to be downloaded again.

    Source: transformers 5.22.2, models/auto/auto_factory.py, configuration_auto.py and
    dynamic_module_utils.py, the errors they raise (2026-11-27)
    """
    from safetensors import SafetensorError

    text = str(error)
    if "trust_remote_code" in text and not config.trust_remote_code:
        return "set trust_remote_code: true, since the model has its own code"
    if isinstance(error, ImportError):
        return "install the packages that it names"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return "choose a model whose model_type the installed transformers has, or upgrade it"
    if not Path(config.base_model or "").expanduser().is_dir():
        return (
            "check base_model; without network it must be a folder, or a hub name "
            "that is already in the cache"
        )
    if isinstance(error, OSError | SafetensorError):
        return DOWNLOAD_AGAIN
    return "correct config.json to fit the weights, or point base_model at another folder"


def require_finite(model: Any, *, name: str, files: Iterable[Path]) -> None:
    """Raise if a weight is NaN or infinite; the first process checks for all.

    Args:
        model: the loaded model, without an adapter.
        name: the folder or name that it was loaded from.
        files: safetensors to check as well, for a model that was quantized while it was loaded:
            bitsandbytes turns NaN into a finite number.

    Raises:
        AttnimgError: code weights-not-finite, with the first such tensor and their number.
    """
    # Where weights are sharded, other processes may have memory that is not filled yet.
    if rank() != 0:
        return
    bad = [label for label, tensor in model.named_parameters() if not _is_finite(tensor.detach())]
    bad += [label for label, tensor in _read_tensors(files) if not _is_finite(tensor)]
    if not bad:
        return
    more = f" and {counted(len(bad) - 1, 'more tensor')}" if len(bad) > 1 else ""
    raise AttnimgError(
        f"{name} has weights that are NaN or infinite",
        why=f"found {bad[0]}{more}; needed finite numbers",
        do="use an earlier checkpoint, or download the model again; with fp16: true set bf16: true "
        "instead, since weights above 65504 are infinite in float16",
        code="weights-not-finite",
        key="base_model",
    )


def _read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors of safetensors files, one at a time."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for label in tensors.keys():  # noqa: SIM118  it has no __iter__
                yield label, tensors.get_tensor(label)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are finite, without a copy as large as the tensor."""
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # float8 has no comparisons
        return bool(tensor.float().isfinite().all())
    low, high = tensor.aminmax()
    return bool((low.isfinite() & high.isfinite()).item())


def _loading_dtype(config: Config, dtype: DType) -> DType:
    """Return the precision that the weights are loaded in.

    float16 has too few exponent bits for the weights of full fine-tuning: they stay float32, and
    autocast computes in float16. The frozen weights of a model with an adapter may be float16.
    """
    if dtype == "float16" and not config.adapter:
        return "float32"
    return dtype


def keeps_float32(config: Config, *, context: RunContext, needs_dtype_cast: bool) -> bool:
    """Return whether embeddings and norms stay float32 while other weights are bfloat16.

    Without autocast, a float32 norm would pass float32 values to a bfloat16 layer.
    """
    plain = not needs_dtype_cast and not config.adapter and not config.fsdp
    return context.autocast == "bfloat16" and plain


def cast_embeddings_and_norms(model: Any) -> None:
    """Cast embeddings and norms of `model` to float32, in place.

    Their loaded dtypes, by name, are kept in `model.attnimg_loaded_dtypes` for
    `restore_loaded_dtypes`.
    """
    import torch

    before = _floating_dtypes(model)
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        norm = "norm" in leaf.lower() or "ln" in re.split(r"[_\d]", leaf)
        if norm or leaf in EMBEDDING_NAMES:
            module.to(torch.float32)
    after = _floating_dtypes(model)
    model.attnimg_loaded_dtypes = {k: dtype for k, dtype in before.items() if after[k] != dtype}


def _floating_dtypes(model: Any) -> dict[str, torch.dtype]:
    """Return the dtype of each floating-point parameter and buffer."""
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: weight.dtype for name, weight in weights.items() if weight.is_floating_point()}


def attention_by_part(model_config: Any, implementation: str) -> str | dict[str, str]:
    """Return the implementation for from_pretrained that changes only the language model.

    The other parts keep the default of transformers: the backend was neither selected nor proven
    for their layers, and their classes may not support it.

    Args:
        model_config: a transformers configuration.
        implementation: transformers' name of an attention.
    """
    text = model_config.get_text_config(decoder=True)
    named = [name for name in model_config.sub_configs if getattr(model_config, name, None) is text]
    if text is model_config or not named:
        return implementation
    return {"": implementation, **dict.fromkeys(named, implementation)}


def quantization_config(config: Config, *, dtype: DType) -> Any:
    """Return the bitsandbytes config of a run; None where weights are loaded as they are.

    Args:
        config: the validated run; adapter: qlora implies 4 bit.
        dtype: the precision that 4-bit weights are multiplied in.
    """
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if config.load_in_4bit or config.adapter == "qlora":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            **{
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": dtype,
                # FSDP shards tensors of one dtype only, so packed weights have that of the others.
                "bnb_4bit_quant_storage": dtype if config.fsdp else "uint8",
                **(config.bnb_config_kwargs or {}),
            },
        )
    return None


def use_stored_quantization(
    model_config: Any, *, dtype: DType
) -> Literal["dequantized", "kept", "refused"] | None:
    """Make transformers load a checkpoint by its own quantization_config.

    A quantization_config passed to from_pretrained would replace its list of layers that are not
    quantized.

    Args:
        model_config: the transformers configuration to load with; changed in place.
        dtype: the run's precision.

    Returns:
        `loaded` of its row in attnimg/data/quantizations.toml; None if it is not quantized.
    """
    found = find_quantization(model_config.to_dict())
    # transformers removes it from the saved config at the top level only, and raises on an empty
    # one.
    for part in (model_config, *(getattr(model_config, name, None) for name in LANGUAGE_PARTS)):
        for key in ("quantization_config", "compression_config"):
            if getattr(part, key, None) is not None:
                delattr(part, key)
    if found is None:
        return None
    method = quantization_method(found)
    loaded = quantizations()[method].loaded
    changes: dict[str, Any] = {"dequantize": True} if loaded == "dequantized" else {}
    if method == "bitsandbytes_4bit":
        changes["bnb_4bit_compute_dtype"] = dtype
    model_config.quantization_config = {**found, **changes}
    return loaded


def save_dequantized(model: Any) -> None:
    """Make a dequantized model save its weights as they are.

    transformers saves with the reverse of the conversion at loading, which rounds the weights to
    float8 again. As config.json has no quantization_config, they would be loaded without scales.
    Source: transformers 5.22.2, core_model_loading.py, revert_weight_conversion;
    finegrained_fp8.py, Fp8Dequantize.reverse_op (2026-11-27).

    Args:
        model: the loaded model; it then saves weights under the names of its class.
    """
    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions


def cast_unquantized(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights that are not quantized in a quantized checkpoint to the requested dtype.

    Args:
        model: the loaded model; weights that its class keeps in float32 are not cast.
        dtype: the requested dtype.
    """
    import torch

    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    patterns = [re.escape(name).replace(r"\*", r"\d+") for name in kept]
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.element_size() == 1:
            continue
        if not any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in patterns):
            weight.data = weight.data.to(dtype)


def _device(config: Config) -> torch.device | None:
    """Return the GPU to move a loaded model to; None without a GPU, or if it is sharded later.

    from_pretrained leaves it on the CPU, where the check of its packing could not run the kernels.
    """
    import torch

    sharded = config.fsdp or config.fsdp_config or config.deepspeed
    if sharded or not torch.cuda.is_available():
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
