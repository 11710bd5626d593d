"""Define the config keys that attnimg implements: name, type, range and default of each.

The names are axolotl's, so that axolotl's configs work. Axolotl's keys that attnimg does not
implement are in data/keys.toml. Values of the wrong type are refused, not converted.
"""

# No `from __future__ import annotations`: pydantic would evaluate 110 strings, which takes 3 ms.
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Strict,
    Tag,
)
from pydantic_core import CoreSchema

from attnimg.config.weight_patterns import parse_weight_pattern
from attnimg.facts import Finding, LayerKind
from attnimg.redact import has_credentials

_REPOSITORY = re.compile(r"(\b[\w\-.]{1,96}\b/)?\b[\w\-.]{1,96}\b", re.ASCII)


def _to_bool(value: object) -> object:
    """Return 1 and 0 as booleans, as axolotl does; other values must be booleans."""
    return bool(value) if type(value) is int and value in (0, 1) else value


def _require_number(value: object) -> object:
    """Raise for true and "3", which pydantic would convert to numbers."""
    if isinstance(value, bool | str):
        raise ValueError("should be a number")
    return value


def _to_learning_rate(value: object) -> object:
    """Return a quoted learning rate ("2e-4") as a number, as axolotl does."""
    if isinstance(value, str):
        return float(value)
    return _require_number(value)


def _check_path(text: str) -> str:
    """Raise for paths that no file system accepts.

    Source: Linux, include/uapi/linux/limits.h, NAME_MAX and PATH_MAX (2026-11-27).
    """
    if "\0" in text:
        raise ValueError("should have no NUL character")
    if len(os.fsencode(text)) > 4095 or any(len(os.fsencode(p)) > 255 for p in text.split("/")):
        raise ValueError("should have at most 4,095 bytes, and at most 255 in each name")
    return text


def _unset_if_empty(value: object) -> object:
    """Return None for "" and false, which axolotl's examples write for keys of trackers."""
    return None if value in ("", False) else value


def _check_tracking_uri(text: str) -> str:
    """Raise for a user or password in a URI, which would be written to receipts."""
    if has_credentials(text):
        raise ValueError(
            "should have no user and password; MLflow reads them from the environment variables "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole URI from "
            "MLFLOW_TRACKING_URI"
        )
    return text


def _check_repository(text: str) -> str:
    """Raise for text that is not the name of a repository on the hub.

    Source: huggingface_hub 2.4.0, utils/_validators.py, validate_repo_id (2026-11-27).
    """
    known = _REPOSITORY.fullmatch(text) and "--" not in text and ".." not in text
    if not known or text.endswith(".git"):
        raise ValueError("should be the name of a repository on the hub: ORGANIZATION/NAME or NAME")
    return text


def _require_lower_is_better(flag: bool) -> bool:
    """Raise for true: the only metric is the evaluation loss."""
    if flag:
        raise ValueError("should be false: a lower evaluation loss is better")
    return flag


def _to_list(value: object) -> object:
    """Return a list for one string."""
    return [value] if isinstance(value, str) else value


def _to_tracker_list(value: object) -> object:
    """Return a list for one name; none and false are no tracker."""
    if value in ("none", "", False):
        return []
    return [value] if isinstance(value, str) else value


def _check_regex(value: object) -> object:
    """Raise for an invalid regular expression, which PEFT matches against full module names."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"should be a regular expression, a list or all-linear: {error}"
            ) from None
    return value


def _check_expression(text: str) -> str:
    """Raise for an invalid regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"should be a regular expression: {error}") from None
    return text


def _to_list_of_specs(value: object) -> object:
    """Return a list for one path or mapping, which axolotl accepts for pretraining_dataset."""
    if isinstance(value, str):
        return [{"path": value, "type": "pretrain"}]
    return [value] if isinstance(value, dict) else value


def _to_arguments(value: object) -> object:
    """Return a mapping for text of the form "name=value, name=value", which axolotl accepts.

    Source: axolotl 0.19.0, core/builders/base.py, _configure_optimizer (2026-11-27)
    """
    if not isinstance(value, str):
        return value or None
    pairs = [pair.strip().partition("=") for pair in value.split(",") if pair.strip()]
    if not all(name.strip() and text.strip() for name, _, text in pairs):
        raise ValueError("should be a mapping, or pairs of the form name=value")
    return {name.strip(): _to_scalar(text.strip()) for name, _, text in pairs} or None


def _to_scalar(text: str) -> object:
    """Return text as a boolean or number where it is one."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _check_weight_pattern(text: str) -> str:
    """Raise for an invalid pattern of unfrozen_parameters."""
    parse_weight_pattern(text)
    return text


class _Once:
    """Let pydantic build the schema of a type once, not again for each key that has the type."""

    def __init__(self) -> None:
        self.schema: CoreSchema | None = None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        if self.schema is None:
            self.schema = handler(source)
        return self.schema


Flag = Annotated[bool, Strict(), BeforeValidator(_to_bool), _Once()]
Count = Annotated[int, BeforeValidator(_require_number), Field(ge=1, le=2**31 - 1), _Once()]
Whole = Annotated[int, BeforeValidator(_require_number), Field(ge=0, le=2**31 - 1), _Once()]
# More rows than any batch has, but few enough to allocate lists of this length.
Rows = Annotated[int, BeforeValidator(_require_number), Field(ge=1, le=2**20)]
# More than the CPUs of the largest machines.
Processes = Annotated[int, BeforeValidator(_require_number), Field(ge=1, le=1024), _Once()]
Workers = Annotated[int, BeforeValidator(_require_number), Field(ge=0, le=1024)]
Seed = Annotated[int, BeforeValidator(_require_number), Field(ge=0, le=2**32 - 1)]
Number = Annotated[float, BeforeValidator(_require_number), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[
    float, BeforeValidator(_require_number), Field(gt=0, allow_inf_nan=False), _Once()
]
Beta = Annotated[float, BeforeValidator(_require_number), Field(ge=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_require_number), Field(ge=0, le=1, allow_inf_nan=False)]
Below1 = Annotated[float, BeforeValidator(_require_number), Field(gt=0, lt=1)]
Text = Annotated[str, Strict(), Field(min_length=1), _Once()]
PathText = Annotated[Text, AfterValidator(_check_path)]
Texts = Annotated[list[Text], BeforeValidator(_to_list)]
TrackerNames = Annotated[
    list[Literal["wandb", "mlflow", "tensorboard"]], BeforeValidator(_to_tracker_list)
]
TrackerText = Annotated[Text | None, BeforeValidator(_unset_if_empty)]
TrackingUri = Annotated[
    Annotated[Text, AfterValidator(_check_tracking_uri)] | None, BeforeValidator(_unset_if_empty)
]
Repository = Annotated[
    Annotated[Text, AfterValidator(_check_repository)] | None, BeforeValidator(_unset_if_empty)
]
Paths = Annotated[list[PathText], BeforeValidator(_to_list)]
Expression = Annotated[Text, AfterValidator(_check_expression)]
WeightPattern = Annotated[Text, AfterValidator(_check_weight_pattern)]

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_torch_4bit", "adafactor",
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "sgd", "adagrad", "rmsprop",
]  # fmt: skip
Scheduler = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt",
    "cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau",
]  # fmt: skip
# TRL's losses of DPO. Source: trl 1.16.0, dpo_trainer.py, _compute_loss (2026-11-27)
DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def _to_strategy(value: object) -> object:
    """Return "no" for an unquoted no, which YAML reads as false."""
    return "no" if value is False else value


Strategy = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_to_strategy)]
TrainedEnds = Literal["all", "turn", "last", "none"]
SaveStrategy = Annotated[Literal["no", "steps", "epoch", "best"], BeforeValidator(_to_strategy)]
SpecialToken = Literal[
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
    "additional_special_tokens",
]  # fmt: skip
# The first three are transformers'; the others are kernels of axolotl that compute the same.
ExpertsImplementation = Literal["eager", "batched_mm", "grouped_mm", "scattermoe", "sonicmoe"]
# The arguments of transformers' BitsAndBytesConfig that weights in 4 bits depend on.
BnbArgument = Literal[
    "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage",
]  # fmt: skip

# The dataset types, with axolotl's names; `pretrain` is `completion` in pretraining_dataset. Those
# with a prompt are in train/data/prompts.py; the first five of them also exist in four styles.
PROMPT_STYLES = ("instruct", "chat", "chatml", "phi")
STYLED_TYPES = ("alpaca", "gpteacher", "oasst", "jeopardy", "explainchoice")
PROMPT_TYPES = (
    *(f"{name}{style}" for name in STYLED_TYPES
      for style in ("", *(f":{style}" for style in PROMPT_STYLES))),
    "concisechoice", "summarizetldr", "reflection",
    "alpaca_instruct", "alpaca_instruct.load_no_prompt",
    "alpaca_chat", "alpaca_chat.load_concise", "alpaca_chat.load_qa", "alpaca_chat.load_camel_ai",
    "alpaca_chat.load_no_prompt",
    "alpaca_w_system", "alpaca_w_system.load_chat", "alpaca_w_system.load_instruct",
    "alpaca_w_system.load_open_orca", "alpaca_w_system.load_open_orca_chatml", "orcamini",
    "context_qa", "context_qa.load_404", "context_qa.load_v2", "creative_acr.load_answer",
    "metharme",
)  # fmt: skip
DATASET_TYPES = (
    *PROMPT_TYPES, "input_output", "completion", "pretrain", "chat_template",
    "chat_template.default",
)  # fmt: skip
# The types that error messages list.
COMMON_TYPES = ("alpaca", "alpaca:chat", "completion", "chat_template", "input_output")
# The values of rl that are implemented, and the types of their data; a record of dpo, ipo and orpo
# has two answers, one of kto has one. The types are in train/preferences/records.py.
# Source: axolotl 0.19.0, prompt_strategies/dpo, kto and orpo (2026-11-27)
PREFERENCE_METHODS = ("dpo", "ipo", "orpo", "kto")
_STYLES = ("chatml", "llama3")
_PAIR_TYPES = (
    "chat_template.default", "chat_template", "chat_template.argilla_chat",
    *(f"{style}{name}" for style in _STYLES
      for name in ("", ".default", ".argilla_chat", ".icr", ".intel", ".prompt_pairs", ".ultra")),
    "zephyr.nectar", "passthrough", "passthrough.default",
)  # fmt: skip
_KTO_TYPES = tuple(
    f"{style}.{name}"
    for style in _STYLES
    for name in ("argilla", "argilla_chat", "intel", "prompt_pairs", "ultra")
)
_ORPO_TYPES = ("chat_template.argilla",)
# Name of a role in records -> its name in chat templates. The first seven are axolotl's.
# Source: axolotl 067b021c, prompt_strategies/chat_template.py:78-87 (2026-11-26)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system", "tool": "tool", "developer": "developer",
         "ipython": "ipython"}  # fmt: skip


class PromptFormat(BaseModel):
    """A prompt that the config describes: the mapping under `type` of a dataset entry.

    Attributes:
        format: the prompt, with {instruction} and {input}.
        no_input_format: the prompt of records without input, with {instruction}.
        system_format: the text before it, with {system}.
        system_prompt: the system message of records without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    field_instruction: Text | None = None
    field_input: Text | None = None
    field_output: Text | None = None
    field_system: Text | None = None
    format: Text | None = None
    no_input_format: Text | None = None
    system_prompt: Annotated[str, Strict()] | None = None
    system_format: Text | None = None


class PreferenceFormat(BaseModel):
    """Texts of preference data that the config describes: the mapping under `type` with `rl`.

    Attributes:
        prompt_format: the prompt, with {prompt} and {system}.
        chosen_format: the preferred answer, with {chosen}.
        rejected_format: the other answer, with {rejected}.
        completion_format: the answer of a record of KTO, with {completion}.
        field_label: the column that says whether that answer is desirable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    field_system: Text | None = None
    field_prompt: Text | None = None
    field_chosen: Text | None = None
    field_rejected: Text | None = None
    field_completion: Text | None = None
    field_label: Text | None = None
    prompt_format: Text | None = None
    chosen_format: Text | None = None
    rejected_format: Text | None = None
    completion_format: Text | None = None


_OF_PREFERENCES = PreferenceFormat.model_fields.keys() - PromptFormat.model_fields.keys()


def _kind_of_type(value: object) -> str:
    if isinstance(value, PreferenceFormat):
        return "preferences"
    if isinstance(value, dict):
        return "preferences" if value.keys() & _OF_PREFERENCES else "format"
    return "format" if isinstance(value, PromptFormat) else "name"


DatasetType = Annotated[
    Annotated[Text, Tag("name")]
    | Annotated[PromptFormat, Tag("format")]
    | Annotated[PreferenceFormat, Tag("preferences")],
    Discriminator(_kind_of_type),
]


class DatasetSpec(BaseModel):
    """One entry of `datasets`: where records are and how they are converted to text.

    Attributes:
        path: a local file or folder, or a name on the Hugging Face hub.
        type: one of DATASET_TYPES, or a prompt; None for records that are tokenized already.
        field: the text column of completion and pretrain.
        field_messages: the column with the conversation.
        message_property_mappings: role/content -> the keys in the records.
        roles: role of the chat template -> its names in the records.
        roles_to_train: the roles whose turns have loss.
        field_chosen: the column of the preferred answer, with rl.
        field_rejected: the column of the other answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: PathText
    type: DatasetType | None = None
    name: Text | None = None
    split: Text | None = None
    revision: Text | None = None
    data_files: Paths | None = None
    ds_type: Literal["json", "csv", "parquet", "arrow", "text"] | None = None
    field: Text | None = None
    text_column: Text | None = None
    skip: Whole | None = None
    shards: Whole | None = None
    shards_idx: Whole | None = None
    preprocess_shards: Whole | None = None
    field_messages: Text | None = None
    field_chosen: Text | None = None
    field_rejected: Text | None = None
    field_system: Text | None = None
    field_tools: Text | None = None
    field_thinking: Text | None = None
    template_thinking_key: Text | None = None
    split_thinking: Flag | None = None
    drop_system_message: Flag | None = None
    message_field_role: Text | None = None
    message_field_content: Text | None = None
    message_property_mappings: dict[Text, Text] | None = None
    message_field_training: Text | None = None
    message_field_training_detail: Text | None = None
    roles: dict[Text, list[Text]] | None = None
    roles_to_train: list[Text] | None = None
    train_on_eos: TrainedEnds | None = None
    train_on_eot: TrainedEnds | None = None
    chat_template: Text | None = None
    chat_template_jinja: Text | None = None
    trust_remote_code: Flag | None = None


class RateGroup(BaseModel):
    """One entry of `lr_groups`: weights with a learning rate of their own.

    Attributes:
        name: what it is called in messages.
        modules: parts of the names of its weights.
        lr: its learning rate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    modules: Annotated[list[Text], Field(min_length=1)]
    lr: Annotated[Positive, BeforeValidator(_to_learning_rate)]


class Qat(BaseModel):
    """The mapping under `qat`: the rounding of a later quantization that training simulates.

    Attributes:
        activation_dtype: of the inputs of linear layers; None leaves them as they are.
        weight_dtype: of weights; axolotl's default, int8, has no fake quantizer in torchao.
        quantize_embedding: whether embeddings are rounded too.
        group_size: numbers of a weight that share a scale.
        fake_quant_after_n_steps: steps that are trained without rounding.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    activation_dtype: Text | None = None
    weight_dtype: Text = "int8"
    quantize_embedding: Flag | None = None
    group_size: Annotated[Count, Field(ge=2)] = 32
    fake_quant_after_n_steps: Whole | None = None


class Config(BaseModel):
    """The validated config of a run, with defaults and without legacy keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # Model and tokenizer
    base_model: PathText | None = None
    revision_of_model: Text | None = None
    model_type: Text | None = None
    tokenizer_type: Text | None = None
    tokenizer_config: PathText | None = None
    trust_remote_code: Flag | None = None
    special_tokens: dict[SpecialToken, Text | list[Text]] | None = None
    tokens: list[Text] | None = None
    added_tokens_overrides: dict[Annotated[int, Field(ge=0)], Text] | None = None
    tokenizer_use_mistral_common: Flag | None = None
    tokenizer_legacy: Flag | None = None
    tokenizer_save_jinja_files: Flag | None = None
    resize_token_embeddings_to_32x: Flag | None = None
    mean_resizing_embeddings: Flag | None = None
    shrink_embeddings: Flag | None = None
    overrides_of_model_config: dict[Text, Any] | None = None
    reinit_weights: Flag | None = None
    unfrozen_parameters: Annotated[list[WeightPattern], BeforeValidator(_to_list)] | None = None
    experts_implementation: ExpertsImplementation | None = None

    # Attention
    attn_implementation: str | None = None
    attn_supports_packing: bool | None = None
    attn_uses_flash_lib: bool | None = None
    attn_needs_dtype_cast: bool | None = None
    attn_backends: dict[LayerKind, str] | None = None
    attn_strict: Flag = False
    attn_forward_only_ok: Flag = False
    attn_known_bad: PathText | None = None
    attn_check_steps: Whole = 200

    # Data
    datasets: Annotated[list[DatasetSpec], Field(min_length=1)] | None = None
    pretraining_dataset: (
        Annotated[list[DatasetSpec], BeforeValidator(_to_list_of_specs), Field(min_length=1)] | None
    ) = None
    streaming: Flag | None = None
    streaming_multipack_buffer_size: Count | None = None
    pretrain_multipack_attn: Flag | None = None
    test_datasets: Annotated[list[DatasetSpec], Field(min_length=1)] | None = None
    dataset_prepared_path: PathText | None = None
    dataset_num_proc: Processes | None = None
    dataset_processes: Processes | None = None
    shuffle_merged_datasets: Flag = True
    shuffle_before_merging_datasets: Flag = False
    dataset_exact_deduplication: Flag = False
    group_by_length: Flag | None = None
    val_set_size: Number = 0.0
    sequence_len: Count = 512
    min_sample_len: Count | None = None
    excess_length_strategy: Literal["drop", "split", "truncate", "raise"] | None = None
    sample_packing: Flag | None = None
    eval_sample_packing: Flag | None = None
    pad_to_sequence_len: Flag | None = None
    batch_flattening: Literal["auto"] | Flag | None = None
    train_on_inputs: Flag = False
    chat_template: Text | None = None
    chat_template_jinja: Text | None = None
    chat_template_kwargs: dict[Text, Any] | None = None
    default_system_message: Text | None = None
    eot_tokens: list[Text] | None = None

    # Optimization
    micro_batch_size: Rows = 1
    eval_batch_size: Rows | None = None
    gradient_accumulation_steps: Count = 1
    batch_size: Count | None = None
    num_epochs: Annotated[Positive, Field(le=1e6)] = 1.0
    max_steps: Count | None = None
    learning_rate: (
        Annotated[float, BeforeValidator(_to_learning_rate), Field(gt=0, allow_inf_nan=False)]
        | None
    ) = None
    embedding_lr: Positive | None = None
    embedding_lr_scale: Positive | None = None
    lr_groups: list[RateGroup] | None = None
    optimizer: Optimizer = "adamw_torch_fused"
    optim_args: Annotated[dict[Text, Any] | None, BeforeValidator(_to_arguments)] = None
    lr_scheduler: Scheduler = "cosine"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    cosine_min_lr_ratio: Share | None = None
    cosine_constant_lr_ratio: Share | None = None
    eta_min: Number | None = None
    lr_quadratic_warmup: Flag | None = None
    warmup_steps: Whole | Below1 | None = None
    warmup_ratio: Share | None = None
    weight_decay: Number = 0.0
    max_grad_norm: Number = 1.0
    adam_beta1: Beta | None = None
    adam_beta2: Beta | None = None
    adam_epsilon: Positive | None = None
    neftune_noise_alpha: Number | None = None
    seed: Seed = 42

    # Precision and memory
    bf16: Literal["auto", "full"] | Flag = "auto"
    fp16: Flag | None = None
    float16: Flag | None = None
    tf32: Literal["auto"] | Flag | None = None
    load_in_4bit: Flag | None = None
    load_in_8bit: Flag | None = None
    quantize_moe_experts: Flag | None = None
    bnb_config_kwargs: dict[BnbArgument, Any] | None = None
    model_quantization_config: Literal["Mxfp4Config", "FineGrainedFP8Config"] | None = None
    model_quantization_config_kwargs: dict[Text, Any] | None = None
    qat: Qat | None = None
    gradient_checkpointing: Literal["offload", "offload_disk"] | Flag | None = None
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    activation_offloading: Literal["legacy", "disk", "hidden_states"] | Flag | None = None
    torch_compile: Literal["auto"] | Flag | None = None
    torch_compile_backend: Text | None = None
    torch_compile_mode: Text | None = None
    liger_rope: Flag | None = None
    liger_rms_norm: Flag | None = None
    liger_glu_activation: Flag | None = None
    liger_swiglu: Flag | None = None
    liger_layer_norm: Flag | None = None
    use_kernels: Flag | None = None

    # Adapter
    adapter: Literal["lora", "qlora"] | None = None
    lora_model_dir: PathText | None = None
    lora_r: Count = 8
    lora_alpha: Count = 16
    lora_dropout: Share = 0.0
    lora_target_modules: Annotated[list[Text] | Text, BeforeValidator(_check_regex)] | None = None
    lora_target_linear: Flag | None = None
    lora_target_parameters: Texts | None = None
    lora_modules_to_save: Texts | None = None
    lora_fan_in_fan_out: Flag | None = None
    peft_use_dora: Flag | None = None
    peft_use_rslora: Flag | None = None
    lora_rank_pattern: dict[Expression, Count] | None = None
    lora_alpha_pattern: dict[Expression, Count] | None = None
    peft_init_lora_weights: Literal["gaussian", "orthogonal"] | Flag | None = None
    peft_layers_to_transform: list[Whole] | None = None
    peft_layers_pattern: Texts | None = None
    loraplus_lr_ratio: Positive | None = None
    loraplus_lr_embedding: Annotated[Positive, BeforeValidator(_to_learning_rate)] | None = None

    # Logging, evaluation, checkpoints
    output_dir: PathText = "./model-out"
    logging_steps: Count = 1
    eval_strategy: Strategy | None = None
    eval_steps: Count | Below1 | None = None
    evals_per_epoch: Whole | None = None
    save_strategy: SaveStrategy | None = None
    save_steps: Count | Below1 | None = None
    saves_per_epoch: Whole | None = None
    save_total_limit: Count | None = None
    save_only_model: Flag | None = None
    save_first_step: Flag | None = None
    load_best_model_at_end: Flag | None = None
    metric_for_best_model: Literal["eval_loss", "loss"] | None = None
    greater_is_better: Annotated[Flag, AfterValidator(_require_lower_is_better)] | None = None
    early_stopping_patience: Count | None = None
    loss_watchdog_threshold: Positive | None = None
    loss_watchdog_patience: Count | None = None
    resume_from_checkpoint: Flag | PathText | None = None
    auto_resume_from_checkpoints: Flag | None = None

    # Trackers and the hub
    use_wandb: Flag | None = None
    wandb_project: TrackerText = None
    wandb_entity: TrackerText = None
    wandb_name: TrackerText = None
    wandb_run_id: TrackerText = None
    wandb_mode: Annotated[
        Literal["online", "offline", "disabled"] | None, BeforeValidator(_unset_if_empty)
    ] = None
    wandb_watch: Annotated[
        Literal["gradients", "parameters", "all", "false"] | None, BeforeValidator(_unset_if_empty)
    ] = None
    wandb_log_model: Annotated[
        Literal["end", "checkpoint", "false"] | None, BeforeValidator(_unset_if_empty)
    ] = None
    use_mlflow: Flag | None = None
    mlflow_tracking_uri: TrackingUri = None
    mlflow_experiment_name: TrackerText = None
    mlflow_run_name: TrackerText = None
    hf_mlflow_log_artifacts: Flag | None = None
    use_tensorboard: Flag | None = None
    report_to: TrackerNames | None = None
    hub_model_id: Repository = None
    hub_strategy: Annotated[
        Literal["end", "every_save", "checkpoint", "all_checkpoints"] | None,
        BeforeValidator(_unset_if_empty),
    ] = None
    hub_revision: TrackerText = None

    # More than one process
    fsdp: list[str] | str | Flag | None = None
    fsdp_config: dict[str, Any] | None = None
    fsdp_version: Literal[1, 2] | None = None
    deepspeed: PathText | dict[str, Any] | None = None
    ddp_timeout: Count | None = None
    ddp_find_unused_parameters: Flag | None = None
    accelerator_config: dict[Text, Any] | None = None
    gc_collect_steps: Annotated[int, BeforeValidator(_require_number), Field(ge=-1)] | None = None
    torch_empty_cache_steps: Count | None = None
    dataloader_num_workers: Workers | None = None
    dataloader_prefetch_factor: Processes | None = None
    dataloader_pin_memory: Flag | None = None

    # Preference training; data/keys.toml refuses values of rl after the rules of
    # config/attention.py.
    rl: Text | Flag | None = None
    rl_beta: Positive | None = None
    dpo_loss_type: Annotated[list[DpoLoss], Field(min_length=1)] | None = None
    dpo_loss_weights: Annotated[list[Number], Field(min_length=1)] | None = None
    dpo_label_smoothing: Beta | None = None
    dpo_use_weighting: Flag | None = None
    kto_desirable_weight: Positive | None = None
    kto_undesirable_weight: Positive | None = None
    orpo_alpha: Positive | None = None

    # Not implemented: data/keys.toml refuses them after the rules of config/attention.py.
    context_parallel_size: Whole | None = None
    scaling_softmax: Flag | None = None

    # attnimg always refuses unknown keys, whatever this value is.
    strict: Flag | None = None


def dataset_entries(config: Config) -> Iterator[tuple[str, DatasetSpec, bool]]:
    """Yield the key, the entry and whether it is for training, for each dataset entry."""
    for name, specs in (
        ("datasets", config.datasets),
        ("pretraining_dataset", config.pretraining_dataset),
        ("test_datasets", config.test_datasets),
    ):
        for index, spec in enumerate(specs or ()):
            if name == "pretraining_dataset" and spec.type is None:
                spec = spec.model_copy(update={"type": "pretrain"})  # as in axolotl
            yield f"{name}[{index}]", spec, name != "test_datasets"


def trains_preferences(config: Config) -> bool:
    """Return whether a run learns from preferences between answers."""
    return config.rl in PREFERENCE_METHODS


def has_reference(config: Config) -> bool:
    """Return whether a run compares the model with a reference: all methods but ORPO do."""
    return trains_preferences(config) and config.rl != "orpo"


def rows_of_example(config: Config) -> int:
    """Return how many rows of a batch an example has: both answers of a pair are in one batch."""
    return 2 if trains_preferences(config) and config.rl != "kto" else 1


def preference_types(method: str) -> tuple[str, ...]:
    """Return the dataset types that have data for a value of rl."""
    return {"kto": _KTO_TYPES, "orpo": _ORPO_TYPES}.get(method, _PAIR_TYPES)


def is_streamed(config: Config) -> bool:
    """Return whether only as many records are read as max_steps needs.

    axolotl always streams a pretraining_dataset, and then needs max_steps.
    Source: axolotl 0.19.0, utils/data/sft.py, prepare_datasets (2026-11-27)
    """
    specs = config.pretraining_dataset or ()
    if config.streaming is not None or not specs:
        return bool(config.streaming)
    others = config.val_set_size or config.dataset_exact_deduplication or specs[0].shards
    possible = len(specs) == 1 and config.max_steps and not others
    return bool(config.streaming_multipack_buffer_size or possible)


def trackers(config: Config) -> tuple[str, ...]:
    """Return the trackers that a config turns on, by their names in transformers' report_to.

    Source: axolotl 0.19.0, utils/wandb_.py, utils/mlflow_.py, core/builders/base.py,
    _configure_reporting (2026-11-27).
    """
    requested = {
        "wandb": config.use_wandb or config.wandb_project,
        "mlflow": config.use_mlflow or config.mlflow_experiment_name,
        "tensorboard": config.use_tensorboard,
    }
    on = {*(config.report_to or ()), *(name for name, value in requested.items() if value)}
    on -= {"wandb"} if config.wandb_mode == "disabled" else set()
    return tuple(name for name in requested if name in on)


def offloading_mode(config: Config) -> str | None:
    """Return how activations are moved to CPU memory: "legacy", without streams, or "streams".

    gradient_checkpointing: offload is the older form.
    Source: axolotl 0.19.0, utils/schemas/validation.py, check_gradient_checkpointing_w_offload
    (2026-11-27).
    """
    if config.activation_offloading == "legacy":
        return "legacy"
    if config.activation_offloading or isinstance(config.gradient_checkpointing, str):
        return "streams"
    return None


def is_chat(spec: DatasetSpec) -> bool:
    """Return whether records are conversations, rendered by a chat template."""
    return isinstance(spec.type, str) and spec.type.startswith("chat_template")


def is_text(spec: DatasetSpec) -> bool:
    """Return whether records are plain text, which may be split anywhere."""
    return spec.type in ("completion", "pretrain")


def type_name(spec: DatasetSpec) -> str:
    """Return what a dataset entry's type is called in messages."""
    if isinstance(spec.type, PromptFormat | PreferenceFormat):
        return "a prompt of the config"
    return spec.type or "tokens"


def role_names(spec: DatasetSpec) -> dict[str, str]:
    """Return a mapping from names of roles in records to those in the chat template."""
    custom = spec.roles or {}
    return (
        ROLES
        | {role: role for role in custom}
        | {name: role for role, names in custom.items() for name in names}
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """The result of `check` for one file.

    Attributes:
        file: the argument as typed.
        on: the GPU it was checked for, "sm_90"; None without --on.
        config: the valid part of the config; None when the file could not be read.
        requested: the requested backend, by name or by legacy key.
        errors: findings that prevent its use.
        warnings: findings that do not.
    """

    file: str
    on: str | None
    config: Config | None
    requested: str | None
    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Return whether the config can be used: there are no errors."""
        return not self.errors


def make_error(code: str, key: str | None, what: str, why: str, do: str) -> Finding:
    """Return the finding of an error."""
    return Finding(code=code, key=key, what=what, why=why, do=do)


def make_warning(code: str, key: str, what: str, do: str) -> Finding:
    """Return the finding of a warning, which has no `why`."""
    return Finding(code=code, key=key, what=what, do=do)
