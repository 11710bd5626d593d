"""Read records from a name on the Hugging Face hub, or from a folder of datasets' save_to_disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from attnimg.errors import AttnimgError
from attnimg.train.data.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset

TIMEOUT_SECONDS = 10


def load_hub(source: Source) -> Dataset:
    """Load one split of a dataset from the hub, or from its cache when HF_HUB_OFFLINE is set.

    Raises:
        AttnimgError: no connection (hub-unreachable), no such dataset, or one that can't be read.
    """
    import datasets
    from huggingface_hub import constants

    spec = source.spec
    if spec.trust_remote_code:
        raise AttnimgError(
            "datasets that bring their own code are not supported",
            why=f"found {source.key}.trust_remote_code true; the library runs none",
            do="convert the dataset to Parquet, and drop trust_remote_code",
            code="unsupported-key",
            key=f"{source.key}.trust_remote_code",
        )
    if not constants.HF_HUB_OFFLINE:
        _check_reachable(source)
    try:
        loaded = datasets.load_dataset(
            spec.path,
            spec.name,
            split=spec.split or "train",
            revision=spec.revision,
            data_files=spec.data_files,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(source, error, offline=constants.HF_HUB_OFFLINE) from None
    return cast("Dataset", loaded)


def load_saved(source: Source) -> Dataset:
    """Load a folder that `Dataset.save_to_disk` wrote.

    Raises:
        AttnimgError: the folder is damaged, or lacks the split.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(source.spec.path)
    except (OSError, ValueError) as error:
        raise _unreadable(source, error, offline=False) from None
    if isinstance(loaded, datasets.Dataset):
        return loaded
    split = source.spec.split or "train"
    if split not in loaded:
        raise AttnimgError(
            f"no split {split} in {source.spec.path}",
            why=f"found {', '.join(loaded)}",
            do=f"set {source.key}.split to one of them",
            code="bad-value",
            key=f"{source.key}.split",
        )
    return loaded[split]


def _check_reachable(source: Source) -> None:
    """Ask the hub once, with a short timeout: the datasets library tries for half a minute."""
    from huggingface_hub import HfApi, errors

    spec = source.spec
    try:
        HfApi().dataset_info(spec.path, revision=spec.revision, timeout=TIMEOUT_SECONDS)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise AttnimgError(
            f"dataset not found: {spec.path}",
            why=f"no such file or folder here, and the hub says: {str(error).splitlines()[0]}",
            do="correct the path; for a private dataset set HF_TOKEN",
            code="file-missing",
            key=f"{source.key}.path",
        ) from None
    # Whichever HTTP library the hub client uses; it differs between its releases.
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # re-exported
        raise AttnimgError(
            f"dataset not found here, and the hub can't be reached: {spec.path}",
            why=f"no such file or folder here; asking the hub: {error}",
            do="correct the path, mend the connection, or set HF_HUB_OFFLINE=1 to use what "
            "was downloaded before",
            code="hub-unreachable",
            key=f"{source.key}.path",
        ) from None


def _unreadable(source: Source, error: Exception, *, offline: bool) -> AttnimgError:
    spec = source.spec
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if offline and isinstance(error, ConnectionError | FileNotFoundError):
        return AttnimgError(
            f"dataset not found: {spec.path}",
            why=f"no such file or folder here, not in the hub's cache, and HF_HUB_OFFLINE is set "
            f"({reason})",
            do="correct the path, or download the dataset first without HF_HUB_OFFLINE",
            code="file-missing",
            key=f"{source.key}.path",
        )
    return AttnimgError(
        f"cannot read the dataset {spec.path}",
        why=reason,
        do=f"check {source.key}: path, name, split, revision and data_files",
        code="bad-data",
        key=f"{source.key}.path",
    )
