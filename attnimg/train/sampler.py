"""Draw training rows in random order, each once an epoch, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler


class OnceAnEpoch(Sampler[int]):  # type: ignore[misc]  # torch's types are not followed
    """Draw the rows in the order of one process, and the added ones at the end of the epoch.

    accelerate would fill up the last batches with rows from the start of the epoch, which would be
    trained twice.

    Args:
        rows: number of rows to train on.
        added: number of rows without loss behind them, from `even_out`.
        seed: of the order, as accelerate's own sampler takes it.
    """

    def __init__(self, *, rows: int, added: int, seed: int) -> None:
        self.order = SeedableRandomSampler(range(rows), data_seed=seed)
        self.rows, self.added = rows, added

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch; the next epoch has another order."""
        yield from self.order
        yield from range(self.rows, self.rows + self.added)

    def __len__(self) -> int:
        """Return the number of rows, the added ones included."""
        return self.rows + self.added

    def set_epoch(self, epoch: int) -> None:
        """Set which epoch is drawn next."""
        self.order.set_epoch(epoch)
