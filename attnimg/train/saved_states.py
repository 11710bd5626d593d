"""Save and load the states of a run in formats that contain no code.

States that these formats do not support (torchao's optimizers, FSDP, DeepSpeed) stay in the format
of their library.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import PickleError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer

from attnimg.errors import AttnimgError, counted
from attnimg.train.checkpoint import FileHasher
from attnimg.train.model_files import load_renamed, read_tensor_headers

# States of torch's optimizers that are single numbers, and the optimizers whose others do not have
# the shape of a weight.
# Source: torch 2.13, torch/optim: adam.py, asgd.py, nadam.py, lbfgs.py, _adafactor.py (2026-11-28).
_SCALARS = frozenset({"step", "eta", "mu", "mu_product"})
_OTHER_SHAPES = frozenset({"Adafactor", "LBFGS"})


class CheckpointingTrainer(Trainer):  # type: ignore[misc]  # transformers' types are not followed
    """The part of an engine that saves and loads the states of a checkpoint.

    Attributes:
        hashes: hashes of the files of the checkpoint that is being saved, or was saved last.
    """

    hashes: FileHasher

    def save_optimizer(self, folder: Path) -> None:
        """Write optimizer and schedule, unless FSDP or DeepSpeed write their own formats.

        They are written before the weights: they are larger, and hashed while the weights are
        written.
        """
        if self._sharded() or not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        step, hashes = self.state.global_step, self.hashes
        with warnings.catch_warnings():
            # Schedules warn that the optimizer should be saved as well, which is done here.
            warnings.simplefilter("ignore", UserWarning)
            schedule = self.lr_scheduler.state_dict()
        try:
            state = self.optimizer.state_dict()
            write_state(folder, "optimizer", state, step=step, hashes=hashes)
        except UnsupportedState:
            super()._save_optimizer_and_scheduler(str(folder))
        else:
            write_state(folder, "scheduler", schedule, step=step, hashes=hashes)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Begin to hash the written weights; save_optimizer has written the rest already."""
        if self._sharded():
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            for weights in Path(output_dir).glob("*.safetensors"):
                if not weights.name.startswith("optimizer-"):
                    self.hashes.add_written(weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and schedule, as written by save_optimizer or by transformers' Trainer.

        Raises:
            AttnimgError: they can't be loaded (code damaged-checkpoint).
        """
        if checkpoint is None:
            return
        folder, device = Path(checkpoint), self.args.device.type
        with load_errors(folder, "optimizer and schedule", sharded=self._sharded()):
            if (folder / "optimizer.json").is_file():
                self.optimizer.load_state_dict(read_state(folder, "optimizer", device=device))
                self.lr_scheduler.load_state_dict(read_state(folder, "scheduler", device="cpu"))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
            if not self._sharded():
                _check_shapes(self.optimizer)

    def _save_scaler(self, output_dir: str) -> None:
        """Write the state of float16's gradient scaler."""
        scaler = self.accelerator.scaler
        if scaler is not None and self.args.should_save:
            step, state = self.state.global_step, scaler.state_dict()
            write_state(Path(output_dir), "scaler", state, step=step, hashes=self.hashes)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load the state of float16's gradient scaler, where the checkpoint has one."""
        if checkpoint is None or self.accelerator.scaler is None:
            return
        folder = Path(checkpoint)
        with load_errors(folder, "gradient scaler", sharded=self._sharded()):
            if (folder / "scaler.json").is_file():
                self.accelerator.scaler.load_state_dict(read_state(folder, "scaler", device="cpu"))
            else:
                super()._load_scaler(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the states of this process's random number generators."""
        kind, words, *rest = np.random.get_state(legacy=True)
        state = {
            "python": random.getstate(),
            "numpy": [kind, np.asarray(words).tolist(), *rest],
            "torch": torch.get_rng_state().tolist(),
            "cuda": [found.tolist() for found in torch.cuda.get_rng_state_all()]
            if torch.cuda.is_available() else [],
        }  # fmt: skip
        folder = Path(output_dir)
        # The first process may not have written anything yet.
        folder.mkdir(parents=True, exist_ok=True)
        step = self.state.global_step
        write_state(folder, self._rng_name(), state, step=step, hashes=self.hashes)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the states of this process's random number generators, if its rank saved them.

        Raises:
            AttnimgError: they can't be loaded (code damaged-checkpoint).
        """
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        with load_errors(folder, "random number generators", sharded=False):
            if not any(folder.glob("rng_state*.json")):
                super()._load_rng_state(checkpoint)
                return
            if not (folder / f"{self._rng_name()}.json").is_file():
                return  # another number of processes wrote it: a warning was printed
            state = read_state(folder, self._rng_name(), device="cpu")
            random.setstate(state["python"])
            kind, words, *rest = state["numpy"]
            words = np.array(words, dtype=np.uint32)
            np.random.set_state((kind, words, *rest))
            torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
            for device, found in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
                torch.cuda.set_rng_state(torch.tensor(found, dtype=torch.uint8), device)

    def _load_callback_state(self) -> None:
        """Load the states of callbacks, such as early stopping's."""
        with load_errors(self.folder, "states in trainer_state.json", sharded=False):
            super()._load_callback_state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint's weights, including those saved under other names than the model's.

        Raises:
            AttnimgError: they can't be loaded, or some are missing (code damaged-checkpoint).
        """
        folder = Path(resume_from_checkpoint)
        with load_errors(folder, "weights", sharded=self._sharded()):
            if self._sharded():
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            if hasattr(self.model, "get_base_model"):
                # transformers would load model.safetensors instead, if that exists as well.
                name = self.model.active_adapters[0]
                missing = self.model.load_adapter(folder, name, is_trainable=True).missing_keys
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                missing = [] if load_renamed(self.model, folder) else self._missing_weights(folder)
            if missing:
                raise ValueError(
                    f"missing: {counted(len(missing), 'weight')}, {', '.join(missing[:3])}"
                )

    def _missing_weights(self, folder: Path) -> list[str]:
        """Return the model's weights that a checkpoint lacks, under any name of a tied weight."""
        saved, weights = read_tensor_headers(folder).keys(), self.model.state_dict()
        loaded = {weight.data_ptr() for name, weight in weights.items() if name in saved}
        return [name for name, weight in weights.items()
                if name not in saved and weight.data_ptr() not in loaded]  # fmt: skip

    def _sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _rng_name(self) -> str:
        return "rng_state" if self.args.world_size <= 1 else f"rng_state_{self.args.process_index}"


def _check_shapes(optimizer: Any) -> None:
    """Raise ValueError unless the moments of torch's optimizers have the shape of their weight.

    Torch's fused kernels don't check that, and crash the process. Other optimizers, and those of
    _OTHER_SHAPES, keep tensors of other shapes.
    """
    kind = type(getattr(optimizer, "optimizer", optimizer))
    if not kind.__module__.startswith("torch.optim.") or kind.__name__ in _OTHER_SHAPES:
        return
    for weight, state in optimizer.state.items():
        for name, found in state.items():
            is_moment = isinstance(found, torch.Tensor) and name not in _SCALARS
            if is_moment and found.shape != weight.shape:
                raise ValueError(
                    f"found {name} of shape {tuple(found.shape)}, needed {tuple(weight.shape)} as "
                    "its weight"
                )


@contextmanager
def load_errors(checkpoint: Path, part: str, *, sharded: bool) -> Iterator[None]:
    """Turn errors of a library that loads a part of a checkpoint into an AttnimgError.

    Args:
        checkpoint: the folder.
        part: a plural noun for what is loaded, for the message.
        sharded: whether processes exchange data while loading; RuntimeErrors are then passed on.

    Raises:
        AttnimgError: code damaged-checkpoint.
    """
    expected: tuple[type[Exception], ...] = (
        OSError, ValueError, TypeError, LookupError, AttributeError, EOFError, PickleError,
        SafetensorError, *(() if sharded else (RuntimeError,)),
    )  # fmt: skip
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except expected as error:
        # torch's message advises weights_only=False, which would run the code.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = "; ".join(lines[:3]) or type(error).__name__
        if isinstance(error, PickleError) or "weights_only" in str(error):
            why = "found objects other than numbers and tensors; no code in it was run"
        raise AttnimgError(
            f"the {part} of {checkpoint} can't be loaded",
            why=why,
            do="resume from another checkpoint, or set base_model to this one and output_dir to a "
            "new folder, and remove resume_from_checkpoint",
            code="damaged-checkpoint",
            key="resume_from_checkpoint",
        ) from error


class UnsupportedState(TypeError):
    """Raised for a state with an object that these formats do not support: torchao's tensors."""


# A state is split into this many files, within these sizes: several are hashed in parallel, and
# only those are in CPU memory.
_PARTS = 16

_SMALLEST, _LARGEST = 32 * 2**20, 2**30

# Source: safetensors 0.8, safetensors/torch.py, _TYPES (2026-11-27).
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def write_state(folder: Path, name: str, state: object, *, step: int, hashes: FileHasher) -> None:
    """Write a state.

    Args:
        folder: an existing folder.
        name: name of the files, without suffix.
        state: as `state_dict` returns it.
        step: optimizer steps done.
        hashes: hashes the tensors' files while the next ones are written.

    Raises:
        UnsupportedState: it has objects other than numbers, strings and plain tensors; nothing
            is written.
    """
    tensors: list[torch.Tensor] = []
    tree = _encode(state, tensors, {})
    parts = _split_into_files(tensors)
    for number, part in enumerate(parts, 1):
        named = {str(place): tensors[place].detach().cpu().contiguous() for place in part}
        path = folder / f"{name}-{number}.safetensors"
        with path.open("wb") as file:
            file.writelines(_serialize(named))
        hashes.add_written(path)
    content = {"step": step, "files": len(parts), "state": tree}
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def read_state(folder: Path, name: str, *, device: str) -> Any:
    """Return a state that write_state wrote.

    Args:
        folder: the folder with the files.
        name: name of the files, without suffix.
        device: the type of device to load tensors to, such as "cpu".

    Raises:
        OSError, ValueError, TypeError, KeyError, SafetensorError: it is not such a state.
    """
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    tensors = {}
    for number in range(1, content["files"] + 1):
        with safe_open(folder / f"{name}-{number}.safetensors", framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  safe_open returns no mapping
                found = file.get_tensor(key)
                # The tensors are views of the file until they are copied to another device.
                tensors[key] = found.clone() if device == "cpu" else found
    return _decode(content["state"], tensors)


def _split_into_files(tensors: list[torch.Tensor]) -> list[list[int]]:
    """Return, for each file, the indices of its tensors."""
    size = min(max(sum(tensor.nbytes for tensor in tensors) // _PARTS, _SMALLEST), _LARGEST)
    parts: list[list[int]] = []
    used = size
    for number, tensor in enumerate(tensors):
        if used >= size:
            parts.append([])
            used = 0
        parts[-1].append(number)
        used += tensor.nbytes
    return parts


def _serialize(tensors: Mapping[str, torch.Tensor]) -> list[memoryview]:
    """Return the content of a safetensors file, without a copy of the tensors.

    Source: https://github.com/huggingface/safetensors, README.md, "Format" (2026-11-27).
    """
    # The reader needs each tensor at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda entry: -entry[1].element_size())
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _dtype(tensor), "shape": list(tensor.shape),
                        "data_offsets": [start, end]}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    flat = [memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) for _, tensor in ordered]
    return [memoryview(len(text).to_bytes(8, "little") + text), *flat]


def _dtype(tensor: torch.Tensor) -> str | None:
    """Return safetensors' name of a tensor's dtype; None if it has none."""
    return _DTYPES.get(str(tensor.dtype).removeprefix("torch."))


def _encode(value: Any, tensors: list[torch.Tensor], seen: dict[int, int]) -> Any:
    """Return a value as JSON types; each of its tensors is added to a list once."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_encode(entry, tensors, seen) for entry in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(entry, tensors, seen) for entry in value]}
    if isinstance(value, dict):
        return {"dict": [[_key(key), _encode(found, tensors, seen)]
                         for key, found in value.items()]}  # fmt: skip
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        raise UnsupportedState(f"found {type(value).__module__}.{type(value).__qualname__}")
    if _dtype(value) is None:
        raise UnsupportedState(f"found a tensor of {value.dtype}")
    if id(value) not in seen:
        seen[id(value)] = len(tensors)
        tensors.append(value)
    return {"tensor": seen[id(value)]}


def _key(key: object) -> object:
    if not isinstance(key, bool | int | str):
        raise UnsupportedState(f"found a key of type {type(key).__qualname__}")
    return key


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, found),) = value.items()
    if kind == "tensor":
        return tensors[str(found)]
    if kind == "tuple":
        return tuple(_decode(entry, tensors) for entry in found)
    return {key: _decode(entry, tensors) for key, entry in found}
