"""Save and load the states of a run in formats that hold no code, and word each error of loading.

States that these formats can't hold, such as torchao's optimizers and those of FSDP and DeepSpeed,
stay in the library's format.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import PickleError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from attnimg.errors import AttnimgError
from attnimg.train.evaluator import Evaluator
from attnimg.train.file_hashes import FileHashes
from attnimg.train.renamed_weights import load_renamed
from attnimg.train.safetensors_headers import stored_tensors
from attnimg.train.state_files import NotPlain, read_state, write_state


class SavedStates(Evaluator):
    """The part of the engine that saves and loads the states of a checkpoint.

    Attributes:
        hashes: of the files of the checkpoint that is being saved, or was saved last.
    """

    hashes: FileHashes

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
            # Schedules warn that the optimizer is to be saved as well, which it is.
            warnings.simplefilter("ignore", UserWarning)
            schedule = self.lr_scheduler.state_dict()
        try:
            state = self.optimizer.state_dict()
            write_state(folder, "optimizer", state, step=step, hashes=hashes)
        except NotPlain:
            super()._save_optimizer_and_scheduler(str(folder))
        else:
            write_state(folder, "scheduler", schedule, step=step, hashes=hashes)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Begin to hash the weights, which are written; save_optimizer has written the rest."""
        if self._sharded():
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            for weights in Path(output_dir).glob("*.safetensors"):
                if not weights.name.startswith("optimizer-"):
                    self.hashes.add(weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what _save_optimizer_and_scheduler wrote, or transformers' Trainer.

        Raises:
            AttnimgError: they can't be loaded (code damaged-checkpoint).
        """
        if checkpoint is None:
            return
        folder, device = Path(checkpoint), self.args.device.type
        with loading(folder, "optimizer and schedule", sharded=self._sharded()):
            if not (folder / "optimizer.json").is_file():
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            self.optimizer.load_state_dict(read_state(folder, "optimizer", device=device))
            self.lr_scheduler.load_state_dict(read_state(folder, "scheduler", device="cpu"))

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
        with loading(folder, "gradient scaler", sharded=self._sharded()):
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
        """Load the states of this process's random number generators; other processes' are not.

        Raises:
            AttnimgError: they can't be loaded (code damaged-checkpoint).
        """
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        with loading(folder, "random number generators", sharded=False):
            if not any(folder.glob("rng_state*.json")):
                super()._load_rng_state(checkpoint)
                return
            if not (folder / f"{self._rng_name()}.json").is_file():
                return  # written by another number of processes: the run has warned
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
        with loading(self.folder, "states in trainer_state.json", sharded=False):
            super()._load_callback_state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint's weights, including those saved under other names than the model's.

        Raises:
            AttnimgError: they can't be loaded, or some are missing (code damaged-checkpoint).
        """
        folder = Path(resume_from_checkpoint)
        with loading(folder, "weights", sharded=self._sharded()):
            if self._sharded():
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            if hasattr(self.model, "get_base_model"):
                # transformers would load model.safetensors in its place, where that is there, too.
                name = self.model.active_adapters[0]
                missing = self.model.load_adapter(folder, name, is_trainable=True).missing_keys
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                missing = [] if load_renamed(self.model, folder) else self._missing(folder)
            if missing:
                raise ValueError(f"{len(missing)} weights are missing: {', '.join(missing[:3])}")

    def _missing(self, folder: Path) -> list[str]:
        """Return the model's weights that a checkpoint lacks, under any name of a tied weight."""
        saved, weights = stored_tensors(folder).keys(), self.model.state_dict()
        loaded = {weight.data_ptr() for name, weight in weights.items() if name in saved}
        return [name for name, weight in weights.items()
                if name not in saved and weight.data_ptr() not in loaded]  # fmt: skip

    def _sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _rng_name(self) -> str:
        return "rng_state" if self.args.world_size <= 1 else f"rng_state_{self.args.process_index}"


@contextmanager
def loading(checkpoint: Path, part: str, *, sharded: bool) -> Iterator[None]:
    """Turn what a library raises while it loads a part of a checkpoint into an AttnimgError.

    Args:
        checkpoint: the folder.
        part: what is loaded, in the plural.
        sharded: whether processes exchange data meanwhile, whose RuntimeErrors are passed on.

    Raises:
        AttnimgError: code damaged-checkpoint.
    """
    wrong: tuple[type[Exception], ...] = (
        OSError, ValueError, TypeError, LookupError, AttributeError, EOFError, PickleError,
        SafetensorError, *(() if sharded else (RuntimeError,)),
    )  # fmt: skip
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except wrong as error:
        # torch's own words advise to load with weights_only=False, which runs the code.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found = "; ".join(lines[:3]) or type(error).__name__
        if isinstance(error, PickleError) or "weights_only" in str(error):
            found = "found something else than numbers and tensors, which was not run"
        raise AttnimgError(
            f"the {part} of {checkpoint} can't be loaded",
            why=found,
            do="resume from another checkpoint, or set base_model to this one and output_dir to a "
            "new folder, and remove resume_from_checkpoint",
            code="damaged-checkpoint",
            key="resume_from_checkpoint",
        ) from error
