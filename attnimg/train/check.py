"""Check the machine, files and output_dir of a run before anything heavy is loaded.

The values of its config are checked already, by attnimg.config.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, bad_value, counted, printable
from attnimg.facts import Machine
from attnimg.train import records
from attnimg.train.checkpoint import (
    PARTIAL,
    ResumePoint,
    checkpoint_step,
    is_checkpoint_name,
    list_checkpoints,
    newest_checkpoint,
    read_run_state,
    remove_leftovers,
    rename_damaged,
)
from attnimg.train.intact import (
    checkpoint_notes,
    damaged_error,
    find_damage,
    find_newest_intact,
    has_manifest,
)
from attnimg.train.model_files import check_model_files
from attnimg.train.resume import check_resumed_config


def check_inputs(config: Config, machine: Machine) -> ResumePoint | None:
    """Raise for what the machine can't do, missing files, and an output_dir that is in use.

    This lists files, and reads all files of a checkpoint that the run resumes from.

    Returns:
        Where the run resumes; None when it starts in an empty folder.

    Raises:
        AttnimgError: exit code 2, with the key at fault.
    """
    _check_home_paths(config)
    check_limits(config, machine)
    check_model_files(config)
    point = check_output_dir(config)
    check_resumed_config(config, point)
    return point


def check_data_keys(config: Config) -> None:
    """Raise for keys of the data that this machine can't use.

    Raises:
        AttnimgError: exit code 2, with the key at fault.
    """
    _check_home_paths(config)
    _check_processes(config)


def _check_home_paths(config: Config) -> None:
    """Raise for a path in the home of a user that does not exist, such as ~nobody/out."""
    for key in ("base_model", "tokenizer_config", "output_dir", "dataset_prepared_path",
                "resume_from_checkpoint", "deepspeed", "lora_model_dir"):  # fmt: skip
        value = getattr(config, key)
        try:
            _ = isinstance(value, str) and Path(value).expanduser()
        except RuntimeError:
            raise bad_value(
                key,
                f"{key}: {value} can't be found",
                why=f"found no home of the user {value.partition('/')[0][1:] or 'who runs this'}",
                do=f"write {key} without ~",
            ) from None


# Paged optimizers whose unpaged equivalent has another name.
_UNPAGED = {"paged_adamw": "adamw_torch_fused", "paged_adamw_32bit": "adamw_torch_fused"}

# Limits of the processes that load or prepare data: each takes 0.4 GB, and more are not faster.
_PROCESSES, _PROCESSES_A_CPU = 16, 4

# The smallest address space that a run may have. On a CPU a tiny model takes 2.3 GiB, torch 2.13.
_ADDRESS_BYTES = 3 << 30

# Bytes that a worker needs in /dev/shm besides its batches, and bytes of a token in input_ids,
# labels and position_ids or attention_mask.
_SHARED_BYTES, _TOKEN_BYTES = 1 << 20, 24


def check_limits(config: Config, machine: Machine) -> None:
    """Raise for settings that this machine or the installed packages do not support.

    Raises:
        AttnimgError: an optimizer, a precision or a kind of distributed training that would fail
            later or silently be replaced by another.
    """
    _check_optimizer(config, machine)
    require_package_of_qat(config, machine)
    _check_processes(config)
    _check_address_space()
    _check_shared_memory(config)
    cpu = machine.arch.vendor == "cpu"
    capability = machine.arch.capability
    if config.tf32 is True and (capability is None or capability < (8, 0)):
        raise bad_value(
            "tf32",
            "tf32 needs an Ampere GPU or newer",
            why=f"found {machine.gpu} ({machine.arch.name}); needed sm_80 or above",
            do="set tf32: auto",
        )
    for key, found in (
        ("fsdp", [name for name in ("fsdp", "fsdp_config") if getattr(config, name)]),
        ("deepspeed", ["deepspeed"] if config.deepspeed else []),
    ):
        if found and cpu:
            raise AttnimgError(
                f"{key} needs a GPU",
                why="on a CPU accelerate would silently run plain DDP; found no GPU",
                do=f"remove {' and '.join(found)}; torchrun --nproc-per-node N trains here",
                code=f"{key}-needs-gpu",
                key=key,
            )
    if config.deepspeed and not _is_installed(machine, "deepspeed"):
        raise AttnimgError(
            "deepspeed is not installed",
            why="found the key deepspeed, and no such package",
            do="install deepspeed, or use fsdp",
            code="not-installed",
            key="deepspeed",
        )


def _check_optimizer(config: Config, machine: Machine) -> None:
    """Raise for paged optimizers on a CPU, and for those of a package that is not installed."""
    name = config.optimizer
    if name.startswith("paged_") and machine.arch.vendor == "cpu":
        raise bad_value(
            "optimizer",
            f"optimizer: {name} needs a GPU",
            why="paged memory is CUDA's; found no GPU, and bitsandbytes would fall back unpaged",
            do=f"set optimizer: {_UNPAGED.get(name, name.removeprefix('paged_'))}",
        )
    needs = "torchao" if name in ("adamw_torch_8bit", "adamw_torch_4bit") else None
    if needs and not _is_installed(machine, needs):
        raise AttnimgError(
            f"optimizer: {name} needs {needs}",
            why=f"{needs} is not installed",
            do=f"pip install {needs}, or set optimizer: adamw_8bit",
            code="not-installed",
            key="optimizer",
        )


def require_package_of_qat(config: Config, machine: Machine) -> None:
    """Raise for qat without torchao.

    Raises:
        AttnimgError: code not-installed.
    """
    if config.qat and not _is_installed(machine, "torchao"):
        raise AttnimgError(
            "qat needs torchao",
            why="torchao is not installed",
            do="pip install torchao, or remove qat",
            code="not-installed",
            key="qat",
        )


def _is_installed(machine: Machine, package: str) -> bool:
    return machine.packages is None or package in machine.packages


def _check_processes(config: Config) -> None:
    """Raise for more data processes than this machine can run."""
    cpus = os.cpu_count() or 1
    maximum = max(_PROCESSES, _PROCESSES_A_CPU * cpus)
    for key in ("dataloader_num_workers", "dataset_num_proc", "dataset_processes"):
        requested = getattr(config, key) or 0
        if requested > maximum:
            raise bad_value(
                key,
                f"{key}: {requested} is more than this machine can run",
                why=f"found {cpus} CPUs; needed at most {maximum} processes",
                do=f"set {key}: {cpus}",
            )


def _check_address_space() -> None:
    """Raise for an address space that is too small for torch and its libraries.

    Under such a limit, Python can wait forever for a thread that could not start.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _ADDRESS_BYTES:
        raise AttnimgError(
            "ulimit -v leaves too little memory",
            why=f"found {limit >> 20:,} MiB; needed at least {_ADDRESS_BYTES >> 20:,}, of which "
            "torch and its libraries take 2,300",
            do="run ulimit -v unlimited before attnimg",
            code="bad-environment",
        )


def _check_shared_memory(config: Config) -> None:
    """Raise for workers whose batches do not fit in /dev/shm: torch would wait for them forever.

    Each worker prepares two batches in advance, or dataloader_prefetch_factor.
    """
    workers = config.dataloader_num_workers or 0
    tokens = config.micro_batch_size * config.sequence_len
    batches = config.dataloader_prefetch_factor or 2
    needed = max(_SHARED_BYTES, workers * batches * tokens * _TOKEN_BYTES)
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return
    if workers and free < needed:
        raise AttnimgError(
            "shared memory (/dev/shm) is too small for dataloader_num_workers",
            why=f"found {free / 2**20:,.1f} MiB free; needed {needed / 2**20:,.1f} for "
            f"{counted(workers, 'worker')} with {counted(batches, 'batch', 'batches')} of "
            f"{tokens:,} tokens each",
            do="set dataloader_num_workers: 0, or start the container with --shm-size=1g",
            code="out-of-memory",
            key="dataloader_num_workers",
        )


LOCK_FILE = ".lock"

# Files of a run that has done no step, and folders of trackers; a new run may start in a folder
# with them.
ALLOWED_FILES = frozenset({"receipt.json", PARTIAL, LOCK_FILE, "wandb", "runs"})


def check_output_dir(config: Config) -> ResumePoint | None:
    """Return where the run resumes; raise for a folder that it may not write to.

    Returns:
        None when it starts in an empty folder.

    Raises:
        AttnimgError: output_dir is a file, is not writable or has another run's files; another run
            trains there; the checkpoint to resume from is missing or damaged. Code output-dir,
            output-dir-not-empty, output-dir-busy, no-checkpoint, damaged-checkpoint or
            pickled-weights.
    """
    folder = Path(config.output_dir).expanduser()
    _require_writable(folder)
    require_unlocked(folder)
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    _require_no_other_file(folder, found)
    requested = config.resume_from_checkpoint
    if isinstance(requested, str):
        return _resume_from_named(folder, Path(requested).expanduser(), found=found)
    newest = newest_checkpoint(folder)
    if (requested or config.auto_resume_from_checkpoints) and newest:
        return _resume_from_newest(folder)
    if requested:
        why = f"found no complete checkpoint-N in {folder}"
        if unfinished := _list_unfinished(folder):
            why += f", only {len(unfinished)} that was never finished"
        raise _no_checkpoint(
            "there is no checkpoint to resume from",
            why=why,
            do="remove resume_from_checkpoint, or name a checkpoint's folder with it",
        )
    if set(found) - ALLOWED_FILES and not config.auto_resume_from_checkpoints:
        raise _not_empty(folder, found, newest=newest)
    return ResumePoint(path=None, step=0) if found else None


def _require_no_other_file(folder: Path, names: list[str]) -> None:
    """Raise for a file in place of a checkpoint, over which the run could not save its own."""
    for name in names:
        if is_checkpoint_name(name) and not (folder / name).is_dir():
            raise _output_dir_error(
                f"output_dir {folder} has a file in place of a checkpoint",
                why=f"found {name}, which is not a folder; needed a name that the run can save to",
                do="move it away, or set another output_dir",
            )


def _list_unfinished(folder: Path) -> list[Path]:
    """Return what a killed run left in output_dir: checkpoints that it did not finish."""
    return sorted((folder / PARTIAL).glob("*"))


def _no_checkpoint(what: str, *, why: str, do: str) -> AttnimgError:
    return AttnimgError(what, why=why, do=do, code="no-checkpoint", key="resume_from_checkpoint")


def _resume_from_newest(folder: Path) -> ResumePoint:
    """Return the newest intact checkpoint in output_dir."""
    found = list_checkpoints(folder)
    newest, newer = find_newest_intact(found)
    if newest is None:
        raise damaged_error(found[-1], newer[found[-1]], output_dir=folder)
    return _resume_point(newest, newer)


def _resume_from_named(folder: Path, checkpoint: Path, *, found: list[str]) -> ResumePoint:
    """Return the checkpoint that the config names, here or in another run's folder."""
    _require_checkpoint(checkpoint)
    is_own = checkpoint.resolve().parent == folder.resolve()
    if not is_own and set(found) - ALLOWED_FILES:
        raise _not_empty(folder, found, newest=newest_checkpoint(folder))
    step = checkpoint_step(checkpoint)
    newer = [path for path in list_checkpoints(folder) if checkpoint_step(path) > step]
    if is_own and newer:
        raise _output_dir_error(
            f"output_dir {folder} has checkpoints newer than {checkpoint.name}",
            why=f"found {', '.join(path.name for path in newer)}; they would be mistaken "
            "for checkpoints of this run",
            do="move them away, or set another output_dir",
            code="output-dir-not-empty",
        )
    if wrong := find_damage(checkpoint):
        raise damaged_error(checkpoint, wrong, output_dir=folder)
    return _resume_point(checkpoint, {})


def _resume_point(checkpoint: Path, newer: dict[Path, list[str]]) -> ResumePoint:
    """Return the resume point of an intact checkpoint; raise if it has only weights."""
    if not any(checkpoint.glob("optimizer*")) and not any(checkpoint.glob("global_step*")):
        raise _no_checkpoint(
            f"{checkpoint} can't be resumed from",
            why="it has no optimizer state (save_only_model: true)",
            do="remove resume_from_checkpoint, and set base_model to this folder and output_dir to "
            "a new one, to continue with a new optimizer",
        )
    return ResumePoint(
        path=checkpoint,
        step=checkpoint_step(checkpoint),
        damaged=tuple(newer),
        notes=checkpoint_notes(checkpoint, newer),
    )


def _require_checkpoint(checkpoint: Path) -> None:
    """Raise unless a folder is a checkpoint."""
    is_named = is_checkpoint_name(f"checkpoint-{checkpoint.name.rpartition('-')[2]}")
    is_complete = has_manifest(checkpoint) or (checkpoint / "trainer_state.json").exists()
    if not checkpoint.is_dir() or not is_named or not is_complete:
        why = "no such folder"
        if checkpoint.is_dir():
            why = f"{checkpoint} has no trainer_state.json" if is_named else "its name has no step"
        raise _no_checkpoint(
            f"{checkpoint} is not a checkpoint",
            why=why,
            do="name a checkpoint-N folder, or set resume_from_checkpoint: true",
        )


def _require_writable(folder: Path) -> None:
    """Raise for a file in place of the folder, and for a folder that this user can't write to."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise _output_dir_error(
            f"output_dir {folder} is not a folder",
            why=f"{nearest} is a file",
            do="set output_dir to a folder of its own",
        )
    try:
        # Only writing tests this for root, read-only mounts and unusual file systems alike.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise _not_writable(folder, nearest, error) from error


def _not_writable(folder: Path, nearest: Path, error: OSError) -> AttnimgError:
    """Return the error for an output_dir, by what its nearest existing folder has answered."""
    found, uid, why = nearest.stat(), os.geteuid(), f"{nearest}: {error.strerror}"
    do = "set output_dir elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM):  # not a full disk or a read-only file system
        if found.st_uid == uid:
            why = f"{why}; its mode is {stat.filemode(found.st_mode)}"
            do = f"set output_dir elsewhere, or chmod u+wx {nearest}"
        else:
            why = f"{why}; it belongs to user {found.st_uid}, this is user {uid}"
            do = "set output_dir elsewhere, or chown the folder"
    return _output_dir_error(f"output_dir {folder} can't be written to", why=why, do=do)


def _not_empty(folder: Path, found: list[str], *, newest: Path | None) -> AttnimgError:
    """Return the error for a folder with other files, with advice on resuming the run in it."""
    found = [name for name in found if name not in ALLOWED_FILES]
    names = ", ".join(found[:4]) + (" ..." if len(found) > 4 else "")
    resume = f"set resume_from_checkpoint: true (resumes from {newest.name}), or " if newest else ""
    return _output_dir_error(
        f"output_dir {folder} is not empty",
        why=f"found {names}; a new run would mix with it",
        do=f"{resume}set another output_dir, or remove the folder",
        code="output-dir-not-empty",
    )


def _output_dir_error(what: str, *, why: str, do: str, code: str = "output-dir") -> AttnimgError:
    return AttnimgError(what, why=why, do=do, code=code, key="output_dir")


def prepare_output_dir(folder: Path, resume: ResumePoint | None, *, console: Console) -> None:
    """Remove what a killed run left in output_dir after `resume`; the folder is locked."""
    if resume is None:
        return
    for path in _list_unfinished(folder):
        records.print_line(console, f"removing {path.name}: it was never finished")
    remove_leftovers(folder)
    notes = list(resume.notes)
    for path in resume.damaged:
        notes.append(f"{path.name} is renamed to {rename_damaged(path).name}")
    for note in notes:
        records.print_line(console, printable(note))
    restored = read_run_state(resume.path) if resume.path else {}
    evaluate_again = bool(restored.get("evaluate_first"))
    removed = records.remove_metrics_after(folder, resume.step, evaluate_again=evaluate_again)
    repeated = f"; {removed} logged lines after it are repeated" if removed else ""
    if resume.path:
        records.print_line(console, f"resuming from {resume.path}{repeated}")


def require_unlocked(folder: Path) -> None:
    """Raise if another process trains in a folder; the lock is not acquired.

    Raises:
        AttnimgError: code output-dir-busy.
    """
    if (folder / LOCK_FILE).is_file():
        os.close(_acquire_lock(folder))


@contextmanager
def output_dir_lock(folder: Path) -> Iterator[None]:
    """Create a folder and lock it inside the block.

    Raises:
        AttnimgError: another process trains there (code output-dir-busy).
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = _acquire_lock(folder)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _acquire_lock(folder: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(folder / LOCK_FILE, flags, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return handle  # some network file systems have no locks
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        raise AttnimgError(
            f"another run trains in output_dir {folder}",
            why=f"found {folder / LOCK_FILE}, locked by {owner or 'a process that is starting'}\n"
            "needed: a folder that no running process writes to",
            do="set another output_dir, or wait until that run has ended",
            code="output-dir-busy",
            key="output_dir",
        ) from None
    return handle
