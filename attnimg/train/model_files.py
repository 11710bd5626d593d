"""Check, read, hash and write the files of a model.

check_model_files raises for a folder that can't be loaded, before anything heavy is imported.
save_final_model writes the trained model with the config and dtypes that it needs to be loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.files import CachedHasher, cache_folder, open_regular, read_regular
from attnimg.train import checkpoint as checkpoints
from attnimg.train.checkpoint import write_errors
from attnimg.train.pickled_weights import require_safetensors

WEIGHT_INDEX = "model.safetensors.index.json"

DOWNLOAD_AGAIN = "download all files of the model again, or point base_model at another folder"

# Errors that are raised for a damaged JSON file.
JSON_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

# safetensors' names of the dtypes of weights that are not quantized -> torch's names.
TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Keys of config.json that describe parts other than the language model.
OTHER_PARTS = ("vision_config", "audio_config", "vq_config", "speech_config")

# Suffixes of files that loaders read into memory; the largest published one, a tokenizer.json, has
# 35 MiB.
_READ_WHOLE = frozenset({".json", ".jinja", ".model", ".txt", ".py", ".tiktoken"})

_LARGEST_BYTES = 256 << 20

# Suffixes of files that loaders read; a folder with such a name is an error.
_READ = _READ_WHOLE | {".safetensors", ".bin"}


def check_model_files(config: Config) -> None:
    """Raise for a model folder that can't be loaded, without importing anything heavy.

    A name on the hub is checked by `load_model`, which connects to the hub.

    Raises:
        AttnimgError: config, weights or tokenizer are missing, or an index names a missing shard
            (bad-model), or the weights are pickled (pickled-weights).
    """
    folder = Path(config.base_model or "").expanduser()
    if not folder.is_dir():
        # A hub name is name or org/name; anything with more parts can only be a path.
        name = config.base_model or ""
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise bad_model(
                f"there is no model folder {config.base_model}",
                why="needed a folder with config.json, weights and a tokenizer",
                do="correct base_model: the path of a folder, or a name on the hub",
            )
        return
    found = sorted(entry.name for entry in folder.iterdir())
    _require_files(folder, key="base_model")
    if config.tokenizer_config:
        _require_files(Path(config.tokenizer_config).expanduser(), key="tokenizer_config")
    if "config.json" not in found:
        raise bad_model(
            f"the model folder {folder} has no config.json",
            why=f"found {', '.join(found[:6]) or 'nothing'}",
            do=DOWNLOAD_AGAIN,
        )
    if not config.reinit_weights:
        _require_weights(folder, found)
    tokenizers: tuple[str, ...] = (
        "tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json",
    )  # fmt: skip
    if config.tokenizer_use_mistral_common:
        tokenizers = ("tekken.json", *sorted(name for name in found if ".model.v" in name))
    if not config.tokenizer_config and not any(name in found for name in tokenizers):
        raise bad_model(
            f"the model folder {folder} has no tokenizer",
            why=f"needed one of {', '.join(tokenizers)}",
            do="put the tokenizer's files there, or set tokenizer_config",
        )


def _require_weights(folder: Path, found: list[str]) -> None:
    """Raise for pickled, missing or incomplete weights."""
    require_safetensors(folder, key="base_model")
    if WEIGHT_INDEX in found:
        _require_shards(folder)
    if not any(folder.glob("*.safetensors")):
        raise bad_model(
            f"the model folder {folder} has no weights",
            why=f"needed *.safetensors, found {', '.join(found[:6])}",
            do=DOWNLOAD_AGAIN,
        )


def _require_files(folder: Path, *, key: str) -> None:
    """Raise for pipes, devices and folders in place of files, and for files that are too large.

    Raises:
        AttnimgError: code bad-model; a loader would wait forever, or run out of memory.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            found = entry.stat()
        except OSError:  # a broken link: loading the file reports it
            continue
        if stat.S_ISDIR(found.st_mode):
            why = "found a folder, needed a file" if entry.suffix in _READ else ""
        elif not stat.S_ISREG(found.st_mode):
            why = "found a pipe, a socket or a device, needed a regular file"
        else:
            too_large = entry.suffix in _READ_WHOLE and found.st_size > _LARGEST_BYTES
            size = f"found {found.st_size:,} bytes, needed at most {_LARGEST_BYTES:,}"
            why = size if too_large else ""
        if why:
            raise bad_model(f"{entry} can't be read", why=why, do=DOWNLOAD_AGAIN, key=key)


def _require_shards(folder: Path) -> None:
    """Raise for an index that can't be read, or that names a missing shard."""
    try:
        shards = read_shard_names(folder)
        missing = [shard for shard in shards if not (folder / shard).is_file()]
    except JSON_ERRORS as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise bad_model(
            f"{folder / WEIGHT_INDEX} can't be read", why=reason, do=DOWNLOAD_AGAIN
        ) from error
    if missing:
        raise bad_model(
            f"the model folder {folder} lacks {len(missing)} of {len(shards)} shards",
            why=f"{WEIGHT_INDEX} names {', '.join(missing[:3])}",
            do=DOWNLOAD_AGAIN,
        )


def read_shard_names(folder: Path) -> list[str]:
    """Return the names of the shards in a folder's index, sorted.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: it can't be read,
            or has values other than names.
    """
    index = json.loads(read_regular(folder / WEIGHT_INDEX, at_most=_LARGEST_BYTES))
    names = set(index["weight_map"].values())
    if wrong := next((name for name in names if not isinstance(name, str)), None):
        raise TypeError(f"found {wrong!r}, needed the name of a file")
    return sorted(names)


def bad_model(what: str, *, why: str, do: str, key: str = "base_model") -> AttnimgError:
    """Return an AttnimgError with the code bad-model."""
    return AttnimgError(what, why=why, do=do, code="bad-model", key=key)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a file: its dtype as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Return the number of its elements."""
        return math.prod(self.shape)


# Limit of a header: that of a hundred thousand tensors has 15 MB, a far longer one is damaged.
_MAX_HEADER = 100 * 2**20


def list_weight_files(folder: Path) -> list[Path]:
    """Return the files of the index; without one, model.safetensors, or else all safetensors."""
    try:
        return [folder / name for name in read_shard_names(folder)]
    except JSON_ERRORS:
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def read_tensor_headers(folder: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor of the weight files in a model's folder.

    Files that can't be read are skipped: loading the model reports them.
    """
    found: dict[str, StoredTensor] = {}
    for file in list_weight_files(folder):
        for name, entry in _read_header(file).items():
            found[name] = StoredTensor(dtype=entry["dtype"], shape=entry["shape"])
    return found


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return name -> dtype, shape and data_offsets; empty where the file can't be read."""
    try:
        with open_regular(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length < _MAX_HEADER else {}
        return {
            name: {**entry, "shape": tuple(entry["shape"]), "dtype": entry["dtype"]}
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except JSON_ERRORS:
        return {}


def check_safetensors(file: Path) -> list[str]:
    """Return what is wrong with a file: its header can't be read, or tensors are cut off."""
    if not file.is_file():
        return ["found a pipe, a socket, a device or a folder, needed a file"]
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        ends = [entry["data_offsets"][1] for entry in _read_header(file).values()]
        needed, found = 8 + length + max(ends), file.stat().st_size
    except OSError as error:
        return [f"it can't be read: {error.strerror or error}"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return ["it has no header of safetensors"]
    return [] if found == needed else [f"found {found:,} bytes, needed {needed:,}"]


# Suffixes of buffers that older versions of transformers saved, and that are now computed.
_COMPUTED = ("inv_freq", "masked_bias", "attn.bias", "attention.bias", "position_ids")


def unused_weights(model: Any, stored: Iterable[str], unexpected: Iterable[str]) -> tuple[str, ...]:
    """Return the stored weights that a loaded model does not use, sorted.

    Args:
        model: a transformers model.
        stored: names of the weights in its checkpoint.
        unexpected: names that from_pretrained reported; it does not report weights that the class
            ignores, such as layers for multi-token prediction.
    """
    ignored = [re.compile(text) for text in model._keys_to_ignore_on_load_unexpected or ()]
    names = {name for name in stored if any(pattern.search(name) for pattern in ignored)}
    return tuple(sorted(name for name in names | set(unexpected) if not name.endswith(_COMPUTED)))


def load_renamed(model: Any, folder: Path) -> bool:
    """Load a checkpoint with from_pretrained, if it has weights under names that the model lacks.

    Args:
        model: a transformers model that has loaded the checkpoint's other weights.
        folder: the checkpoint.

    Returns:
        Whether the weights were loaded; False where the model has all names.
    """
    import torch

    if read_tensor_headers(folder).keys() <= model.state_dict().keys():
        return False
    # float32 represents weights of every dtype exactly, so copying does not round.
    loaded = type(model).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    model.load_state_dict(loaded.state_dict())
    return True


# Files that transformers loads a tokenizer from.
# Source: transformers 5.22.2, tokenization_utils_base.py, from_pretrained (2026-11-27).
_TOKENIZER_FILES = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
                    "chat_template*", "additional_chat_templates/*")  # fmt: skip

# Keys of config.json that transformers writes about itself.
_TRANSFORMERS_KEYS = ("_name_or_path", "transformers_version")


def hash_model(config: Config) -> dict[str, Any] | None:
    """Return the SHA-256 of each file of the model; None when not all are on this machine.

    config.json is hashed by its values, so that another version of transformers may have written
    it.

    Raises:
        AttnimgError: a file can't be read (bad-model).
    """
    folder = find_model_folder(config.base_model, config, containing="config.json")
    weights = list_weight_files(folder) if folder else []
    if folder is None or not weights or not all(path.is_file() for path in weights):
        return None
    raw = json.loads((folder / "config.json").read_bytes())
    values = {key: raw[key] for key in raw if key not in _TRANSFORMERS_KEYS}
    text = json.dumps(values, sort_keys=True)
    files = [*weights, *folder.glob(WEIGHT_INDEX), *folder.glob("*.py")]
    return {
        "path": config.base_model,
        "revision": config.revision_of_model,
        "files": {
            "config.json": hashlib.sha256(text.encode()).hexdigest(),
            **hash_files(folder, files),
        },
    }


def hash_tokenizer(config: Config) -> dict[str, Any] | None:
    """Return the SHA-256 of each file of the tokenizer; None when it is not on this machine.

    Raises:
        AttnimgError: a file can't be read (bad-model).
    """
    named = config.tokenizer_config or config.base_model
    # mistral-common reads a file of its own.
    containing = "config.json" if config.tokenizer_use_mistral_common else "tokenizer_config.json"
    folder = find_model_folder(named, config, containing=containing)
    if folder is None:
        return None
    return {
        "path": named,
        "revision": config.revision_of_model,
        "files": hash_files(folder, list_tokenizer_files(folder)),
    }


def list_tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a tokenizer, with its chat templates, in a folder."""
    files = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    return sorted(path for path in files if path.is_file())


def find_model_folder(name: str | None, config: Config, *, containing: str) -> Path | None:
    """Return a model's folder, or its snapshot in the hub's cache, if it contains a file."""
    folder = Path(name or "").expanduser()
    if folder.is_dir():
        return folder if (folder / containing).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(name), containing, revision=config.revision_of_model)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def hash_files(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by their names relative to a folder.

    Raises:
        AttnimgError: a file can't be read (bad-model).
    """
    hashes = CachedHasher(cache_folder(os.environ))
    try:
        found = hashes.hash_each(files)
    except OSError as error:
        raise bad_model(
            f"{error.filename or folder} can't be read",
            why=error.strerror or str(error),
            do=DOWNLOAD_AGAIN,
        ) from error
    hashes.save()
    # An index may name files outside of the folder.
    names = [os.path.relpath(path, folder) for path in files]
    return dict(zip(names, found, strict=True))


# Files that are written with a model and not kept: one that only Trainer reads, and PEFT's model
# card, a form of which nothing is filled in.
TRAINER_FILES = ("training_args.bin", "README.md")

# Settings that trainers change for training, and that must not be saved with the model.
_TRAINING_SETTINGS = ("use_cache", "output_router_logits")

# Files that an AutoProcessor reads besides the tokenizer's.
PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip


def save_final_model(engine: Any, config: Config, folder: Path) -> list[Path]:
    """Write model and tokenizer into PARTIAL, then move them into output_dir file by file.

    Args:
        engine: the engine after training; every process calls this, since gathering weights is a
            collective operation.
        config: the validated run.
        folder: output_dir.

    Returns:
        The files, weights first; empty on every process but the first.

    Raises:
        AttnimgError: the disk is full; the checkpoints are unchanged (disk-full).
    """
    staging = folder / checkpoints.PARTIAL / "model"
    try:
        with write_errors(staging, kept="the checkpoints are kept"):
            restore_loaded_dtypes(engine.model)
            engine.save_model(str(staging))
            if not engine.is_world_process_zero():
                return []
            correct_saved_config(staging, engine.loaded_config)
            if config.tokenizer_save_jinja_files is False:
                _move_templates_into_config(engine.processing_class, staging)
            copy_processor_files(config, engine.loaded_config, staging)
            names = _move_into(folder, staging)
    finally:
        if engine.is_world_process_zero():
            shutil.rmtree(folder / checkpoints.PARTIAL, ignore_errors=True)
    return [folder / name for name in reversed(names)]


def _move_templates_into_config(tokenizer: Any, folder: Path) -> None:
    """Write the chat templates into tokenizer_config.json, in place of files of their own."""
    for file in (*folder.glob("chat_template.jinja"), *folder.glob("additional_chat_templates/*")):
        file.unlink()
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def restore_loaded_dtypes(model: Any) -> None:
    """Cast weights that were float32 only for training to the dtype that they were loaded in.

    Args:
        model: after training.
    """
    import torch

    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper renames weights
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, dtype in getattr(model, "attnimg_loaded_dtypes", {}).items():
        with torch.no_grad():
            weights[name].data = weights[name].data.to(dtype)


def correct_saved_config(folder: Path, loaded: Mapping[str, Any]) -> None:
    """Correct the dtype in a saved config.json, and restore the settings of the loaded model.

    transformers writes the dtype of the first weight, an embedding, which is float32 in training
    even where most layers are bfloat16. The dtype of most saved weights is written instead. A
    folder without config.json, such as an adapter's, is not changed.

    Args:
        folder: the folder that save_pretrained wrote.
        loaded: the model's config before training, as `to_dict` returns it.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    dtype = most_common_dtype(folder)
    for name in (None, *(key for key, value in config.items() if isinstance(value, dict))):
        part, before = (config, loaded) if name is None else (config[name], loaded.get(name) or {})
        if dtype and (name is None or "dtype" in part):
            part["dtype"] = dtype
        for key in _TRAINING_SETTINGS:
            if key in before:
                part[key] = before[key]
            else:
                part.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def most_common_dtype(folder: Path) -> str | None:
    """Return the dtype of most of the numbers in a folder's weights; None without weights."""
    sizes: Counter[str] = Counter()
    for tensor in read_tensor_headers(folder).values():
        if tensor.dtype in TORCH_NAMES:
            sizes[TORCH_NAMES[tensor.dtype]] += tensor.count
    return sizes.most_common(1)[0][0] if sizes else None


def copy_processor_files(config: Config, loaded: Mapping[str, Any], folder: Path) -> None:
    """Copy the files of the AutoProcessor of a multimodal checkpoint.

    Args:
        config: the validated run.
        loaded: the model's config before training, as `to_dict` returns it.
        folder: of the trained model.
    """
    from transformers.utils import cached_file

    for name in PROCESSOR_FILES if any(loaded.get(part) for part in OTHER_PARTS) else ():
        found = cached_file(
            config.base_model,
            name,
            revision=config.revision_of_model,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)


def _move_into(folder: Path, staging: Path) -> list[str]:
    """Move the finished files, weights last, so that a folder with weights is complete."""
    for name in TRAINER_FILES:
        (staging / name).unlink(missing_ok=True)
    checkpoints.set_default_permissions(staging)
    names = sorted(
        (p.name for p in staging.iterdir()), key=lambda name: name.endswith("safetensors")
    )
    for name in names:
        (staging / name).replace(folder / name)
    return names
