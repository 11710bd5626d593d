"""Push the trained model to a private repository of the Hugging Face hub.

Only files of the model are pushed: no receipt and no metrics. Checkpoints with their optimizer
state are pushed if hub_strategy requests them.

Source: axolotl 0.19.0, core/builders/base.py, _configure_hub_parameters; transformers 5.22.2,
trainer.py, _push_from_checkpoint and push_to_hub (2026-11-27).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, counted, exception_text
from attnimg.redact import redact
from attnimg.train.tracker_callback import CheckpointCallback
from attnimg.train.trackers import hub_unavailable, limit_requests

# Where files of checkpoints wait for their push: hard links, so that rotation does not remove them.
_WAITING = ".hub"

# Files of a checkpoint that a model is not loaded from. PEFT's README.md may name a local folder as
# its base model, which the hub refuses.
_STATE = re.compile(
    r"(optimizer|scheduler|rng_state|scaler|trainer_state|attnimg|manifest|training_args)\b.*"
    r"|(optimizer|rng_state)[-_].*|README\.md|latest|zero_to_fp32\.py"
)


class HubCallback(CheckpointCallback):
    """Push models at saves, in a thread, and the trained one at the end.

    Args:
        config: the validated run.
        folder: output_dir.
        log: prints a line.

    Attributes:
        record: what was pushed, for the receipt.
    """

    def __init__(self, config: Config, folder: Path, *, log: Callable[[str], None]) -> None:
        from huggingface_hub import HfApi

        self.api, self.log, self.folder = HfApi(), log, folder
        self.name, self.revision = str(config.hub_model_id), config.hub_revision or "main"
        self.strategy = config.hub_strategy or "every_save"
        self.wants_checkpoints = self.strategy != "end"
        self.record: dict[str, object] = {"repository": self.name, "revision": self.revision}
        self._jobs: SimpleQueue[tuple[Mapping[str, Path], str, Path] | None] = SimpleQueue()
        # A daemon, so that it does not delay the end of a run that was stopped.
        self._thread = Thread(target=self._push_waiting, daemon=True)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Create the repository and its branch, unless they exist.

        Raises:
            AttnimgError: the hub refuses (code hub-unavailable, exit code 1).
        """
        shutil.rmtree(self.folder / _WAITING, ignore_errors=True)  # of a run that was killed
        self.create_repository()
        self._thread.start()
        self.log(f"hub: {self.record['url']} ({self.strategy})")

    def create_repository(self) -> None:
        """Create the repository, private, and its branch; do nothing if they exist.

        Raises:
            AttnimgError: code hub-unavailable, exit code 1.
        """
        limit_requests()
        try:
            created = self.api.create_repo(self.name, private=True, exist_ok=True)
            self.name = created.repo_id
            if self.revision != "main":
                self.api.create_branch(self.name, branch=self.revision, exist_ok=True)
        except Exception as error:
            raise hub_unavailable(
                f"the repository {self.name} cannot be written to",
                why=_reason(error),
                do="set hub_model_id to a repository of your own, or remove it",
                exit_code=1,
            ) from error
        self.record |= {"repository": self.name, "url": str(created)}

    def use_checkpoint(self, checkpoint: Path) -> None:
        """Add a checkpoint to those that the thread pushes."""
        paths = [path for path in checkpoint.rglob("*") if path.is_file()]
        if self.strategy == "every_save":
            paths = [path for path in paths if is_model_file(path, checkpoint)]
        waiting = self.folder / _WAITING / checkpoint.name
        files: dict[str, Path] = {}
        for path in paths:
            link = waiting / path.relative_to(checkpoint)
            link.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(path, link)
            if is_model_file(path, checkpoint):
                files[path.name] = link
            if self.strategy != "every_save":
                name = "last-checkpoint" if self.strategy == "checkpoint" else checkpoint.name
                files[f"{name}/{path.relative_to(checkpoint)}"] = link
        self._jobs.put((files, f"{checkpoint.name} of a run that goes on", waiting))

    def _push_waiting(self) -> None:
        while (job := self._jobs.get()) is not None:
            files, message, waiting = job
            try:
                self._commit(files, message)
            except Exception as error:
                text = _reason(error)
                self.log(f"warning: {waiting.name} was not pushed to {self.name}: {text}")
            shutil.rmtree(waiting, ignore_errors=True)

    def push_model(self, files: Sequence[Path]) -> AttnimgError | None:
        """Push the trained model, after the checkpoints that wait; return an error if it fails."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        pushed = [path for path in files if is_model_file(path, self.folder)]
        try:
            if "url" not in self.record:  # no step was left to train
                self.create_repository()
            commit = self._commit({path.name: path for path in pushed}, "the trained model")
        except Exception as error:
            text = _reason(error)
            self.record["error"] = text
            names = " ".join(f"--include {path.name}" for path in pushed)
            return hub_unavailable(
                f"the model was trained, but not pushed to {self.name}",
                why=f"{text}\nthe model is complete in {self.folder}",
                do=f"hf upload {self.name} {self.folder} . --private --revision {self.revision} "
                f"{names}",
                exit_code=1,
            )
        self.record["commit"] = commit
        self.log(f"hub: pushed {counted(len(pushed), 'file')}: {commit}")
        return None

    def _commit(self, files: Mapping[str, Path], message: str) -> str:
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
        commit = self.api.create_commit(
            self.name, operations, commit_message=f"attnimg: {message}", revision=self.revision
        )
        return str(commit.commit_url)

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Remove what waits for a push after the block; a push that has begun is not waited for."""
        try:
            yield
        finally:
            shutil.rmtree(self.folder / _WAITING, ignore_errors=True)


def _reason(error: Exception) -> str:
    """Return an exception's text with its cause, which the error of an upload does not name."""
    causes = [error, error.__cause__] if error.__cause__ else [error]
    return redact("; ".join(map(exception_text, causes)))


def is_model_file(path: Path, folder: Path) -> bool:
    """Return whether a file in a folder belongs to the model or its tokenizer."""
    return path.parent == folder and _STATE.fullmatch(path.name) is None


def _link_or_copy(path: Path, link: Path) -> None:
    """Create a hard link, or a copy where the file system has no links."""
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        shutil.copyfile(path, link)
