"""Apply the advice of each refusal to its config, and check that it helps.

The edits are read from the printed line, one for each alternative. After an edit another refusal
may follow, until nothing is refused. The last test finds advice in the source without a case here.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from advice import Values, all_advice, edited
from advice_without_edit import WITHOUT_EDIT
from tiny_run import CPU, make_model, make_tokenizer

from attnimg.config import check_values
from attnimg.config.keys import key_answers
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, Finding, LocalKernel, Machine
from attnimg.run_facts import Model, Plan
from attnimg.selection.attention_shapes import read_model
from attnimg.selection.gpus_and_images import parse_gpu
from attnimg.selection.model_config import read_config
from attnimg.selection.plan import choose
from attnimg.task import build_problem, cpu_warnings, model_file
from attnimg.train.arguments import try_options
from attnimg.train.base_model import judge_files
from attnimg.train.check import check_inputs
from attnimg.train.checkpoint import FileHasher, write_manifest
from attnimg.train.data import load_documents
from attnimg.train.hub_layers import judge_hub_layers
from attnimg.train.layers import judge_layers
from attnimg.train.model import load_model_config
from attnimg.train.tokenizer import load_tokenizer

H100 = Machine(
    arch=Arch(name="sm_90", vendor="nvidia", capability=(9, 0)), gpu="H100", packages={"torch": "2"}
)
T4 = Machine(arch=Arch(name="sm_75", vendor="nvidia", capability=(7, 5)), gpu="T4", packages={})
TEXTS = [{"text": f"The king spoke {number} times."} for number in range(30)]
TALK = {
    "messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]
}
FP8 = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
ALPACA = {"instruction": "Is it?", "output": "Yes."}


def table(kind: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    written, rows = io.BytesIO(), pyarrow.Table.from_pylist(TEXTS)
    if kind == "parquet":
        pyarrow.parquet.write_table(rows, written)
    else:
        with pyarrow.ipc.new_stream(written, rows.schema) as stream:
            stream.write_table(rows)
    return written.getvalue()


PARQUET, ARROW = table("parquet"), table("arrow")
COMPLETION, CHAT = {"type": "completion"}, {"type": "chat_template"}
PAIRS = {"type": "chatml.prompt_pairs"}


def whole_checkpoint() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as made:
        place = Path(made) / "out/checkpoint-2"
        place.mkdir(parents=True)
        (place / "trainer_state.json").write_text('{"global_step": 2}')
        (place / "optimizer.pt").touch()
        (place / "attnimg.json").write_text('{"step": 2}')
        (place / "rng_state.json").write_text('{"step": 2}')
        with FileHasher() as hashes:
            write_manifest(place, hashes, step=2, processes=1)
        return {f"out/checkpoint-2/{path.name}": path.read_bytes() for path in place.iterdir()}


WHOLE_CHECKPOINT = whole_checkpoint()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A wrong input.

    Attributes:
        code: of the finding whose advice is followed first.
        values: keys of the config.
        entry: keys of its data set.
        records: of data.jsonl; without them the config alone is checked.
        files: other files, by name.
        machine: what it runs on.
        on: the GPU of --on.
        torch: the version of --torch.
        options: how many edits the first advice names; 0 where that grows with the backends.
    """

    code: str
    values: Values = field(default_factory=dict)
    entry: Values = field(default_factory=dict)
    records: list[Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    machine: Machine | None = None
    on: str | None = None
    torch: str | None = None
    options: int = 1

    def findings(self, values: Values) -> list[tuple[str, str | None, str, str]]:
        """Return code, key, what and do of each refusal, and of warnings with the code."""
        arch = parse_gpu(self.on).arch if self.on else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            checked = check_values(values, file="x.yaml", on=arch, torch=self.torch)
        notes = [w for w in checked.warnings if w.code == self.code]
        if checked.config is not None and self.code in ("fp16-on-cpu", "hint-not-used"):
            notes += [note for note in cpu_warnings(checked.config, CPU)]
        if checked.config is not None and self.files:
            notes += [note for note in self.judged(checked.config)[1] if note.code == self.code]
        found = [(f.code, f.key, f.what, f.do) for f in (*checked.errors, *notes)]
        if found or (self.records is None and self.machine is None):
            return found
        assert checked.config is not None
        try:
            self.start(checked.config)
        except AttnimgError as error:
            return [(error.code, error.key, error.what, error.do)]
        return []

    def judged(self, config: Config) -> tuple[list[AttnimgError], list[Finding]]:
        """What is refused of the base model, and warned of."""
        if (path := model_file(config)) is None:
            return [], []
        machine, raw = self.machine or CPU, read_config(path)
        errors, notes = judge_files(config, raw, packages=machine.packages, folder=None)
        for judge in (judge_layers, judge_hub_layers):
            of_layers, more = judge(config, raw, machine)
            errors, notes = errors + of_layers, notes + more
        return errors, notes

    def start(self, config: Config) -> None:
        """What `attnimg train` does before it loads a model."""
        path = model_file(config)
        for error in self.judged(config)[0]:
            raise error
        if config.model_type is not None:
            load_model_config(config)
        if path is None or path.parent.name == "model":
            check_inputs(config, self.machine or CPU)
            try_options(config)
        if self.records is not None:
            load_documents(config, load_tokenizer(config, log=lambda _: None))


def given(case: Case, folder: Path) -> Values:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in case.records or TEXTS))
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    entry = {"path": str(path), "type": "completion", **case.entry}
    filled = {key: str(value).format(folder=folder) if "{folder}" in str(value) else value
              for key, value in entry.items()}  # fmt: skip
    values = {
        "base_model": str(folder.parent / "model"), "learning_rate": 1e-3, "bf16": False,
        "datasets": [{key: value for key, value in filled.items() if value is not None}],
        "output_dir": str(folder / "out"),
    } | json.loads(json.dumps(case.values).replace("{folder}", str(folder)))  # fmt: skip
    return {key: value for key, value in values.items() if value != "absent"}


def follow(case: Case, values: Values, said: list[str], done: tuple[str, ...] = ()) -> None:
    """Follow the advice, every alternative of it, until nothing is refused."""
    found = case.findings(values)
    wanted = [finding for finding in found if finding[0] == case.code]
    if not done:
        assert wanted, (case.code, found)
    if not found:
        return
    code, key, what, do = (wanted if not done else found)[0]
    if do not in said:
        said.append(do)
    assert f"{what}: {do}" not in done, done
    assert len(done) < 6, done
    options = edited(do, key, values)
    assert options, f"{code}: {do!r} names no edit"
    if not done and case.options:
        assert len(options) == case.options, (do, options)
    for option in options:
        follow(case, option, said, (*done, f"{what}: {do}"))


BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
QWEN = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": {"model_type": "qwen3_5_text"}, "vision_config": {}}  # fmt: skip


def of_model(raw: Values, *, code: str = "quantized-checkpoint", **values: Any) -> Case:
    """A model by its config.json, and keys of the config."""
    return Case(code=code, machine=CPU, files={"own/config.json": json.dumps(raw).encode()},
                values={"base_model": "{folder}/own", **values})  # fmt: skip


CASES: dict[str, Case] = {
    # The config alone.
    "an argument that a schedule lacks": Case(
        code="bad-value", machine=CPU, values={"lr_scheduler_kwargs": {"nope": 1}}),
    "a value that a schedule lacks": Case(
        code="bad-value", machine=CPU, values={
            "lr_scheduler": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "nope"}}),
    "an unknown compiler": Case(code="bad-value", machine=CPU, values={
        "torch_compile": True, "torch_compile_backend": "nope"}),
    "an argument that checkpointing lacks": Case(code="bad-value", machine=CPU, values={
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"nope": 1}}),
    "more workers than CPUs": Case(code="bad-value", machine=CPU,
                                   values={"dataloader_num_workers": 1024}),
    "backends for layers beside a backend for all": Case(
        code="bad-value",
        values={"attn_backends": {"full": "sdpa"}, "attn_implementation": "eager"}),
    "auto as the backend of a kind of layers": Case(
        code="bad-value", values={"attn_backends": {"full": "auto"}}),
    "a computed flag": Case(code="computed-flag", values={"attn_uses_flash_lib": True}),
    "a short form": Case(code="alias-rejected", values={"attn_implementation": "fa2"}),
    "no string": Case(code="not-a-string", values={"attn_implementation": 3}, options=0),
    "a typo of a backend": Case(code="unknown-backend",
                                values={"attn_implementation": "flash_atention_2"}, options=0),
    "a legacy flag": Case(code="legacy-flag-deprecated", values={"flash_attention": True}),
    "two legacy flags": Case(code="legacy-flag-ignored",
                             values={"flash_attention": True, "sdp_attention": True}),
    "a legacy flag of no flag": Case(code="bad-value", values={"flash_attention": 3}, options=2),
    "both names": Case(code="canonical-plus-legacy", values={
        "flash_attention": True, "sdp_attention": True, "attn_implementation": "sdpa"}),
    "a typo of a key": Case(code="unknown-key", values={"micro_batchsize": 2}),
    "two kernels for the experts": Case(
        code="bad-value", options=2, values={"use_scattermoe": True, "use_sonicmoe": True}),
    "a flag beside another kernel for the experts": Case(
        code="bad-value", options=2,
        values={"expert_backend": "sonicmoe", "use_scattermoe": True}),
    "another trainer's key": Case(code="unknown-key", values={"lr": 2e-4}),
    "a typo in an entry": Case(code="unknown-key", entry={"dstype": "json"}),
    "a key of nobody": Case(code="unknown-key", values={"zzzzz": 1}),
    "a wrong value": Case(code="bad-value", values={"micro_batch_size": "two"}),
    "a number in quotes": Case(code="bad-value", values={"weight_decay": "0.1"}),
    "an optimizer of axolotl": Case(code="bad-value", values={"optimizer": "muon"}),
    "a wrong value in an entry": Case(code="bad-value", entry={"ds_type": "xml"}),
    "an adapter's unknown key": Case(code="unsupported-key", values={"lora_rx": 8}),
    "s2 packed": Case(code="s2-with-packing", options=3,
                      values={"attn_implementation": "s2", "sample_packing": True}),
    "fp8 packed": Case(code="packing-not-isolated", options=3,
                       values={"attn_implementation": "fp8", "sample_packing": True}),
    "a hub kernel packed": Case(code="packing-not-isolated", options=4,
                                values={"attn_implementation": "a/b", "sample_packing": True}),
    "a mask": Case(code="packing-by-mask", options=3,
                   values={"attn_implementation": "sdpa", "sample_packing": True}),
    "sage in full": Case(code="sage-full-finetune", values={"attn_implementation": "sage"},
                         options=2),
    "an old torch": Case(code="flex-torch", values={"attn_implementation": "flex_attention"},
                         torch="2.5"),
    "flattened without kernel": Case(code="batch-flattening-needs-varlen", options=2, values={
        "batch_flattening": True, "attn_implementation": "sdpa"}),
    "flattened and packed": Case(code="batch-flattening-with-packing", values={
        "batch_flattening": True, "sample_packing": True}),
    "scaled elsewhere": Case(code="scaling-softmax-needs-flex", values={
        "scaling_softmax": True, "attn_implementation": "sdpa"}),
    "context parallel": Case(code="cp-needs-flash", values={
        "context_parallel_size": 2, "attn_implementation": "sdpa"}),
    "context parallel, packed": Case(code="cp-packing-mbs1", values={
        "context_parallel_size": 2, "attn_implementation": "flash_attention_2",
        "sample_packing": True, "micro_batch_size": 2}),
    "rl": Case(code="packing-with-rl", values={"rl": "dpo", "sample_packing": True}),
    "a key of another rl": Case(code="bad-value", values={"kto_desirable_weight": 0.5}),
    "two weights of orpo": Case(
        code="bad-value", entry={"type": "chat_template.argilla"},
        values={"rl": "orpo", "orpo_alpha": 0.1, "rl_beta": 0.1}),
    "weights of no losses": Case(
        code="bad-value", entry=PAIRS, values={"rl": "dpo", "dpo_loss_weights": [1, 2]}),
    "smoothing without a loss that reads it": Case(
        code="bad-value", entry=PAIRS, options=2, values={"rl": "dpo", "dpo_label_smoothing": 0.1}),
    "too much smoothing": Case(
        code="bad-value", entry=PAIRS,
        values={"rl": "dpo", "dpo_loss_type": ["robust"], "dpo_label_smoothing": 0.5}),
    "no smoothing": Case(
        code="bad-value", entry=PAIRS, values={"rl": "dpo", "dpo_loss_type": ["exo_pair"]}),
    "weighted pairs that are sorted": Case(
        code="bad-value", entry=PAIRS,
        values={"rl": "dpo", "dpo_loss_type": ["aot"], "dpo_use_weighting": True}),
    "offloading with rl": Case(
        code="bad-value", entry=PAIRS, values={"rl": "dpo", "gradient_checkpointing": "offload"}),
    "long answers split": Case(
        code="bad-value", entry=PAIRS, values={"rl": "dpo", "excess_length_strategy": "split"}),
    "one row of kto": Case(code="bad-value", entry={"type": "llama3.ultra"}, values={"rl": "kto"}),
    "text with rl": Case(code="unsupported-key", values={"rl": "dpo"}),
    "roles to train with rl": Case(
        code="bad-value", entry=PAIRS | {"roles_to_train": ["assistant"]}, values={"rl": "dpo"}),
    "pairs without rl": Case(code="unsupported-key", entry=PAIRS),
    "a described pair without rl": Case(
        code="bad-value", entry={"type": {"field_chosen": "good"}}),
    "a pair that is refused where longer": Case(
        code="bad-data", entry={"type": "passthrough"}, options=3,
        records=[{"prompt": "Is it?", "chosen": "Yes. " * 30, "rejected": "No."}],
        values={"rl": "dpo", "sequence_len": 20, "excess_length_strategy": "raise"}),
    "flex": Case(code="flex-uncompiled", values={"attn_implementation": "flex_attention"},
                 on="h100"),
    "fp16 beside bf16": Case(code="bad-value", values={"fp16": True, "bf16": True}, options=2),
    "fp16 on a CPU": Case(code="fp16-on-cpu", values={"fp16": True, "bf16": "absent"}, options=2),
    "qlora of 8 bits": Case(code="bad-value", options=2,
                            values={"adapter": "qlora", "load_in_8bit": True}),
    "qlora without 4 bits": Case(code="bad-value", options=2,
                                 values={"adapter": "qlora", "load_in_4bit": False}),
    "4 bits without adapter": Case(code="bad-value", values={"load_in_4bit": True}, options=2),
    "mxfp4 for fp8": of_model(
        {**LLAMA, "quantization_config": {"quant_method": "fp8"}},
        model_quantization_config="Mxfp4Config",
        model_quantization_config_kwargs={"dequantize": True}),
    "mxfp4 for weights that are not quantized": of_model(
        LLAMA, code="done-otherwise", model_quantization_config="Mxfp4Config",
        model_quantization_config_kwargs={"dequantize": True}),
    "arguments for kept 4 bits": of_model(
        {**LLAMA, "quantization_config": BNB4}, adapter="qlora",
        bnb_config_kwargs={"bnb_4bit_quant_type": "fp4"}),
    "8 bits without adapter": Case(code="bad-value", values={"load_in_8bit": True}, options=2),
    "layers of an expression": Case(code="bad-value", values={
        "adapter": "lora", "peft_layers_to_transform": [0], "lora_target_modules": ".*q_proj"}),
    "a list of layers without numbers": Case(code="bad-value", values={
        "adapter": "lora", "peft_layers_pattern": ["layers"]}),
    "new tokens for mistral-common": Case(code="bad-value", options=2, values={
        "tokenizer_use_mistral_common": True, "special_tokens": {"pad_token": "<pad>"}}),
    "experts without 4 bits": Case(code="bad-value", options=2, values={
        "adapter": "lora", "quantize_moe_experts": True}),
    "an argument that the optimizer does not read": Case(code="bad-value", values={
        "optimizer": "adamw_torch", "optim_args": {"momentum": 0.9}}),
    "an argument that is a key": Case(code="bad-value", values={
        "optimizer": "sgd", "optim_args": {"momentum": 0.9, "weight_decay": 0.1}}),
    "a number for a flag": Case(code="bad-value", values={
        "optimizer": "rmsprop", "optim_args": {"centered": 1}}),
    "nesterov without momentum": Case(code="bad-value", values={
        "optimizer": "sgd", "optim_args": {"nesterov": True}}),
    "float16 beside bf16": Case(code="without-effect", values={"float16": True, "bf16": True}),
    "batches split over processes": Case(code="bad-value", values={
        "accelerator_config": {"split_batches": True}}),
    "float16 without loss scaling": Case(code="unsupported-key", values={
        "float16": True, "bf16": False}),
    "a rounding that is not simulated": Case(code="bad-value", options=2, values={
        "qat": {"weight_dtype": "nvfp4", "activation_dtype": "nvfp4", "group_size": 16}}),
    "weights that int8 inputs do not fit": Case(code="bad-value", options=2, values={
        "qat": {"activation_dtype": "int8"}}),
    "qat that never begins": Case(code="without-effect", options=2, values={
        "qat": {"weight_dtype": "int4", "fake_quant_after_n_steps": 9}, "max_steps": 9}),
    "a tracker on and off": Case(code="bad-value", options=2, values={
        "report_to": "mlflow", "use_mlflow": False}),
    "an unknown key of qat": Case(code="unknown-key", values={
        "qat": {"weight_dtype": "int4", "groups": 8}}),
    "qat of an adapter": Case(code="bad-value", options=2, values={
        "qat": {"weight_dtype": "int4"}, "adapter": "lora"}),
    "qat of preferences": Case(code="bad-value", options=2, values={
        "qat": {"weight_dtype": "int4"}, "rl": "orpo"},
        entry={"type": "chat_template.argilla"}),
    "quantized experts that are sharded": Case(code="bad-value", options=2, values={
        "adapter": "qlora", "quantize_moe_experts": True, "fsdp": ["full_shard"]}),
    "weights beside an adapter": Case(code="bad-value", values={
        "adapter": "lora", "unfrozen_parameters": ["^lm_head"]}),
    "weights under reentrant checkpoints": Case(code="bad-value", values={
        "unfrozen_parameters": ["^lm_head"],
        "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "rows of sharded weights": Case(code="bad-value", values={
        "unfrozen_parameters": ["^lm_head.weight$[:9]"], "fsdp": ["full_shard"],
        "fsdp_config": {"a": 1}}),
    "an adapter on random weights": Case(code="bad-value", options=2, values={
        "adapter": "lora", "reinit_weights": True}),
    "a wrong argument of 4 bits": Case(code="bad-value", values={
        "adapter": "qlora", "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf5"}}),
    "mxfp4 without its argument": Case(code="bad-value", values={
        "model_quantization_config": "Mxfp4Config"}),
    "an argument without mxfp4": Case(code="bad-value", values={
        "model_quantization_config_kwargs": {"dequantize": True}}),
    "an experts' kernel": Case(code="hint-not-used", values={
        "experts_implementation": "scattermoe"}),
    "fields of the model by both names": Case(code="bad-value", options=2, values={
        "model_config": {"use_cache": True}, "overrides_of_model_config": {"use_cache": False}}),
    "all held out": Case(code="bad-value", values={"val_set_size": 1.0}),
    "half a document": Case(code="bad-value", values={"val_set_size": 2.5}),
    **{f"{one} and {two}": Case(code="bad-value", values=found, options=2) for one, two, found in (
        ("warmup_steps", "warmup_ratio", {"warmup_steps": 1, "warmup_ratio": 0.1}),
        ("save_steps", "saves_per_epoch", {"save_steps": 2, "saves_per_epoch": 2}),
        ("eval_steps", "evals_per_epoch",
         {"eval_steps": 2, "evals_per_epoch": 2, "val_set_size": 0.1}),
        ("datasets", "pretraining_dataset", {"pretraining_dataset": [{"path": "a"}]}),
        ("dataset_num_proc", "dataset_processes", {"dataset_num_proc": 2, "dataset_processes": 2}),
        ("test_datasets", "val_set_size",
         {"val_set_size": 0.1, "test_datasets": [{"path": "a", "type": "completion"}]}),
        ("load_in_4bit", "load_in_8bit",
         {"load_in_4bit": True, "load_in_8bit": True, "adapter": "lora"}),
        ("deepspeed", "fsdp", {"deepspeed": "a.json", "fsdp": ["full_shard"]}),
    )},
    **{f"{name} on {gpu}": Case(code=code, values={"attn_implementation": name}, on=gpu,
                                options=options)
       for name, gpu, code, options in (
           ("flash_attention_2", "t4", "arch-too-old", 2), ("sage", "t4", "sage-arch", 2),
           ("flash_attention_3", "b200", "arch-mismatch", 3), ("fp8", "a100", "fp8-arch", 3),
           ("flash_attention_4", "v100", "arch-too-old", 2), ("sage", "mi300x", "sage-arch", 3),
           ("flash_attention_2", "cpu", "arch-too-old", 1), ("xformers", "cpu", "arch-too-old", 1),
       )},
    # Keys of axolotl, one of each group; all of them below.
    **{f"{key} of axolotl": Case(code="unsupported-key", values={key: "x"})
       for key in ("ring_attn_func", "rope_scaling", "use_trackio", "use_onebitllms", "trl",
                   "fp8", "gpu_count", "curriculum_sampling", "relora_steps", "generate_samples",
                   "adam_beta3", "use_ray", "dataloader_drop_last", "use_pose", "device", "gptq",
                   "overrides_of_model_kwargs", "peft_trainable_token_indices",
                   "lisa_n_layers", "role_boundaries", "sample_packing_sequentially",
                   "merge_lora", "scaling_softmax_factor", "dp_shard_size", "profiler_steps")},
    "a plugin of axolotl": Case(code="unsupported-key", values={"plugins": ["my.Plugin"]}),
    "plugins that are no names": Case(code="bad-value", values={"plugins": 3}),
    "a transform of axolotl": Case(code="unsupported-key", entry={"input_transform": "x"}),
    "a shard too many": Case(code="bad-value", entry={"shards": 4, "shards_idx": 4}),
    "a key for two things": Case(code="bad-value", entry={**CHAT, "field_thinking": "content"}),
    "an end token trained in two ways": Case(code="bad-value",
                                             entry={**CHAT, "train_on_eot": "none"}),
    "two last turns": Case(code="bad-value", values={"eot_tokens": ["<end>"]},
                           entry={**CHAT, "train_on_eos": "all", "train_on_eot": "last"}),
    "a variable of the records": Case(code="bad-value", entry=CHAT,
                                      values={"chat_template_kwargs": {"tools": [], "x": 1}}),
    "a template of axolotl": Case(code="unsupported-key", entry=CHAT,
                                  values={"chat_template": "jamba"}),
    "a stream without an end": Case(code="bad-value", values={"streaming": True}),
    "a share of a stream": Case(code="bad-value", values={"streaming": True, "max_steps": 2,
                                                          "val_set_size": 0.1}),
    "copies in a stream": Case(code="bad-value", values={
        "streaming": True, "max_steps": 2, "dataset_exact_deduplication": True}),
    "two streams": Case(code="bad-value", values={
        "streaming": True, "max_steps": 2, "datasets": [{"path": "a", **COMPLETION}] * 2}),
    "a shard of a stream": Case(code="bad-value", entry={"shards": 2},
                                values={"streaming": True, "max_steps": 2}),
    "packing without isolation": Case(code="unsupported-key", values={
        "sample_packing": True, "attn_implementation": "sdpa", "pretrain_multipack_attn": False}),
    "another name in a prompt": Case(code="bad-value", entry={"type": {"format": "{question}"}}),
    "a secret in a config": Case(code="unsupported-key", values={"comet_api_key": "x"}),
    **{f"{key} of a tracker that is off": Case(code="bad-value", options=2, values={
        flag: False, key: "p"})
       for flag, key in (("use_wandb", "wandb_project"), ("use_mlflow", "mlflow_experiment_name"))},
    "Liger's layers without Liger": Case(code="not-installed", machine=H100, options=1,
                                         values={"liger_rope": True, "liger_rms_norm": True}),
    "Liger's layers of a type it lacks": Case(
        code="liger-unknown-model", machine=H100,
        values={"base_model": "{folder}", "liger_rope": True, "liger_swiglu": True},
        files={"config.json": b'{"model_type": "bloom"}'}),
    "Liger's gated norm": Case(code="hint-not-used", values={"liger_rms_norm_gated": True}),
    "a kernel of experts": Case(code="hint-not-used", values={"use_scattermoe": True}),
    "kernels that are not compiled": Case(code="hint-not-used", options=2, values={
        "use_kernels": True, "torch_compile": True}),
    "two kernels of RMSNorm": Case(code="hint-not-used", options=2, values={
        "use_kernels": True, "liger_rms_norm": True}),
    **{name: Case(code=code, machine=machine,
                  values={"base_model": "{folder}", "use_kernels": True},
                  files={"config.json": json.dumps({"model_type": type_}).encode()})
       for name, code, machine, type_ in (
           ("kernels of the hub without their library", "not-installed", H100, "llama"),
           ("no kernels of the hub for a CPU", "hint-not-used", CPU, "llama"),
           ("no kernels of the hub for a type", "hint-not-used", H100, "gemma2"),
           ("a kernel for a CPU on a GPU", "local-kernel", replace(H100, local_kernels=(
               LocalKernel(repo="kernels-community/liger-kernels", path="/kernel", vendor="cpu",
                           version="1", exports=None),)), "llama"),
       )},
    "a layer that the type lacks": Case(
        code="hint-not-used", machine=H100, files={"config.json": b'{"model_type": "llama"}'},
        values={"base_model": "{folder}", "liger_layer_norm": True}),
    # What the machine, the model's folder and output_dir allow.
    "a fused schedule of no cosine": Case(code="bad-value", machine=CPU, options=2, values={
        "lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1}),
    "a cosine without its floor": Case(code="bad-value", machine=CPU,
                                       values={"lr_scheduler": "cosine_with_min_lr"}),
    "a decay without steps": Case(code="bad-value", machine=CPU,
                                  values={"lr_scheduler": "warmup_stable_decay"}),
    "a plateau without evaluation": Case(code="bad-value", machine=CPU,
                                         values={"lr_scheduler": "reduce_lr_on_plateau"}),
    "tf32 on Turing": Case(code="bad-value", machine=T4, values={"tf32": True}),
    "fsdp on a CPU": Case(code="fsdp-needs-gpu", machine=CPU, values={
        "fsdp": ["full_shard"], "fsdp_config": {"a": 1}}),
    "deepspeed on a CPU": Case(code="deepspeed-needs-gpu", machine=CPU,
                               values={"deepspeed": "a.json"}),
    "qat without torchao": Case(code="not-installed", machine=H100,
                                values={"qat": {"weight_dtype": "int4"}}),
    "torchao's optimizer": Case(code="not-installed", machine=H100,
                                values={"optimizer": "adamw_torch_8bit"}),
    **{f"{name} on a CPU": Case(code="bad-value", machine=CPU, values={"optimizer": name})
       for name in ("paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit",
                    "paged_lion_8bit")},
    "two ways to evaluate": Case(code="bad-value", machine=CPU, values={
        "eval_steps": 2, "eval_strategy": "epoch", "val_set_size": 0.1}),
    "nothing to evaluate on": Case(code="bad-value", machine=CPU, options=2, values={
        "evals_per_epoch": 2, "eval_strategy": "steps"}),
    "offloading on a CPU": Case(code="hint-not-used", values={
        "gradient_checkpointing": True, "activation_offloading": "legacy"}),
    "the older offloading on a CPU": Case(
        code="hint-not-used", values={"gradient_checkpointing": "offload"}),
    "offloading to a disk": Case(code="done-otherwise", values={
        "gradient_checkpointing": True, "activation_offloading": "disk"}),
    "the older offloading to a disk": Case(
        code="done-otherwise", values={"gradient_checkpointing": "offload_disk"}),
    "offloading without checkpoints": Case(
        code="bad-value", values={"activation_offloading": True}, options=2),
    "offloading in a reentrant backward pass": Case(code="bad-value", values={
        "gradient_checkpointing": "offload",
        "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "a quadratic warmup on a line": Case(code="bad-value", options=2, values={
        "lr_scheduler": "linear", "lr_quadratic_warmup": True}),
    "a constant end without a lowest rate": Case(code="bad-value", options=2, values={
        "cosine_constant_lr_ratio": 0.8}),
    "a lowest rate above the highest": Case(code="bad-value", values={"eta_min": 1}),
    "a lowest rate that axolotl does not read": Case(
        code="done-otherwise", values={"eta_min": 1e-6}),
    "a quadratic warmup and a lowest rate": Case(code="bad-value", options=2, values={
        "lr_quadratic_warmup": True, "cosine_min_lr_ratio": 0.1}),
    "an epsilon that axolotl does not read": Case(
        code="done-otherwise", options=2, values={"adam_eps": 1e-6}),
    "two epsilons": Case(code="bad-value", options=2, values={
        "adam_eps": 1e-6, "adam_epsilon": 1e-7}),
    "a batch beside its accumulation": Case(code="bad-value", options=2, values={
        "batch_size": 4, "gradient_accumulation_steps": 4}),
    "a batch of no whole passes": Case(code="bad-value", values={
        "batch_size": 6, "micro_batch_size": 4}),
    "a batch for its accumulation": Case(code="done-otherwise", values={"batch_size": 4}),
    "the best model without checkpoints": Case(code="bad-value", values={
        "load_best_model_at_end": True, "val_set_size": 0.1, "save_strategy": "no"}),
    "the best checkpoint of nothing": Case(code="bad-value", options=2, values={
        "save_strategy": "best"}),
    "LoRA+ without an adapter": Case(code="bad-value", options=2, values={"loraplus_lr_ratio": 16}),
    "evaluations of nothing": Case(code="without-effect", options=2, values={"evals_per_epoch": 2}),
    "no checkpoint": Case(code="no-checkpoint", machine=CPU,
                          values={"resume_from_checkpoint": True}),
    "a folder that is no checkpoint": Case(
        code="no-checkpoint", machine=CPU, values={"resume_from_checkpoint": "nowhere"}),
    "a folder of another run": Case(
        code="output-dir-not-empty", machine=CPU,
        files=WHOLE_CHECKPOINT),
    "a prepared path that is a file": Case(
        code="not-writable", records=TEXTS,
        values={"dataset_prepared_path": "{folder}/data.jsonl"}),
    "a model with code": Case(
        code="not-causal-lm", machine=CPU, values={"base_model": "{folder}/own"},
        files={"own/config.json": b'{"model_type": "own", "auto_map": '
                                    b'{"AutoModelForCausalLM": "own.Own"}}'}),
    "4 bit weights without an adapter": of_model({**LLAMA, "quantization_config": BNB4}),
    "4 bit weights in 8 bit": of_model(
        {**LLAMA, "quantization_config": BNB4}, adapter="lora", load_in_8bit=True),
    "fp8 weights under qlora": of_model(
        {**LLAMA, "quantization_config": {"quant_method": "fp8"}}, adapter="qlora",
        load_in_4bit=True),
    "fewer positions than a row has": of_model(
        {"model_type": "gpt2", "n_positions": 256}, code="positions-short", sequence_len=512),
    "RoPE beyond its positions": of_model(
        {**LLAMA, "max_position_embeddings": 256}, code="positions-beyond", sequence_len=512),
    "a model of images that was not tried": of_model(
        {"model_type": "florence2"}, code="not-causal-lm"),
    "a model of images": of_model(QWEN, code="towers-frozen"),
    "its language model alone": of_model(
        QWEN, code="loses-towers", model_type="AutoModelForCausalLM"),
    **{name: Case(code=code, machine=CPU, values={"base_model": "{folder}/own", **values},
                  files={"own/config.json": json.dumps(described).encode()})
       for name, code, described, values in (
           ("fewer positions than tokens", "positions-short",
            {"model_type": "gpt2", "n_positions": 64}, {"sequence_len": 128}),
           ("8 bits under qlora", "quantized-checkpoint",
            {"model_type": "llama", "quantization_config": {"load_in_8bit": True}},
            {"adapter": "qlora"}),
           ("fp8 under qlora", "quantized-checkpoint", FP8, {"adapter": "qlora"}),
           ("fp8 in 4 bits", "quantized-checkpoint", FP8,
            {"adapter": "lora", "load_in_4bit": True}),
       )},
    "a class of another task": Case(code="not-causal-lm", machine=CPU, values={
        "model_type": "LlamaForSequenceClassification"}),
    "a class of nobody": Case(code="not-causal-lm", machine=CPU, values={"model_type": "LLamaLM"}),
    "a tokenizer of nobody": Case(code="bad-value", records=TEXTS,
                                  values={"tokenizer_type": "LLamaTokenizer"}),
    "a tokenizer without tokens": Case(code="bad-model", records=TEXTS, values={
        "tokenizer_config": "{folder}/../bare"}),
    "new tokens": Case(code="bad-value", records=TEXTS, values={
        "adapter": "lora", "tokens": ["<new>"]}),
    "an adapter of the head": Case(code="bad-value", machine=CPU, values={
        "adapter": "lora", "lora_target_modules": ["q_proj", "lm_head"]}),
    # The data.
    "an end token that is none": Case(code="bad-value", records=TEXTS,
                                      values={"eot_tokens": ["<|eot|>"]}),
    "no type, text": Case(code="missing-key", records=TEXTS, entry={"type": None}),
    "no type, a conversation": Case(code="missing-key", records=[SHAREGPT], entry={"type": None},
                                    values={"chat_template": "chatml"}),
    "no type, alpaca": Case(code="missing-key", records=[ALPACA], entry={"type": None}),
    "a prompt too long": Case(code="unsupported-key", records=[TALK],
                              entry={"type": "creative_acr.load_revise"},
                              values={"chat_template": "chatml"}),
    "a shard without records": Case(code="empty-dataset", records=TEXTS[:2],
                                    entry={"type": "completion", "shards": 3, "shards_idx": 2}),
    "documents too short": Case(code="empty-dataset", records=TEXTS,
                                values={"min_sample_len": 400}),
    "an end token in eot_tokens": Case(
        code="bad-value", records=[TALK], entry={**CHAT, "train_on_eot": "none"},
        values={"chat_template": "chatml", "eot_tokens": ["</s>"]}),
    "another trainer's type": Case(
        code="unsupported-key", records=[SHAREGPT], entry={"type": "sharegpt"},
        values={"chat_template": "chatml"}),
    "a typo of a type": Case(code="bad-value", records=TEXTS, entry={"type": "completions"}),
    "another column of text": Case(code="wrong-columns",
                                   records=[{"id": "7", "body": "The king spoke."}]),
    "another column of messages": Case(
        code="wrong-columns", entry=CHAT, values={"chat_template": "chatml"},
        records=[{"id": 7, "tags": ["a"], "talk": TALK["messages"]}]),
    "text read as a conversation": Case(code="wrong-columns", entry=CHAT, records=TEXTS,
                                        values={"chat_template": "chatml"}),
    "a conversation read as alpaca": Case(code="wrong-columns", entry={"type": "alpaca"},
                                          records=[TALK], values={"chat_template": "chatml"}),
    "other keys of messages": Case(
        code="wrong-columns", entry=CHAT, values={"chat_template": "chatml"},
        records=[{"messages": [{"speaker": "User", "id": "1", "said": "Is it?"},
                               {"speaker": "Assistant", "id": "2", "said": "Yes."}]}]),
    "another role": Case(
        code="bad-data", entry=CHAT, values={"chat_template": "chatml"}, options=2,
        records=[{"messages": [{"role": "bot: \"x\"", "content": "Is it?"}, *TALK["messages"]]}]),
    "a role in capitals": Case(
        code="bad-data", entry=CHAT | {"roles": {"user": ["asker"]}},
        values={"chat_template": "chatml"},
        records=[{"messages": [{"role": "asker", "content": "Is it?"},
                               {"role": "Assistant", "content": "Yes."}]}]),
    "no chat template": Case(code="missing-key", entry=CHAT, records=[TALK], options=2),
    "an unknown chat template": Case(code="bad-value", entry=CHAT, records=[TALK],
                                     values={"chat_template": "chatmi"}),
    "an entry's unknown chat template": Case(code="bad-value", records=[TALK],
                                             entry=CHAT | {"chat_template": "lama3"}),
    "a template as a name": Case(code="bad-value", entry=CHAT, records=[TALK],
                                 values={"chat_template": "{{ x }}"}),
    "jinja without a template": Case(code="bad-value", entry=CHAT, records=[TALK],
                                     values={"chat_template": "jinja"}),
    "an entry's jinja without a template": Case(code="bad-value", records=[TALK],
                                                entry=CHAT | {"chat_template": "jinja"}),
    "early stopping without evaluations": Case(code="bad-value", values={
        "early_stopping_patience": 2, "val_set_size": 0.1, "eval_strategy": "no"}),
    "no steps and a share of warmup": Case(code="bad-value", options=2, values={
        "warmup_steps": 0, "warmup_ratio": 0.1}),
    "an unused system message": Case(code="bad-value", records=TEXTS,
                                     values={"default_system_message": "Be brief."}),
    "a system message for alpaca": Case(
        code="unsupported-key", records=[ALPACA], entry={"type": "alpaca"},
        values={"default_system_message": "Be brief.", "chat_template": "chatml",
                "test_datasets": [{"path": "{folder}/talk.jsonl", "type": "chat_template"}]},
        files={"talk.jsonl": json.dumps(TALK).encode()}),
    "all documents held out": Case(code="bad-value", records=TEXTS, values={"val_set_size": 99}),
    "longer than the row": Case(code="empty-dataset", records=[TALK], entry=CHAT,
                                values={"sequence_len": 4, "chat_template": "chatml"}),
    "refused where longer": Case(
        code="bad-data", records=[*TEXTS, {"text": "king " * 90}], options=4,
        values={"sequence_len": 64, "excess_length_strategy": "raise"}),
    "nothing that is trained": Case(
        code="empty-dataset", entry=CHAT | {"roles_to_train": ["tool"]}, records=[TALK],
        values={"chat_template": "chatml"}),
    "a typo of a role to train": Case(
        code="bad-value", entry=CHAT | {"roles_to_train": ["assistant", "usr"]}, records=[TALK],
    ),
    "a split that is not there": Case(code="bad-value", records=TEXTS, entry={"split": "test"}),
    "no split's words": Case(code="bad-value", records=TEXTS, entry={"split": "train[a:"},
                             options=3),
    "a slice of no rows": Case(code="empty-dataset", records=TEXTS, entry={"split": "train[50:]"}),
    "a format of two": Case(
        code="bad-value", records=TEXTS, entry={"path": "{folder}/both"}, options=2,
        files={"both/a.jsonl": b'{"text": "x y"}\n', "both/b.csv": b"text\nx y\n"}),
    "no suffix": Case(code="bad-value", records=TEXTS, entry={"path": "{folder}/plain"},
                      files={"plain": b'{"text": "x y"}\n'}),
    "no suffix, no JSON": Case(code="bad-value", records=TEXTS, entry={"path": "{folder}/plain"},
                               options=2, files={"plain": b"text\nx y\nz\n"}),
    "Parquet by another name": Case(code="bad-value", records=TEXTS,
                                    entry={"path": "{folder}/a.jsonl"}, files={"a.jsonl": PARQUET}),
    "a damaged saved set": Case(
        code="bad-data", records=TEXTS, entry={"path": "{folder}/saved"},
        files={"saved/state.json": b"{}", "saved/a.arrow": ARROW}),
    "one document, half held out": Case(code="bad-value", records=TEXTS[:1],
                                        values={"val_set_size": 0.5}),
    "a pattern of two splits": Case(
        code="bad-value", records=TEXTS, entry={"path": "{folder}/two/*.jsonl"},
        files={"two/train.jsonl": b'{"text": "x y"}\n', "two/test.jsonl": b'{"text": "x y"}\n'}),
    "no README for a name": Case(
        code="bad-value", records=TEXTS, entry={"path": "{folder}/one", "name": "en"},
        files={"one/train.jsonl": b'{"text": "x y"}\n'}),
}  # fmt: skip


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advice")
    make_model(folder / "model")
    bare = make_tokenizer(folder / "bare")
    for name in ("bos_token", "eos_token"):
        setattr(bare, name, None)
    bare.save_pretrained(folder / "bare")
    return folder


@cache
def tried(name: str, place: Path) -> tuple[str, ...]:
    """Follow the advice of one case; return all that was said on the way."""
    folder = place / re.sub(r"\W+", "-", name)
    folder.mkdir(exist_ok=True)
    said: list[str] = []
    case = CASES[name]
    follow(case, given(case, folder), said)
    return tuple(said)


@pytest.mark.parametrize("name", CASES)
def test_what_is_advised_helps(name: str, place: Path) -> None:
    assert tried(name, place)


def test_each_key_of_axolotl_is_accepted_once_it_is_removed(place: Path) -> None:
    refused = {key for key, found in key_answers().items() if found.answer == "refused"}
    for key in refused - {"scaling_softmax", "context_parallel_size"}:
        case = Case(code="unsupported-key", values={key: "x"})
        values = given(case, place / "model")
        ((code, named, _, do),) = case.findings(values)
        assert (code, named) == ("unsupported-key", key)
        (removed,) = edited(do, named, values)
        assert not case.findings(removed), key


WIDE, SINKS = {"head_dim": 320}, {"model_type": "gpt_oss", "head_dim": 64, "sliding_window": 128}
GPUS = ("t4", "h100", "rtx5090", "mi300x", "cpu")
NAMED = (
    "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    "xformers", "flex_attention", "sage", "s2", "fp8", "kernels-community/flash-attn3",
)  # fmt: skip


def plan_of(values: Values, arch: Arch, model: Model | None) -> Plan:
    config = Config.model_validate(values)
    task = build_problem(config, model=model, dropout=0.0, arch=arch)
    machine = Machine(arch=arch, gpu=arch.name, packages=None)
    return choose(config.attn_implementation, machine, task)


@cache
def planned() -> tuple[str, ...]:
    """Follow the advice of plans that chose nothing; return all that was said."""
    said: list[str] = []
    shape = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_hidden_layers": 2}  # fmt: skip
    for gpu, asked, packed, other in product(GPUS, NAMED, (True, False), ({}, WIDE, SINKS)):
        arch, model = parse_gpu(gpu).arch, read_model(shape | other)
        values = {"attn_implementation": asked, "sample_packing": packed, "bf16": True}
        found = plan_of(values, arch, model)
        if found.chosen is not None or found.remedy.startswith("see the reasons"):
            continue
        said.append(found.remedy)
        options = edited(found.remedy, "attn_implementation", values)
        assert options, found.remedy
        for option in options:
            again = plan_of(option, arch, model)
            assert again.chosen is not None or again.remedy != found.remedy, (
                gpu,
                values,
                found.remedy,
            )
            assert again.chosen is not None or option["attn_implementation"] == asked, again.remedy
    return tuple(dict.fromkeys(said))


def test_what_a_plan_advises_fits() -> None:
    assert len(planned()) > 5


USER, YES = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = (
    "{{ tools }}{% for m in messages %}<s>{{ m.role }}\n{{ m.content or '' }}"
    "{{ m.tool_calls or '' }}{{ eos_token }}{% endfor %}"
)
PLAIN = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"
TOOL = {"type": "function", "function": {"name": "f"}}
# A record that is refused, and what becomes of it where the advice is followed.
DETAIL = {**CHAT, "message_field_training_detail": "detail"}
THINKING = {**CHAT, "split_thinking": True}
PART = {"begin_offset": 0, "end_offset": 1, "train": True}
RECORDS: dict[str, tuple[Any, ...]] = {
    "parts beside a list of contents": (
        [USER, {"role": "assistant", "content": [{"type": "text", "text": "Yes.", "train": False},
                                                 {"type": "text", "text": "Go."}],
                "detail": [PART]}],
        [USER, YES | {"detail": [PART]}], PLAIN, DETAIL),
    "parts of another form": ([USER, YES | {"detail": [{"begin_offset": 0}]}],
                              [USER, YES | {"detail": [PART]}], PLAIN, DETAIL),
    "parts past the end": ([USER, YES | {"detail": [PART | {"end_offset": 4}]}],
                           [USER, YES | {"detail": [PART | {"end_offset": 3}]}], PLAIN, DETAIL),
    "parts that overlap": (
        [USER, YES | {"detail": [PART, PART | {"train": False}]}],
        [USER, YES | {"detail": [PART, {"begin_offset": 2, "end_offset": 3, "train": False}]}],
        PLAIN, DETAIL),
    "reasoning twice": (
        [USER, {"role": "assistant", "content": "<think>a</think>Yes.", "reasoning_content": "b"}],
        [USER, {"role": "assistant", "content": "<think>a</think>Yes."}],
        PLAIN.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}"),
        THINKING),
    "text before the reasoning": (
        [USER, {"role": "assistant", "content": "Go. <think>a</think>Yes."}],
        [USER, {"role": "assistant", "content": "<think>a</think>Go. Yes."}],
        PLAIN.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}"),
        THINKING),
    "choices that are no list": (
        {"question": "Is it?", "choices": "Yes.", "solution": "Yes."},
        {"question": "Is it?", "choices": ["Yes."], "solution": "Yes."}, None,
        {"type": "explainchoice"}),
    "no system message beside a default one": (
        ALPACA | {"system": ""}, ALPACA | {"system": "Go."}, None,
        {"type": {"system_prompt": "Be brief."}}),
    "segments of another form": (
        {"segments": [{"text": "Is it?"}]}, {"segments": [{"label": True, "text": "Is it?"}]},
        None, {"type": "input_output"}),
    "a label too few": ({"input_ids": [5, 6], "labels": [5]}, {"input_ids": [5, 6],
                        "labels": [5, 6]}, None, {"type": None}),
    "another vocabulary": ({"input_ids": [5, 10**6], "labels": [5, 6]},
                           {"input_ids": [5, 6], "labels": [5, 6]}, None, {"type": None}),
    "padding": ({"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1, 0]},
                {"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1, 1]}, None,
                {"type": None}),
    "a call of OpenAI's older kind": (
        [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}}],
        [USER, {"role": "assistant", "tool_calls": [CALL]}], CALLING),
    "a role for a call": (
        [USER, {"role": "function_call", "content": "f(1)"}],
        [USER, {"role": "assistant", "tool_calls": [CALL]}], CALLING),
    "a role for a result": (
        [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "observation",
         "content": "7"}],
        [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "7"}],
        CALLING),
    "a call without name": (
        [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}],
        [USER, {"role": "assistant", "tool_calls": [CALL]}], CALLING),
    "images": ([USER | {"images": ["a.png"]}, YES], [USER, YES], PLAIN),
    "a part that is no text": ([USER | {"content": [{"type": "image", "url": "a"}]}, YES],
                               [USER | {"content": "Is it?"}, YES], PLAIN),
    "flags that differ": ([USER, YES | {"train": True, "weight": 0}],
                          [USER, YES | {"train": True}], PLAIN),
    "half a weight": ([USER, YES | {"weight": 0.5}], [USER, YES | {"weight": 1}], PLAIN),
    "two kinds of reasoning": (
        [USER, YES | {"reasoning_content": "a", "thinking": "b"}],
        [USER, YES | {"reasoning_content": "a"}], PLAIN.replace("{{ m.content }}",
                                                                "{{ m.reasoning_content }}\n"
                                                                "{{ m.content }}")),
    "a number for a text": ([USER | {"content": 7}, YES], [USER | {"content": "7"}, YES], PLAIN),
    "a message that is text": (["Is it?", YES], [USER, YES], PLAIN),
    "text for a conversation": ("Is it?", [USER, YES], PLAIN),
    "reasoning that is dropped": (
        [USER, YES | {"reasoning_content": "The king spoke."}],
        [USER, YES | {"content": "<think>The king spoke.</think>Yes."}], PLAIN),
    "tools that are dropped": (
        {"messages": [USER, YES], "tools": [TOOL]},
        {"messages": [{"role": "system", "content": "tools: f"}, USER, YES]}, PLAIN),
    "tools that are no list": (
        {"messages": [USER, YES], "tools": {"f": 1}}, {"messages": [USER, YES], "tools": [TOOL]},
        CALLING),
    "a record that is a number": (3, {"messages": [USER, YES]}, PLAIN),
    "a column system beside a turn": (
        {"system": "Go.", "messages": [{"role": "system", "content": "Be brief."}, USER, YES]},
        {"system": "Go.", "messages": [USER, YES]}, PLAIN),
    "an empty turn without loss beside train_on_inputs": (
        [USER, YES | {"content": "", "train": False}, USER, YES], [USER, USER, YES],
        PLAIN.replace("{{ m.role }}", "{{ m.role if m.content else 'empty' }}")),
}  # fmt: skip


@cache
def corrected(name: str, place: Path) -> str:
    """Return the advice on a record; the record that follows it must be accepted."""
    wrong, right, template, *entry = RECORDS[name]
    said = []
    folder = place / re.sub(r"\W+", "-", name)
    folder.mkdir(exist_ok=True)
    for record in (wrong, right):
        if not isinstance(record, dict | int):
            record = {"messages": record}
        case = Case(code="bad-data", records=[record], entry=(*entry, CHAT)[0], options=0,
                    values={"chat_template_jinja": template, "train_on_inputs": True})  # fmt: skip
        said.append([do for *_, do in case.findings(given(case, folder))])
    (do,), none = said
    assert not none
    return do


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_follows_the_advice_is_taken(name: str, place: Path) -> None:
    assert corrected(name, place)


def test_all_advice_in_the_source_was_tried(place: Path) -> None:
    said = [line for name in CASES for line in tried(name, place)]
    said += [*planned(), *(corrected(name, place) for name in RECORDS)]
    excused = {text for texts in WITHOUT_EDIT.values() for text in texts}
    known = all_advice()
    untried = {
        text: file
        for text, file in known.items()
        if text not in excused and not any(_spells(text, line) for line in said)
    }
    assert untried == {}, "add a case for this advice, or the reason why it names no edit"
    assert excused <= known.keys(), "these texts are no longer in the source"


def _spells(text: str, line: str) -> bool:
    """Return whether a printed line is this text; one without words of its own counts as any."""
    pattern = ".*".join(map(re.escape, text.split("{}")))
    return not text.strip("{} ") or re.fullmatch(pattern, line, re.DOTALL) is not None
