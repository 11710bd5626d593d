"""Check axolotl's own examples, and train a random sample of the accepted ones, shrunk, on the CPU.

The examples are in axolotl's source archive, which `make axolotl-examples` downloads. A config is
shrunk by its sizes, its data and its model: a tiny model of the same class, with a tokenizer made
here. Keys that need a GPU are removed, and named in docs/measured/axolotl_examples.json.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from tiny_models import tiny_config, tiny_model
from tiny_run import lines, sentences
from tiny_vlms import tiny_vlm

from attnimg.config import check_values
from attnimg.config.read import read_yaml

Values = dict[str, Any]
RECORD = Path(__file__).parents[2] / "docs" / "measured" / "axolotl_examples.json"
STEPS = 5
# The model type of a hub name; the first pattern that is found counts. None: transformers has no
# class for it.
TYPES: tuple[tuple[str, str | None], ...] = (
    ("qwen3.8-flash-next", "qwen4_exp_text"), ("qwen3.[58].*-a\\d+b", "qwen3_5_moe_text"),
    ("qwen3.[58]", "qwen3_5_text"), ("qwen3-next", "qwen3_next"), ("qwen3-.*-a3b", "qwen3_moe"),
    ("qwen3|plano", "qwen3"), ("qwen1.5-moe", "qwen2_moe"), ("qwen-7b", None),
    ("qwen2|qwen-14b|deepcoder", "qwen2"), ("llama-4", "llama4_text"),
    ("gemma-4-12b", "gemma4_unified_text"), ("gemma-4", "gemma4_text"),
    ("gemma-3n", "gemma3n_text"), ("gemma-3", "gemma3_text"), ("gemma-2", "gemma2"),
    ("gemma", "gemma"), ("gpt-oss", "gpt_oss"), ("mixtral", "mixtral"),
    ("ministral-3|mistral-small-4|mistral-medium-3.5|shieldstral", "ministral3"),
    ("ministral", "ministral"), ("mistral|devstral|magistral|voxtral", "mistral"),
    ("phi-3", "phi3"), ("phi", "phi"), ("pythia|redpajama", "gpt_neox"), ("gpt-j", "gptj"),
    ("cerebras-gpt", "gpt2"), ("falcon-h1", "falcon_h1"), ("falcon-e", "llama"),
    ("falcon", "falcon"), ("granite-4", "granitemoehybrid"), ("lfm2-.*a1b", "lfm2_moe"),
    ("lfm2", "lfm2"), ("glm-5", "glm_moe_dsa"), ("glm-4.7", "glm4_moe_lite"),
    ("glm-4.5", "glm4_moe"), ("glm-4", "glm4"), ("minimax-m2", "minimax_m2"),
    ("seed-oss", "seed_oss"), ("apertus", "apertus"), ("hunyuan", "hunyuan_v1_dense"),
    ("nemotron-mini", "nemotron"), ("nemotron-3", "nemotron_h"), ("r7b", "cohere2"),
    ("jamba", "jamba"), ("deepseek-v4", "deepseek_v4"), ("deepseek-v2", "deepseek_v2"),
    ("olmo-3", "olmo3"), ("afm", "arcee"), ("trinity", "afmoe"), ("starcoder2", "starcoder2"),
    ("stablelm", "stablelm"), ("mpt", "mpt"), ("mamba", "mamba"), ("kimi-linear", "kimi_linear"),
    ("ling-3", "bailing_hybrid"), ("dbrx|mimo|btlm|replit|xgen", None),
    ("llama|yi-|smollm|orpheus|xgen", "llama"),
)  # fmt: skip
# The type of the whole model of images and text -> of its language model.
WHOLE = {"gemma3n_text": "gemma3n", "gemma3_text": "gemma3", "gemma4_text": "gemma4",
         "qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe",
         "ministral3": "mistral3"}  # fmt: skip
# Types of models of images and text that have no model of text alone.
_WITH_IMAGES = frozenset({"mistral3"})
WIDTHS = {"intermediate_size": 128, "moe_intermediate_size": 64,
          "shared_expert_intermediate_size": 64}  # fmt: skip
# Keys that need several GPUs, or one: removed from a shrunk config.
OF_GPUS = (
    "attn_implementation", "flash_attention", "sdp_attention", "xformers_attention", "s2_attention",
    "flex_attention", "eager_attention", "sage_attention", "batch_flattening", "deepspeed", "fsdp",
    "fsdp_config", "fsdp_version", "torch_compile", "tf32", "fp16", "context_parallel_size",
    "ddp_find_unused_parameters",
)  # fmt: skip
# Keys of where a model is, which a tiny model of one's own replaces.
OF_THE_HUB = ("revision_of_model", "tokenizer_config", "trust_remote_code",
              "tokenizer_use_mistral_common")  # fmt: skip
# Sizes of the shrunk run.
SIZES: Values = {
    "sequence_len": 512, "micro_batch_size": 2, "gradient_accumulation_steps": 1,
    "max_steps": STEPS, "logging_steps": 1,
}  # fmt: skip


def read_examples(folder: Path) -> dict[str, Values]:
    """Return each example of a folder by its path in it."""
    files = sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")])
    return {str(file.relative_to(folder)): read_yaml(str(file)) for file in files}


def kind(values: Values) -> str:
    """Return what an example trains: text, rl, multimodal, diffusion; or cloud, a launcher's."""
    if "base_model" not in values:
        return "cloud"
    if any(values.get(key) for key in ("rl", "reward_model", "process_reward_model")):
        return "rl"
    if values.get("processor_type"):
        return "multimodal"
    if any("Diffusion" in name for name in values.get("plugins") or ()):
        return "diffusion"
    return "text"


def model_type(base_model: str) -> str | None:
    """Return the type of a hub model by its name; None where transformers has no class."""
    name = base_model.lower()
    for pattern, found in TYPES:
        if re.search(pattern, name):
            return found
    return None


def make_tokenizer(folder: Path, extra: list[str]) -> None:
    """Write a byte-level tokenizer of 120 tokens, with a chat template and some special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=[*special, *(text for text in extra if text not in special)]
    )
    bpe.train_from_iterator(sentences(40, seed=3), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
        " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)


def shrink(values: Values, folder: Path) -> tuple[Values, list[str]]:
    """Write a tiny model and data for an example.

    Returns:
        The config of its run, and the keys that were removed.

    Raises:
        AssertionError: no tiny model of its class can be built; the message has the reason.
    """
    found = model_type(values["base_model"])
    assert found, f"transformers has no class for {values['base_model']}"
    removed = sorted({*OF_GPUS, *OF_THE_HUB} & values.keys())
    if str(values.get("optimizer", "")).startswith(
        ("paged", "adamw_torch_8bit", "adamw_torch_4bit")
    ):
        removed += sorted({"optimizer", "optim_args"} & values.keys())
    kept = {key: value for key, value in values.items() if key not in removed}
    tokens = [text for text in (kept.get("special_tokens") or {}).values() if isinstance(text, str)]
    make_tokenizer(folder / "model", [*tokens, *kept.get("eot_tokens", ())])
    # A pattern may name the language model inside a model of images.
    if "language_model" in str(kept.get("lora_target_modules")):
        found = WHOLE.get(found, found)
    save_model(found, folder / "model")
    for name in ("datasets", "test_datasets", "pretraining_dataset"):
        if kept.get(name):
            entries = [kept[name]] if isinstance(kept[name], str | dict) else kept[name]
            kept[name] = [
                _local(entry if isinstance(entry, dict) else {"path": entry, "type": "pretrain"},
                       folder / f"{name}{index}.jsonl")
                for index, entry in enumerate(entries)
            ]  # fmt: skip
    if kept.get("chat_template_jinja"):
        kept.pop("chat_template_jinja")
        removed.append("chat_template_jinja")
    if kept.get("qat"):
        # Groups that divide the widths, and rounding before the last step.
        begins = min(2, kept["qat"].get("fake_quant_after_n_steps") or 0)
        kept["qat"] = {**kept["qat"], "group_size": 32, "fake_quant_after_n_steps": begins}
    small = {key: value for key, value in SIZES.items() if key != "sequence_len"}
    small["sequence_len"] = min(SIZES["sequence_len"], kept.get("sequence_len", 512))
    return {
        **kept,
        **small,
        "base_model": str(folder / "model"),
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": None,
        "wandb_mode": "offline" if kept.get("wandb_project") else None,
    }, removed


def save_model(found: str, folder: Path) -> None:
    """Write a tiny model of a type, in widths that bitsandbytes' blocks of 64 weights divide."""
    from transformers import AutoModelForImageTextToText

    if found in _WITH_IMAGES:
        tiny_vlm(found).save_pretrained(folder)
        return
    known = tiny_config(found).get_text_config(decoder=True).to_dict()
    sizes = {name: size for name, size in WIDTHS.items() if isinstance(known.get(name), int)}
    model, config = tiny_model(found, **sizes), tiny_config(found, **sizes)
    if model.config.model_type != config.model_type:  # of its text part alone
        model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    config.save_pretrained(folder)


def _local(entry: Values, file: Path) -> Values:
    """Write records for a dataset entry, with the columns it names; return its entry."""
    kept = {k: v for k, v in entry.items() if k not in ("path", "name", "split", "data_files")}
    texts = sentences(120, seed=7)
    records = [_record(kept, *texts[i : i + 3]) for i in range(0, len(texts), 3)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return {**kept, "path": str(file)}


def _record(entry: Values, question: str, answer: str, thought: str) -> Values:
    of_entry = entry.get("type") or "alpaca"
    if isinstance(of_entry, dict):
        names = {name: of_entry.get(f"field_{name}") for name in ("instruction", "input", "output")}
        return {
            names["instruction"] or "instruction": question,
            names["input"] or "input": "",
            names["output"] or "output": answer,
        }
    if str(of_entry).startswith("chat_template"):
        mapped = entry.get("message_property_mappings") or {}
        role = mapped.get("role") or entry.get("message_field_role") or "role"
        content = mapped.get("content") or entry.get("message_field_content") or "content"
        said = {role: "assistant", content: answer}
        if entry.get("field_thinking"):
            said[entry["field_thinking"]] = thought
        messages = [{role: "user", content: question}, said]
        return {entry.get("field_messages") or "messages": messages}
    if of_entry in ("completion", "pretrain"):
        return {entry.get("field") or entry.get("text_column") or "text": question}
    if of_entry == "jeopardy":
        return {"category": "words", "question": question, "answer": answer}
    return {"instruction": question, "input": "", "output": answer}


def train(values: Values, folder: Path) -> Values:
    """Train a shrunk example; return its backend and losses, or what stopped it."""
    from families import _trained

    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    found: Values = _trained(file)
    if found.pop("trains", False):
        out = Path(values["output_dir"])
        receipt = json.loads((out / "receipt.json").read_text(encoding="utf-8"))
        found["trained"] = receipt["plan"]["chosen"]["backend"]
        found["losses"] = [line["loss"] for line in lines(out) if "loss" in line]
    return found


def shares(examples: dict[str, Values]) -> tuple[Values, dict[str, list[str]], list[str]]:
    """Return the counts by kind, the keys that block text examples, and the accepted text ones."""
    counts: Values = {}
    blocking: dict[str, list[str]] = collections.defaultdict(list)
    accepted = []
    for name, values in examples.items():
        found, of_kind = check_values(values, file=name), kind(values)
        part = "archived" if name.startswith("archived/") else "maintained"
        for group in ("all", of_kind, f"{of_kind}, {part}"):
            count = counts.setdefault(group, {"accepted": 0, "examples": 0})
            count["examples"] += 1
            count["accepted"] += found.ok
        if of_kind == "text" and found.ok:
            accepted.append(name)
        if of_kind == "text":
            for key in {re.sub(r"\[\d+\]", "", error.key or "") for error in found.errors}:
                blocking[key].append(name)
    ordered = dict(sorted(blocking.items(), key=lambda item: (-len(item[1]), item[0])))
    return dict(sorted(counts.items())), ordered, accepted


def main() -> None:
    """Check all examples, train a sample, and write the record."""
    from attnimg import pipeline

    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="axolotl's examples/")
    parser.add_argument("--axolotl", default="0.19.0", help="the version whose examples these are")
    parser.add_argument("names", nargs="*", help="of examples to train, in place of a sample")
    parser.add_argument("--train", type=int, default=20, help="examples in the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    examples = read_examples(options.folder)
    counts, blocking, accepted = shares(examples)
    for group, count in counts.items():
        sys.stderr.write(f"{group}: {count['accepted']} of {count['examples']}\n")
    # The kernels are the same for all, and proven elsewhere.
    pipeline.verify_plan = lambda plan, task, report: (plan, ())
    possible = [name for name in accepted if model_type(examples[name]["base_model"])]
    draw = random.Random(options.seed)
    sample = options.names or draw.sample(possible, min(options.train, len(possible)))
    runs = {}
    for number, name in enumerate(sample, 1):
        began = time.monotonic()
        folder = Path(tempfile.mkdtemp())
        try:
            values, removed = shrink(examples[name], folder)
            runs[name] = {**train(values, folder), "removed": removed}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{error!r:.300} ({Path(where.filename).name}:{where.lineno})"
            runs[name] = {"crashed": text}
        shutil.rmtree(folder)
        seconds = time.monotonic() - began
        sys.stderr.write(f"{number}/{len(sample)} {name}, {seconds:.1f} s: {runs[name]}\n")
    record = {
        "axolotl": options.axolotl,
        "transformers": metadata.version("transformers"),
        "shares": counts,
        "blocking": {key: len(names) for key, names in blocking.items()},
        "seed": options.seed,
        "without_a_class": sorted(set(accepted) - set(possible)),
        "trained": dict(sorted(runs.items())),
    }
    if not options.names:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
