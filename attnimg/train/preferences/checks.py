"""Warn of preference data from which nothing, or not what was meant, is learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attnimg.config.schema import Config
from attnimg.train.data.prepare import Tally
from attnimg.train.data.records import bad_file
from attnimg.train.data.sources import Source
from attnimg.train.distributed import world_size

if TYPE_CHECKING:
    from datasets import Dataset


def equal_answers(source: Source, same: Tally, pairs: int) -> Iterator[str]:
    """Yield a warning if some pairs of a source have equal answers.

    Raises:
        AttnimgError: all have (bad-data).
    """
    if not same["answers"]:
        return
    why = "the difference between two answers is trained, and it is always 0 here"
    if same["answers"] == pairs:
        raise bad_file(
            f"no pair of {source.key} has two different answers",
            why=f"{why}; the first is {same.places['answers'][0]}",
            do="write different answers, or remove the entry",
            key=source.key,
        )
    yield (
        f"{same['answers']:,} of {pairs:,} pairs of {source.key} have equal answers, so nothing is "
        f"learned from their difference: {', '.join(same.places['answers'])}; correct or remove "
        "these records"
    )


def preference_warnings(
    train: Dataset, validation: Dataset | None, config: Config
) -> Iterator[str]:
    """Yield warnings on the records of kto: one label only, or a batch of one row.

    Raises:
        AttnimgError: there is only one record to train on (bad-data).
    """
    if config.rl != "kto":
        return
    if len(train) == 1:
        raise bad_file(
            "there is only one record to train on",
            why="kto estimates the KL term from the other answers of a batch; needed two or more",
            do="add records to the data",
            key="datasets[0]",
        )
    labels = {parts[-1] for parts in train["parts"]}
    if len(labels) == 1:
        kind, missing = (
            ("desirable", "undesirable") if 1 in labels else ("undesirable", "desirable")
        )
        yield f"all answers are {kind}, so kto compares nothing: add {missing} ones"
    # Several processes fill up the last batch.
    sizes = {"micro_batch_size": (train, config.micro_batch_size)}
    if validation is not None:
        size = config.eval_batch_size or config.micro_batch_size
        sizes["eval_batch_size"] = (validation, size)
    for key, (rows, size) in sizes.items() if world_size() == 1 else ():
        count = len(rows)
        if count % size == 1:
            fitting = [number for number in range(2, count + 1) if count % number != 1]
            do = "evaluate on two records or more"
            if fitting:
                nearest = min(fitting, key=lambda number: abs(number - size))
                do = f"add or remove a record, or set {key}: {nearest}"
            yield (
                f"with {key} {size}, the last batch of {count:,} records has one row, whose KL "
                f"term is its own reward, as in TRL: {do}"
            )
