"""Write docs/checkpoints.md: what happens to a checkpoint that is more than plain weights."""

from __future__ import annotations

from attnimg.model_classes import CausalTypes, position_table
from attnimg.quantizations import Quantization, quantizations
from recipes.files import NOTICE

_LOADED = {
    "dequantized": "dequantized to the run's precision; what is saved is not quantized",
    "kept": "stays quantized, frozen under `adapter`; full fine-tuning is refused",
    "refused": "refused",
}


def checkpoints_page(types: CausalTypes) -> str:
    """Write the page.

    Args:
        types: the causal language models of transformers.
    """
    tabled = sorted(name for name in types.causal if position_table(name) is not None)
    kept = sorted(types.text_trained | types.multimodal.keys())
    return "\n".join(
        [
            f"<!-- {NOTICE} -->\n\n# Checkpoints\n",
            "What `train` does with a checkpoint that is more than plain weights, judged from its",
            "`config.json` and the headers of its files before any weight is loaded. `explain`",
            "says the same.\n",
            "## Quantized weights\n",
            "A `quantization_config` in `config.json` is used as it says, or refused by name "
            "(`quantized-checkpoint`).",
            "Stored numbers that look quantized, in float8 or packed integers, without a",
            "`quantization_config` or without their scale are refused as well.\n",
            "| `quant_method` | what happens | needs | trained here |",
            "|---|---|---|---|",
            *(_row(name, row) for name, row in quantizations().items()),
            "\n`load_in_4bit`, `load_in_8bit` and `adapter: qlora` quantize plain weights. On a",
            "checkpoint that is quantized already they must say what it is, or are refused.\n",
            "## Vision and audio parts\n",
            "Training is on text. A checkpoint with other parts is loaded by its own class: they",
            "are frozen, get no adapter, and are saved as they are, with the files of the",
            "processor (`towers-frozen`). With `model_type: AutoModelForCausalLM` the language",
            "model alone is loaded and saved, where transformers can (`loses-towers`). Trained so: "
            + ", ".join(f"`{name}`" for name in kept)
            + ". Other types that take",
            "images or sound are refused (`not-causal-lm`), with the class to set to try it.\n",
            "## Positions\n",
            "These types have a table of positions, and `sequence_len` must fit in it",
            "(`positions-short`): " + ", ".join(f"`{name}`" for name in tabled) + ".",
            "Rotary positions beyond `max_position_embeddings`, or the original length times the",
            "factor of its RoPE scaling, are warned of (`positions-beyond`).\n",
            "## What is saved\n",
            "The class, the tied weights and the settings of the checkpoint, in one dtype: with",
            "`bf16: true`, embeddings and norms are float32 during training and bfloat16 in",
            "`output_dir`; the checkpoints to resume from keep them in float32. `config.json`",
            "names that dtype. `make test/reload` trains some 100 model types, full and with LoRA,",
            "in float32 and bfloat16, and compares the logits of what is saved, loaded again, with",
            "those of what was trained: they are equal. Weights of a checkpoint that its class has",
            "no place for, such as layers that predict several tokens, are named in a warning.\n",
        ]
    )


def _row(name: str, row: Quantization) -> str:
    what = _LOADED[row.loaded] + (f": {row.why}" if row.why else "")
    bits = f"{row.bits} bit weights" if row.bits and name == "torchao" else ""
    needs = ", ".join([*(f"`{package}`" for package in row.packages), *([bits] if bits else [])])
    tried = "-" if row.loaded == "refused" else "yes" if row.source.endswith("; tested") else "no"
    return f"| `{name}` | {what} | {needs or '-'} | {tried} |"
