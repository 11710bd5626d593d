"""Train on preferences with TRL's DPOTrainer, KTOTrainer and ORPOTrainer.

The losses are TRL's. RunTrainer adds what every run has: checkpoints, signals, the running check of
attention calls, metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from attnimg.config.schema import Config
from attnimg.train.engine import EVAL_KEYS, TRAIN_KEYS, RunTrainer
from attnimg.train.loss import aux_loss_coefficient, score_tokens, use_model_head

if TYPE_CHECKING:
    import torch

    from attnimg.train.fit import Session

# The values that TRL logs for dpo, kto and orpo, as metrics.jsonl has them.
_KEYS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "kl", "nll_loss", "log_odds_ratio", "log_odds_chosen",
)  # fmt: skip
# Arguments of SFTConfig that TRL's other trainers do not have.
_OF_SFT = ("dataset_kwargs", "packing", "padding_free", "max_length")


class PreferenceTrainer(RunTrainer):
    """What the engines of all preference methods share."""

    train_keys = (*TRAIN_KEYS, *_KEYS)
    eval_keys = (*EVAL_KEYS, *(f"eval_{key}" for key in _KEYS))

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """Return the dataset unchanged: data.py has tokenized it."""
        return dataset

    def window_sums(self) -> dict[str, Any]:
        """Return TRL's values since the last log; they are the same on all processes."""
        found = {name: list(values) for name, values in self._logged("train").items()}
        return {"preferences": found}

    def restore_window_sums(self, window: Mapping[str, Any]) -> None:
        """Restore the values of `window_sums`."""
        for name, values in window.get("preferences", {}).items():
            self._logged("train")[name] = list(values)

    def _logged(self, mode: str) -> dict[str, list[float]]:
        """Return TRL's values since the last log, which it averages."""
        found: dict[str, list[float]] = self._metrics[mode]
        return found


class ReferenceTrainer(PreferenceTrainer):
    """What the engines of dpo and kto share: a frozen reference model.

    Without an adapter, the reference is a copy of the model. With a new adapter, it is the model
    without it; with a saved one (lora_model_dir), the model with a frozen copy of that adapter.

    Attributes:
        own_head: whether `loss_terms` uses the model's own logits, not TRL's head.
        small_logits: whether that is because they are small: never here.
        aux_coefficient: the weight of the auxiliary loss in the model's own loss; None without one.
    """

    def __init__(self, session: Session, **options: Any) -> None:
        model = options["model"]
        config = model.config.get_text_config()
        self.own_head = self.small_logits = False
        self.aux_coefficient = (
            aux_loss_coefficient(model) if getattr(config, "output_router_logits", None) else None
        )
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        super().__init__(session, ref_model=session.reference, **options)
        if hasattr(self.model, "get_base_model"):
            # TRL has added a copy of the adapter as reference, named ref.
            if session.config.lora_model_dir:
                self._keep_reference_adapter()
            else:
                # A new adapter has no effect: the reference is the model without it.
                self.model.delete_adapter("ref")
            for name, weight in self.model.named_parameters():
                weight.requires_grad_(name in trained)

    def _keep_reference_adapter(self) -> None:
        """Copy the adapter into TRL's copy again, and save only the trained one."""
        weights = dict(self.model.named_parameters())
        for name, weight in weights.items():
            parts = name.split(".")
            if "default" in parts:
                # TRL does not copy an adapter on an embedding, and RunTrainer may have cast the
                # adapter after TRL copied it.
                copy = ".".join("ref" if part == "default" else part for part in parts)
                weights[copy].data = weight.data.clone()
        self.model.save_pretrained = partial(
            self.model.save_pretrained, selected_adapters=["default"]
        )

    def loss_terms(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the negative log-likelihood of a batch from the log-probabilities that TRL reads.

        own_loss.py compares it with the model's own loss.
        """
        if self.aux_coefficient is not None:
            inputs["output_router_logits"] = True
        head = use_model_head(model, score_tokens) if self.own_head else model
        outputs = head(**inputs, fused_lm_head=True, use_cache=False)
        count = num_items_in_batch or outputs.label_mask.sum()
        aux = outputs.aux_loss if self.aux_coefficient is not None else None
        return -outputs.log_probs.sum() / count, aux


class DpoEngine(ReferenceTrainer, DPOTrainer):  # type: ignore[misc]  # TRL's types are not followed
    """Train with DPO or one of its variants, such as IPO."""


class KtoEngine(ReferenceTrainer, KTOTrainer):  # type: ignore[misc]  # TRL's types are not followed
    """Train with KTO."""


class _Tokenized:
    """A placeholder dataset, so that ORPOTrainer tokenizes nothing when it is created."""

    def map(self, *_: Any, **__: Any) -> _Tokenized:
        """Return the dataset unchanged."""
        return self

    def __len__(self) -> int:
        """Return a number of rows, which TRL requires and does not use."""
        return 1


class OrpoEngine(PreferenceTrainer, ORPOTrainer):  # type: ignore[misc]  # TRL's types are not followed
    """Train with ORPO, which needs no reference."""

    def __init__(self, session: Session, **options: Any) -> None:
        found = {name: options[name] for name in ("train_dataset", "eval_dataset")}
        given = {name: data and _Tokenized() for name, data in found.items()}
        super().__init__(session, **{**options, **given})
        self.train_dataset, self.eval_dataset = found.values()
        self.use_dpo_data_collator = True  # PreferenceCollator wraps that collator

    def _logged(self, mode: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = self._stored_metrics[mode]
        return found


def build_preference_engine(
    session: Session, arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> PreferenceTrainer:
    """Build the engine for a value of rl.

    Source: axolotl 0.19.0, core/builders/rl.py, _build_training_arguments (2026-11-27)

    Args:
        session: config, model, rows and state of the run.
        arguments: as `training_arguments` returns them.
        options: the other arguments of TRL's trainer.
    """
    config = session.config
    common = {name: value for name, value in arguments.items() if name not in _OF_SFT}
    # Rows are cut to sequence_len already.
    common["max_length"] = config.sequence_len
    if config.rl_beta or config.orpo_alpha:
        common["beta"] = config.rl_beta or config.orpo_alpha
    if config.rl == "orpo":
        return OrpoEngine(session, args=ORPOConfig(**common), **options)
    if config.rl == "kto":
        weights = {
            "desirable_weight": config.kto_desirable_weight or 1.0,
            "undesirable_weight": config.kto_undesirable_weight or 1.0,
        }
        return KtoEngine(session, args=KTOConfig(**common, **weights), **options)
    return DpoEngine(session, args=DPOConfig(**common, **_dpo_arguments(config)), **options)


def _dpo_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of the losses of DPO."""
    losses = ["ipo"] if config.rl == "ipo" else config.dpo_loss_type
    given = {
        "loss_type": losses,
        "loss_weights": config.dpo_loss_weights,
        "label_smoothing": config.dpo_label_smoothing,
        "use_weighting": config.dpo_use_weighting,
    }
    return {name: value for name, value in given.items() if value is not None}
