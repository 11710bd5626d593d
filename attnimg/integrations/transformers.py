"""Apply attnimg in transformers' Trainer and in trainers derived from it, such as TRL's SFTTrainer.

    trainer = SFTTrainer(model, args=SFTConfig(packing=True), ..., callbacks=[AttnimgCallback()])

Trainer calls on_train_begin after accelerate has placed, cast and wrapped the model, and before the
first forward pass. This is the right time: models read the name of their attention at each call,
DDP and torch.compile wrap the same module (compilation happens in the first step), the model is on
its device, and the trainer's own collator is known. Source: transformers 5.22.2, trainer.py,
_prepare_for_training and _inner_training_loop; accelerate 1.15.0, prepare_model (2026-11-27).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Unpack

from transformers import TrainerCallback

from attnimg import api
from attnimg.api.advice import require_known
from attnimg.errors import AttnimgError
from attnimg.train.distributed import require_same_on_all_ranks

_log = logging.getLogger("attnimg")

# The file in output_dir that has the choice.
CHOICE_FILE = "attnimg.json"


class AttnimgCallback(TrainerCallback):  # type: ignore[misc]  # transformers ships no strict types
    """Select, verify and apply a backend when training begins; restore the model when it ends.

    The choice is logged by the logger "attnimg", and written to attnimg.json in output_dir. If
    training ends with an exception, Trainer calls no callback: the model keeps the backend, until
    the next `train()` selects again, or `attnimg.restore(model)`.

    Args:
        settings: the arguments of `attnimg.select`. Those left out come from the TrainingArguments:
            packing from `packing` and `padding_free`, or from a DataCollatorWithFlattening;
            sequence_len from `max_length`; micro_batch_size from `per_device_train_batch_size`;
            dtype and autocast from `bf16` and `fp16`; compiled from `torch_compile`; checkpointing
            from `gradient_checkpointing`.

    Attributes:
        choice: the choice of the last training; None before training.

    Example:
        >>> from attnimg.integrations.transformers import AttnimgCallback
        >>> callback = AttnimgCallback(backend="sdpa")
        >>> print(callback.choice)
        None
    """

    def __init__(self, **settings: Unpack[api.Settings]) -> None:
        require_known("AttnimgCallback", settings, api.Settings.__annotations__)
        self.settings = settings
        self.choice: api.Choice | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, train_dataloader: Any, **_: Any
    ) -> None:
        """Apply the backend to the model, with the same result in all processes.

        Raises:
            KernelError: no allowed backend fits and passes its proof.
            PackingLeak: packed documents affect one another with every allowed backend.
            AttnimgError: processes chose different backends, or packing can't be checked.
        """
        del control
        collator = getattr(train_dataloader, "collate_fn", None)
        # Trainer wraps the collator of a dataset that is not one of the library `datasets`.
        collator = getattr(collator, "data_collator", collator)
        implied = read_settings(args, collator)
        settings = implied | self.settings
        packing = bool(settings.get("packing"))
        if implied["packing"] and not packing:
            _log.warning(
                "packing=False, but %s packs documents: their isolation is not checked; "
                "leave packing out",
                type(collator).__name__,
            )
        if packing:
            _require_whole_weights(model)
        choice = apply_on_all_ranks(
            model,
            cpu=args.device.type == "cpu",
            collator=collator if packing else None,
            **settings,
        )
        self.choice = choice
        if state.is_world_process_zero:
            path = Path(args.output_dir) / CHOICE_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(choice.to_dict(), indent=2) + "\n", encoding="utf-8")
            _log.info("the choice was written to %s", path)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Restore the model's previous attention."""
        del args, state, control
        api.restore(model)


def apply_on_all_ranks(
    model: Any, *, cpu: bool, collator: Any = None, **settings: Unpack[api.Settings]
) -> api.Choice:
    """Apply a backend to a model in each process of a run; see attnimg.apply.

    Args:
        model: the model.
        cpu: whether the processes use gloo, because there is no GPU.
        collator: for the packing check; None for attnimg's own batches.
        settings: the arguments of `attnimg.select`.

    Raises:
        AttnimgError: it failed, or the processes have different results; then nothing is applied.
    """
    choice = failure = None
    try:
        choice = api.apply(model, collator=collator, **settings)
    except AttnimgError as error:  # raised below, unless another process has another result
        failure = error
    try:
        require_same_on_all_ranks(
            {"attention": _digest(choice) if choice else str(failure)}, cpu=cpu, timeout_s=None
        )
    except AttnimgError:
        if choice is not None:
            api.restore(model)
        raise
    if choice is None:
        assert failure is not None
        raise failure
    return choice


def read_settings(args: Any, collator: Any = None) -> api.Settings:
    """Return the arguments of `attnimg.select` that TrainingArguments or an SFTConfig imply.

    Args:
        args: the trainer's arguments.
        collator: the trainer's collator.
    """
    from transformers import DataCollatorWithFlattening

    packing = bool(getattr(args, "packing", False))
    if packing and getattr(args, "packing_strategy", None) == "wrapped":
        # TRL cuts documents at any token and passes no boundaries.
        _log.warning("packing_strategy wrapped: documents of a row attend to one another")
        packing = False
    if getattr(args, "padding_free", False) or isinstance(collator, DataCollatorWithFlattening):
        packing = True
    settings = api.Settings(
        packing=packing,
        sequence_len=getattr(args, "max_length", None),
        micro_batch_size=args.per_device_train_batch_size,
        compiled=bool(args.torch_compile),
        checkpointing=bool(args.gradient_checkpointing),
        autocast=False,
    )
    if args.bf16 or args.fp16:
        settings["dtype"] = "bfloat16" if args.bf16 else "float16"
        # DeepSpeed casts the weights in place of autocast.
        settings["autocast"] = not getattr(args, "deepspeed_plugin", None)
    return settings


def _digest(choice: api.Choice) -> list[Any]:
    """Return the parts of a choice that must be the same in all processes."""
    groups = [[group.layers.count, group.verdict.backend.name] for group in choice.groups]
    return [choice.backend, choice.kernel, groups]


def _require_whole_weights(model: Any) -> None:
    """Raise if FSDP or ZeRO-3 has split the weights: the check can't call such a model."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    split = next(
        (
            type(module).__name__
            for module in model.modules()
            if isinstance(module, FSDPModule | FullyShardedDataParallel)
        ),
        None,
    )
    if split is None and any(hasattr(weight, "ds_id") for weight in model.parameters()):
        split = "DeepSpeed's ZeRO-3"
    if split is None:
        return
    raise AttnimgError(
        "packing can't be checked on weights that are split between processes",
        why=f"found {split}; the check calls the whole model",
        do="call attnimg.apply(model, packing=True, collator=...) before the trainer is made, "
        "without AttnimgCallback",
        code="split-weights",
    )
