"""Compute the loss and the rewards of a preference run on its evaluation data, as training does.

The engine is that of training, so rows, batches and the reference are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import Config
from attnimg.pipeline import Selected
from attnimg.runs.folder import WITHOUT_TRAINING, RunFolder
from attnimg.train.run import TrainReport

if TYPE_CHECKING:
    from attnimg.train.data import Documents
    from attnimg.train.fit import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceEvaluation:
    """The loss and rewards on one dataset.

    Attributes:
        dataset: the config key, "test_datasets[0]".
        path: the path or name in the config; None for all datasets together.
        documents: number of evaluated records: pairs, or single answers for kto.
        tokens: number of their tokens.
        rl: the method.
        loss: the loss of the method, the mean over records.
        metrics: TRL's values, the mean over batches: "rewards/accuracies", "rewards/margins"...
    """

    dataset: str
    path: str | None
    documents: int
    tokens: int
    rl: str
    loss: float
    metrics: Mapping[str, float]


def load_frozen_reference(
    config: Config, run: RunFolder | None, model: Any, selected: Selected, tokenizer: Any
) -> Any:
    """Return the model from which the run started; None where the engine needs no second model.

    Args:
        config: of the evaluation.
        run: the trained weights; None for the base model alone.
        model: the evaluated model.
        selected: the selected backend.
        tokenizer: the run's tokenizer.
    """
    from attnimg.train.model import load_model
    from attnimg.train.preferences.reference import load_reference, needs_reference

    if not needs_reference(config):
        return None
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "implementation": selected.implementation,
        "context": selected.context,
        "needs_dtype_cast": selected.backend.needs_dtype_cast,
    }
    if run is None:
        return load_reference(config, model, **options)
    reference = load_model(run.config.model_copy(update=WITHOUT_TRAINING), **options)
    reference.requires_grad_(False)
    return reference.eval()


def evaluate_preferences(
    parts: Mapping[str, Documents],
    run: RunFolder | None,
    *,
    make_session: Callable[[Documents], Session],
    report: TrainReport,
    advance: Callable[[str, int, int], None],
) -> tuple[PreferenceEvaluation, ...]:
    """Evaluate each dataset with the engine of training.

    Args:
        parts: key of a dataset -> its documents.
        run: the trained weights; None for the base model alone.
        make_session: returns the session of one dataset.
        report: receives the result of the comparison of log-probabilities.
        advance: receives the progress.
    """
    from attnimg.train.fit import build_engine
    from attnimg.train.preferences.log_probs import check_log_probs, log_probs_text
    from attnimg.train.records import ProgressView

    engine: Any = None
    found = []
    if len(parts) > 1:
        parts = {**parts, "all": _join(parts)}
    for number, (key, documents) in enumerate(parts.items()):
        advance(f"evaluating {key}", number, len(parts))
        session = make_session(documents)
        if engine is None:
            view = ProgressView(report.console, total=1, visible=False)
            engine = build_engine(session, view, lambda _: None)
            if run is not None and session.config.lora_model_dir:
                _load_reference_adapter(engine.model, Path(session.config.lora_model_dir))
            check = check_log_probs(
                engine,
                session.train,
                context=session.run.context,
                pad_token_id=session.tokenizer.pad_token_id,
            )
            report.log(log_probs_text(check))
        engine.session = session
        values = engine.evaluate(eval_dataset=session.train.dataset)
        found.append(_result(key, documents, session, values, names=engine.eval_keys))
    return tuple(found)


def _join(parts: Mapping[str, Documents]) -> Documents:
    """Return all documents as one dataset, since batches may have records of two."""
    from datasets import concatenate_datasets

    validation = [documents.validation for documents in parts.values()]
    together = concatenate_datasets([dataset for dataset in validation if dataset is not None])
    return replace(next(iter(parts.values())), train=together, validation=together)


def _load_reference_adapter(model: Any, folder: Path) -> None:
    """Load the adapter with which a run started as its reference.

    The engine has made the reference of the trained adapter.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    weights = load_peft_weights(str(folder), device="cpu")
    set_peft_model_state_dict(model, weights, adapter_name="ref")


def _result(
    key: str, documents: Documents, session: Session, values: Mapping[str, float],
    *, names: tuple[str, ...],
) -> PreferenceEvaluation:  # fmt: skip
    """Return the result of one dataset."""
    from attnimg.train.rows import row_lengths

    sources = [figures for figures in documents.figures if figures.key == key]
    metrics = {
        name.removeprefix("eval_"): float(values[name])
        for name in names
        if name in values and name != "eval_loss"
    }
    return PreferenceEvaluation(
        dataset=key,
        path=sources[0].path if sources else None,
        documents=len(session.train.dataset),
        tokens=int(row_lengths(session.train.dataset).sum()),
        rl=str(session.config.rl),
        loss=float(values["eval_loss"]),
        metrics=metrics,
    )
