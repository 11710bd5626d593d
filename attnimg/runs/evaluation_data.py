"""Load the evaluation data of a run, and compare them with the data that it was trained on.

The receipt of a run has the number and a hash of each source's documents. A loss on documents that
the run was trained on would be too low, and one on changed documents is not comparable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, counted
from attnimg.runs.folder import RunFolder
from attnimg.train.run import TrainReport

if TYPE_CHECKING:
    from attnimg.train.data import Documents, SourceFigures

# Keys that decide which documents val_set_size splits off.
_SPLIT_KEYS = (
    "val_set_size", "seed", "shuffle_merged_datasets", "shuffle_before_merging_datasets",
    "dataset_exact_deduplication",
)  # fmt: skip


def load_data(
    config: Config, run: RunFolder | None, report: TrainReport
) -> tuple[Any, dict[str, Documents]]:
    """Load the tokenizer and the evaluation documents, and report their statistics.

    Args:
        config: of the evaluation.
        run: the trained weights; None for the base model alone.
        report: receives the statistics and warnings.

    Returns:
        The tokenizer, and the key of each dataset -> its documents.

    Raises:
        AttnimgError: val_set_size may split off documents that the run trained on (data-differs).
    """
    from attnimg.train.data import load_evaluation_documents, summary_line
    from attnimg.train.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config, log=report.log)
    parts = load_evaluation_documents(config, tokenizer)
    for documents in parts.values():
        for figures in documents.figures:
            report.log(summary_line(figures))
        for warning in documents.warnings:
            report.log(f"warning: {warning}")
        if run is not None and run.receipt is not None:
            _compare_data(documents.figures, config, run)
            for text in _changed_tests(documents.figures, run):
                report.log(f"warning: {text}")
    return tokenizer, parts


def _compare_data(figures: tuple[SourceFigures, ...], config: Config, run: RunFolder) -> None:
    """Raise if val_set_size may split off documents that the run trained on.

    Raises:
        AttnimgError: code data-differs.
    """
    if not config.val_set_size:
        return
    changed = [
        f"{key}: found {getattr(config, key)}, trained with {getattr(run.config, key)}"
        for key in _SPLIT_KEYS
        if getattr(config, key) != getattr(run.config, key)
    ]
    before = [found for found in _trained_figures(run) if not found["key"].startswith("test_")]
    if len(before) != len(figures):
        changed.append(f"found {counted(len(figures), 'dataset')}, trained on {len(before)}")
    changed += [
        f"{now.key} ({now.path}): found {counted(now.documents, 'document')}, "
        f"SHA-256 {now.content[:12]}; trained on {then.get('documents')}, "
        f"{str(then.get('content'))[:12]}"
        for now, then in zip(figures, before, strict=False)
        if not _has_same_split(now, then, config)
    ]
    if changed:
        raise AttnimgError(
            "val_set_size would split off documents that the run trained on",
            why="\n".join(changed),
            do="restore what has changed, or list data that the run was not trained on in "
            "test_datasets of a YAML file in place of val_set_size",
            code="data-differs",
            key="val_set_size",
        )


def _has_same_split(now: SourceFigures, then: Mapping[str, Any], config: Config) -> bool:
    """Return whether a source has the documents of training, even if rendered differently."""
    if now.content == then.get("content"):
        return True
    is_same = now.read and (now.read, now.documents) == (then.get("read"), then.get("documents"))
    return bool(is_same) and not config.dataset_exact_deduplication


def _changed_tests(figures: tuple[SourceFigures, ...], run: RunFolder) -> Iterator[str]:
    """Yield a warning for each source of test_datasets that has changed since training."""
    before = [found for found in _trained_figures(run) if found["key"].startswith("test_")]
    for now in figures:
        contents = [found.get("content") for found in before if found.get("path") == now.path]
        if now.key.startswith("test_") and contents and now.content not in contents:
            yield (
                f"{now.key} ({now.path}) has other documents than in training (SHA-256 "
                f"{now.content[:12]}, in training {str(contents[0])[:12]}): the loss is not "
                "comparable with the run's eval_loss"
            )


def _trained_figures(run: RunFolder) -> list[Mapping[str, Any]]:
    """Return the statistics of the sources in a run's receipt."""
    return list((run.receipt or {}).get("data") or ())
