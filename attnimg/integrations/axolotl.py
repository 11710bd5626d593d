"""Select, verify and apply an attention backend in a run of axolotl.

    plugins:
      - attnimg.integrations.axolotl.AttnimgPlugin

The steps, at the hooks that axolotl calls in this order:

    register             select and verify a backend; set attn_implementation, which axolotl's
                         packing, collator and precision follow
    pre_model_load       register the backend with transformers
    post_trainer_create  apply it to the loaded model, check packing with the trainer's collator,
                         and write attnimg.json to output_dir

Source: axolotl 0.19.0, cli/config.py, loaders/model.py, loaders/patch_manager.py, train.py,
core/builders/causal.py and utils/collators/batching.py (2026-11-27).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from axolotl.logging_config import AxolotlOrWarnErrorFilter
from axolotl.utils.collators import (
    BatchSamplerDataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)
from axolotl.utils.config import resolve_dtype
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from pydantic import BaseModel
from transformers import AutoConfig, DataCollatorWithFlattening

import attnimg
from attnimg.api.advice import config_words
from attnimg.config.attention import AUTO, LEGACY, replace_legacy_keys
from attnimg.errors import AttnimgError
from attnimg.integrations.transformers import apply_on_all_ranks

LOG = get_logger("axolotl.integrations.attnimg")

RECEIPT = "attnimg.json"

# With these, axolotl's validation accepts the name and transformers loads the kernel. Other names
# would make axolotl apply its own kernels (xformers, sage, fp8), or are attnimg's own.
_LOADABLE = frozenset({"eager", "sdpa", "flex_attention"}) | {
    f"flash_attention_{version}" for version in (2, 3, 4)
}

# Key -> the values without effect, and what another value does.
_CONFLICTS: dict[str, tuple[tuple[object, ...], str]] = {
    "sdpa_varlen": ((None, False), "it replaces sdpa by a kernel that was not verified"),
    "large_head_attention": ((None, "sdpa"), "it replaces sdpa by a kernel that was not verified"),
    "flash_attn_d512": ((None, False), "it replaces sdpa by a kernel that was not verified"),
    "gemma4_hybrid_attn_impl": ((None, False), "it changes the attention of single layers"),
    "context_parallel_size": ((None, 0, 1), "it replaces flash_attention_2 by ring attention"),
    "sequence_parallel_degree": ((None, 0, 1), "it replaces flash_attention_2 by ring attention"),
    "use_ray": ((None, False), "a backend would be selected for the driver, which has no GPU"),
}


class AttnimgArgs(BaseModel):
    """The keys that the plugin adds to axolotl's config.

    Attributes:
        attn_strict: no other member of the flash family may replace the one in attn_implementation.
        attn_backends: the backend for each kind of layers, instead of attn_implementation.
    """

    attn_strict: bool | None = None
    attn_backends: dict[Literal["sliding", "full"], str] | None = None


class AttnimgPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is not installed beside mypy
    """Axolotl's hooks, which select, verify and apply a backend; see the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._choice: attnimg.Choice | None = None
        self._asked: dict[str, Any] = {}
        self._in_use = ExitStack()
        self._registered = False

    def get_input_args(self) -> str:
        """Return the class with the keys that the plugin adds to the config."""
        return "attnimg.integrations.axolotl.AttnimgArgs"

    @config_words()
    def register(self, cfg: dict[str, Any]) -> None:
        """Select and verify a backend, and set attn_implementation for the rest of axolotl.

        Raises:
            AttnimgError: no backend fits or passes its proof, or a key of axolotl would change the
                attention after its proof.
        """
        self._restore()
        _forward_log()
        name = _requested(cfg)
        if cfg.get("is_preprocess"):  # trains no model, and may run on a machine without a GPU
            cfg["attn_implementation"] = None if name == AUTO else name
            return
        _require_no_conflict(cfg)
        args = AttnimgArgs.model_validate(
            {key: cfg[key] for key in AttnimgArgs.model_fields if cfg.get(key) is not None}
        )
        self._asked = {
            "backend": name,
            "backends": args.attn_backends,
            "strict": bool(args.attn_strict),
        }
        config = AutoConfig.from_pretrained(
            cfg.get("base_model_config") or cfg["base_model"],
            trust_remote_code=bool(cfg.get("trust_remote_code")),
            revision=cfg.get("revision_of_model") or "main",
        )
        self._choice = attnimg.select(config, **self._asked, **_settings(cfg)).verify()
        loaded = self._choice.implementation
        cfg["attn_implementation"] = loaded if loaded in _LOADABLE else "sdpa"
        # If the key were absent, axolotl would replace sdpa by torch's varlen_attn.
        cfg["sdpa_varlen"] = False
        LOG.info(
            "attnimg: axolotl loads the model with attn_implementation: %s, sdpa_varlen: false",
            cfg["attn_implementation"],
        )

    @config_words()
    def pre_model_load(self, cfg: DictDefault) -> None:  # noqa: ARG002  the hook's signature
        """Register the backend with transformers until the end of training."""
        # axolotl calls this again for a reference model.
        if self._choice is not None and not self._registered:
            self._in_use.enter_context(attnimg.use(self._choice))
            self._registered = True

    @config_words()
    def post_trainer_create(self, cfg: DictDefault, trainer: Any) -> None:
        """Apply the backend to the model, check its packing, and write the receipt.

        Raises:
            KernelError: no allowed backend fits the loaded model.
            PackingLeak: packed documents affect one another with every allowed backend.
            AttnimgError: the processes of the run chose different backends.
        """
        planned = self._choice
        if planned is None:
            return
        settings = _settings(cfg)
        collator = _collator(trainer) if settings["packing"] else None
        choice = apply_on_all_ranks(
            trainer.model,
            cpu=trainer.args.device.type == "cpu",
            collator=collator,
            **self._asked,
            **settings,
        )
        if choice.backend != planned.backend:
            LOG.warning(
                "attnimg: %s replaces %s, for which axolotl packed: %s",
                choice.backend,
                planned.backend,
                choice.because,
            )
        LOG.info("attnimg: the model trains with %s (%s)", choice.backend, choice.implementation)
        if trainer.is_world_process_zero():
            folder = Path(cfg.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(choice.to_dict(), indent=2)
            (folder / RECEIPT).write_text(f"{text}\n", encoding="utf-8")
            LOG.info("attnimg: wrote %s", folder / RECEIPT)

    def post_train_unload(self, cfg: DictDefault) -> None:  # noqa: ARG002  the hook's signature
        """Restore transformers' registries."""
        self._restore()

    def on_config_validation_error(self, cfg: dict[str, Any]) -> None:  # noqa: ARG002
        """Discard the choice that was made for a config that axolotl refuses."""
        self._restore()

    def _restore(self) -> None:
        self._in_use.close()
        self._choice, self._registered = None, False


def _requested(cfg: dict[str, Any]) -> str:
    """Return the requested name or "auto", and remove axolotl's legacy flags from the config.

    Raises:
        AttnimgError: attn_implementation and legacy flags contradict one another.
    """
    keys = ("attn_implementation", *LEGACY)
    given = {key: cfg[key] for key in keys if cfg.get(key) not in (None, "")}
    values, findings = replace_legacy_keys(given)
    for found in findings:
        if not found.code.startswith("legacy-flag-"):
            raise AttnimgError(
                found.what, why=found.why, do=found.do, code=found.code, key=found.key
            )
        LOG.warning("attnimg: %s; %s", found.what, found.do)
    for key in LEGACY:
        cfg.pop(key, None)
    return str(values.get("attn_implementation", AUTO))


def _require_no_conflict(cfg: Mapping[str, Any]) -> None:
    """Raise if axolotl would run another attention kernel than the verified one."""
    for key, (harmless, why) in _CONFLICTS.items():
        if cfg.get(key) not in harmless:
            raise AttnimgError(
                f"{key} can't be used with attnimg's plugin",
                why=f"found {key}: {cfg[key]}; {why}",
                do=f"remove {key}, or the plugin",
                code="axolotl-conflict",
                key=key,
            )


def _settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of attnimg.select that describe the run."""
    given = ("fp16", "float16", "bfloat16", "load_in_8bit", "device")
    precision = DictDefault({key: cfg.get(key) for key in given})
    # The default of axolotl's schema, also for null; `register` gets the config before validation.
    precision.bf16 = "auto" if cfg.get("bf16") is None else cfg["bf16"]
    resolve_dtype(precision)
    bf16 = precision.bf16 or precision.bfloat16
    return {
        "packing": bool(cfg.get("sample_packing") or cfg.get("batch_flattening")),
        "sequence_len": cfg.get("sequence_len"),
        "micro_batch_size": cfg.get("micro_batch_size") or 1,
        "dtype": precision.torch_dtype,
        "autocast": bool(bf16 != "full" if bf16 else precision.fp16),
        "compiled": cfg.get("torch_compile") is True,
        "checkpointing": bool(cfg.get("gradient_checkpointing")),
        "trust_remote_code": bool(cfg.get("trust_remote_code")),
    }


def _collator(trainer: Any) -> Any:
    """Return the trainer's collator for attnimg.check_packing; None for an unknown one."""
    found = trainer.data_collator
    if isinstance(
        found, (BatchSamplerDataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq)
    ):
        return _Multipack(found, trainer.args)
    if isinstance(found, DataCollatorWithFlattening):
        return found
    LOG.warning(
        "attnimg: packing is checked with attnimg's own batches, not with %s, which is not known",
        type(found).__name__,
    )
    return None


class _Multipack:
    """Call axolotl's collator for sample_packing with rows of documents, as its sampler does.

    attnimg.check_packing passes one example per row, with the documents' lengths in seq_lengths.
    """

    padding_free = True

    def __init__(self, collator: Any, args: Any) -> None:
        # axolotl pads to sequence_len; a short row has the same layout and needs less memory.
        self._collator = replace(collator, pad_to_multiple_of=64)
        self._rows = bool(args.multipack_real_batches)
        self._mask = not args.sample_packing_drop_attention_mask

    def __call__(self, examples: list[dict[str, Any]]) -> Mapping[str, Any]:
        """Return the batch of these rows."""
        rows = [[*self._documents(example)] for example in examples]
        batch: Mapping[str, Any] = self._collator(rows if self._rows else [[*chain(*rows)]])
        return batch

    def _documents(self, example: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a row's documents with the columns of axolotl's datasets."""
        tokens = iter(example["input_ids"])
        for length in example["seq_lengths"]:
            ids = [next(tokens) for _ in range(length)]
            document = {"input_ids": ids, "labels": ids, "position_ids": [*range(length)]}
            yield document | ({"attention_mask": [1] * length} if self._mask else {})


class _ToAxolotl(logging.Handler):
    """Send attnimg's log to axolotl's logger: its console hides INFO records of other loggers."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record."""
        LOG.log(record.levelno, "attnimg: %s", record.getMessage())


def _forward_log() -> None:
    log = logging.getLogger("attnimg")
    log.setLevel(logging.INFO)
    log.propagate = False
    for found in log.filters[:]:
        if isinstance(found, AxolotlOrWarnErrorFilter):
            log.removeFilter(found)
    if not any(isinstance(handler, _ToAxolotl) for handler in log.handlers):
        log.addHandler(_ToAxolotl())
