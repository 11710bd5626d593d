"""Read records from a name on the Hugging Face hub, or from a folder of datasets' save_to_disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from attnimg.errors import AttnimgError
from attnimg.train.data.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset

TIMEOUT_SECONDS = 10


def load_hub(source: Source) -> Mapping[str, Dataset]:
    """Load the splits of a dataset from the hub, or from its cache when HF_HUB_OFFLINE is set.

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
            revision=spec.revision,
            data_files=spec.data_files,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(source, error, offline=constants.HF_HUB_OFFLINE) from None
    return cast("Mapping[str, Dataset]", loaded)


def load_saved(source: Source) -> Mapping[str, Dataset]:
    """Load the splits of a folder that `save_to_disk` wrote.

    A `Dataset` saved alone is the split that it was taken from: the folder remembers which.

    Raises:
        AttnimgError: the folder is damaged.
    """
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(Path(source.spec.path).expanduser())
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise AttnimgError(
            f"cannot read the saved dataset {source.spec.path}",
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            do=f'set {source.key}.data_files: "*.arrow", which takes its files as they are, or '
            "write it again with save_to_disk",
            code="bad-data",
            key=f"{source.key}.path",
        ) from None
    if not isinstance(loaded, datasets.Dataset):
        return cast("Mapping[str, Dataset]", loaded)
    # "test[:10%]" is a part of test; what was put together from several is as good as train.
    name = str(loaded.split or "train").partition("[")[0]
    return {name if "+" not in str(loaded.split) else "train": loaded}


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
            do="correct the path, restore the connection, or set HF_HUB_OFFLINE=1 to use what "
            "was downloaded before",
            code="hub-unreachable",
            key=f"{source.key}.path",
        ) from None


def _unreadable(source: Source, error: Exception, *, offline: bool) -> AttnimgError:
    spec = source.spec
    reason = " ".join((str(error).splitlines() or [type(error).__name__])[:2])
    if offline and isinstance(error, ConnectionError | FileNotFoundError):
        return AttnimgError(
            f"dataset not found: {spec.path}",
            why=f"no such file or folder here, not in the hub's cache, and HF_HUB_OFFLINE is set "
            f"({reason})",
            do="correct the path, or download the dataset first without HF_HUB_OFFLINE",
            code="file-missing",
            key=f"{source.key}.path",
        )
    do = f"correct {source.key}: path, name, split, revision and data_files"
    if "config" in reason.lower():  # a name is missing, or is not one of those that exist
        do = f"set {source.key}.name to one of them"
    return AttnimgError(
        f"cannot read the dataset {spec.path}",
        why=reason,
        do=do,
        code="bad-data",
        key=f"{source.key}.path",
    )
