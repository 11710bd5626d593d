"""Check the key qat, the simulation of a later quantization; see rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from attnimg.config.dataset_rules import Rule, bad_value
from attnimg.config.schema import Config, Qat, trains_preferences
from attnimg.facts import Finding

# axolotl's values of weight_dtype and activation_dtype -> the name that messages use.
# Source: axolotl 0.19.0, utils/schemas/quantization.py, validate_ao_dtype (2026-11-28)
_NAMES = {"fp8": "float8_e4m3fn", "float8": "float8_e4m3fn"}
QAT_DTYPES = ("int4", "int8", "float8_e4m3fn", *_NAMES, "nvfp4", "mxfp4", "ternary")
# The pairs that are simulated, as axolotl writes them: activation_dtype and weight_dtype.
IMPLEMENTED = ((None, "int4"), ("int8", "int4"))
# weight_dtype -> why it is not simulated.
# Source: axolotl 0.19.0, utils/quantization.py, prepare_model_for_qat, called with torchao 0.17.0,
# and utils/quantization_ternary.py; torchao 0.18.0, prototype/qat/mx.py, backward (2026-11-28)
_REFUSED = {
    "int8": "torchao has no fake quantizer for int8 weights; axolotl raises",
    "float8_e4m3fn": "its quantized layers need a GPU, so attnimg could not compare with them",
    "nvfp4": "torchao raises, as in axolotl: it has no fake quantizer for nvfp4 weights alone",
    "mxfp4": "torchao's prototype gives biases no gradient, so they would not be trained",
    "ternary": "axolotl's own layers for it are no part of torchao",
}
# Keys that contradict qat, and why.
_CONTRADICTIONS = {
    "adapter": "an adapter is added to weights that are rounded without it, so that the merged "
    "weights would be rounded in another way",
    "load_in_4bit": "weights in 4 bits are not trained",
    "load_in_8bit": "weights in 8 bits are not trained",
    "model_quantization_config": "qat starts from weights that are not quantized",
    "torch_compile": "it is not tested with fake quantizers",
    "deepspeed": "it is not tested with fake quantizers",
}


def changed_settings(qat: Qat, changes: dict[str, object]) -> str:
    """Return the mapping under `qat` as YAML on one line, with changes."""
    values = {**qat.model_dump(exclude_unset=True), **changes}
    return f"{{{', '.join(f'{key}: {str(value).lower()}' for key, value in values.items())}}}"


def _qat(config: Config) -> Iterator[Finding]:
    """Yield errors: a rounding that is not simulated, and keys that contradict qat."""
    if config.qat is None:
        return
    key = "qat"
    weight = _NAMES.get(config.qat.weight_dtype, config.qat.weight_dtype)
    inputs = config.qat.activation_dtype
    if (inputs, weight) not in IMPLEMENTED:
        written = "" if "weight_dtype" in config.qat.model_fields_set else ", the default"
        found = f"found weight_dtype: {weight}{written}"
        found += f", activation_dtype: {inputs}" if inputs else ""
        wrong = weight if weight != "int4" else inputs or ""
        reason = _REFUSED.get(weight, "int4 weights are rounded alone or with int8 inputs")
        if {config.qat.weight_dtype, inputs or "int4"} - {*QAT_DTYPES}:
            reason = f"axolotl knows {', '.join(QAT_DTYPES)}"
        changes: dict[str, object] = {"weight_dtype": "int4"}
        if inputs:
            changes["activation_dtype"] = "int8"
        do = f"set qat: {changed_settings(config.qat, changes)}"
        yield bad_value(key, f"qat does not simulate {wrong}", f"{found}; {reason}",
                         f"{do}, or remove qat")  # fmt: skip
    for other, reason in _CONTRADICTIONS.items():
        if getattr(config, other):
            yield bad_value(
                key, f"qat contradicts {other}", reason, f"remove qat, or remove {other}"
            )
    if trains_preferences(config):
        why = "log-probabilities of preferences are computed by TRL's head, without rounding"
        yield bad_value(key, "qat contradicts rl", why, "remove qat, or remove rl")


QAT_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = ((_qat, ("qat",)),)
