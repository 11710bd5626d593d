"""Coordinate the processes of a run: rank, process group, agreement, lost processes, stop signals.

In a single process, without torchrun, each function returns at once.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from attnimg.errors import AttnimgError

T = TypeVar("T")

# Variables that torchrun sets together.
# Source: torch 2.13, distributed/run.py, "Environment Variables" (2026-11-27).
_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_GROUP_NUMBERS = tuple(name for name in _GROUP if name != "MASTER_ADDR")

# Variables in which MPI's launchers set the number of processes, which accelerate reads on a CPU.
# Source: accelerate 1.15.0, state.py, PartialState._prepare_backend (2026-11-27).
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

# A group of more processes would spend its time on waiting for them.
_NUMBER = re.compile("[0-9]{1,5}")

# Characters of a variable's value that are shown.
_SHOWN = 60

# Errors of gloo, NCCL and torch's store if a process has ended or does not answer.
_LOST_RANK = re.compile(
    r"timed out|timeout|connection (closed|reset|refused)|broken pipe|aborted", re.IGNORECASE
)

# Seconds for the other processes to answer, after an exchange has failed.
_ANSWER_S = 5.0
# Seconds that processes wait for one another before the group exists, unless ddp_timeout is set:
# torch's default with gloo.
# Source: torch 2.13, distributed/constants.py and c10d's Backend.hpp (2026-11-27).
_JOIN_S = 1800.0
# Seconds that a failed process waits for the others to read its error.
_NOTICE_S = 60.0
_POLL_S = 0.05


def world_size() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """Return this process's rank; rank 0 prints and writes."""
    return _number("RANK", 0)


def _number(name: str, default: int) -> int:
    """Return a variable as a number; the default if it is not a number (see require_group)."""
    text = os.environ.get(name, "")
    return int(text) if _NUMBER.fullmatch(text) else default


def require_group() -> None:
    """Raise unless all variables of torchrun are set and consistent, or none is set.

    Raises:
        AttnimgError: a variable is missing, out of range or not a number, as after an incomplete
            export (code bad-environment).
    """
    found = {name: os.environ[name] for name in _GROUP if name in os.environ}
    if not found.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        found = {name: os.environ[name] for name in _MPI if _number(name, 1) > 1}
        if not found:
            return
    numbers = {name: text for name, text in found.items() if name != "MASTER_ADDR"}
    invalid = [name for name, text in numbers.items() if not _NUMBER.fullmatch(text)]
    missing = [name for name in _GROUP if not found.get(name)]
    in_range = _number("LOCAL_RANK", 0) <= rank() < _number("WORLD_SIZE", 1) and _port() < 2**16
    if not invalid and not missing and in_range:
        return
    values = ", ".join(f"{name}={text[:_SHOWN]}" for name, text in found.items())
    needed = "numbers with LOCAL_RANK <= RANK < WORLD_SIZE and MASTER_PORT < 65536"
    if missing:
        needed = f"all of {', '.join(_GROUP)} as torchrun sets them, or none"
    raise AttnimgError(
        "the environment describes an incomplete group of processes",
        why=f"found {values}\nneeded {needed}",
        do=f"for one process: unset {' '.join(found)}; for several: start them with torchrun",
        code="bad-environment",
    )


def join_group(*, cpu: bool, timeout_s: float | None) -> None:
    """Join the process group that torchrun started; do nothing in a single process.

    Args:
        cpu: whether the processes use gloo, because there is no GPU.
        timeout_s: seconds that a process waits for the others in each exchange; None for torch's
            default, 30 minutes with gloo and 10 with NCCL.
    """
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    if not torch.distributed.is_initialized():
        if not cpu:
            _require_device(torch.cuda.device_count())
        store = _wait_for_all_ranks(timeout_s)
        timeout = {} if timeout_s is None else {"timeout": timedelta(seconds=timeout_s)}
        with lost_rank_errors(timeout_s):
            PartialState(cpu=cpu, **timeout)
        del store  # not deleted before: torch's own store uses the server of rank 0
        # A process that ends while gloo's threads run sometimes aborts, after all work is done, and
        # torchrun would report a failed run.
        atexit.register(_destroy_group)


def _require_device(count: int) -> None:
    """Raise unless this process has a GPU.

    Raises:
        AttnimgError: LOCAL_RANK is beyond the GPUs that torch sees (code bad-environment).
    """
    number = _number("LOCAL_RANK", 0)
    if number >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")[:_SHOWN]
        raise AttnimgError(
            f"rank {rank()} has no GPU",
            why=f"found LOCAL_RANK={number} and {count} GPUs (CUDA_VISIBLE_DEVICES: {visible}); "
            "needed a GPU for each process of this machine",
            do=f"start {count} processes per machine, with torchrun --nproc-per-node {count}",
            code="bad-environment",
        )


def _wait_for_all_ranks(timeout_s: float | None) -> Any:
    """Wait until all processes are ready to join; return the store in which they record that.

    Raises:
        AttnimgError: a process failed before, or did not join in time (code rank-lost).
    """
    deadline = time.monotonic() + (_JOIN_S if timeout_s is None else timeout_s)
    store = _open_store(deadline)
    if store is None:
        raise _lost_rank_error(
            [0], timeout_s, found=f"no server at {':'.join(map(str, _address()))}"
        )
    others = [other for other in range(world_size()) if other != rank()]
    try:
        store.set(_store_key("joins", rank()), str(world_size()))
        while others:
            for other in (*others, world_size()):
                _check_other_rank(store, other)
            others = [other for other in others if not store.check([_store_key("joins", other)])]
            if others and time.monotonic() > deadline:
                raise _lost_rank_error(others, timeout_s, found="it did not join the group")
            time.sleep(_POLL_S if others else 0)
    except RuntimeError as error:  # the store's process has ended
        raise _lost_rank_error([0], timeout_s, found=str(error).splitlines()[0]) from error
    return store


def _check_other_rank(store: Any, other: int) -> None:
    """Raise if another process has failed, or belongs to a group of another size.

    Args:
        store: the store of the group.
        other: its rank; the size of the group stands for all processes whose RANK is too large.
    """
    if store.check([_store_key("failed", other)]):
        text = store.get(_store_key("failed", other)).decode(errors="replace")
        store.set(_store_key("read", rank()), b"1")
        name = f"rank {other} of {world_size()}"
        if other == world_size():
            name = f"a process whose RANK is above {world_size() - 1}"
        raise AttnimgError(
            f"{name} ended before the group was complete",
            why=f"found there: {text}",
            do="fix the error that it printed, and start all processes again",
            code="rank-lost",
            exit_code=1,
        )
    if store.check([_store_key("joins", other)]):
        size = store.get(_store_key("joins", other)).decode(errors="replace")
        if size != str(world_size()):
            store.set(_store_key("read", rank()), b"1")
            raise AttnimgError(
                "the processes do not agree: WORLD_SIZE",
                why=f"WORLD_SIZE: rank {rank()} has {world_size()}, rank {other} has {size}",
                do="start all processes with one torchrun command, or set one WORLD_SIZE",
                code="rank-mismatch",
                exit_code=1,
            )


def report_failure(text: str) -> None:
    """Report a failure to the processes that wait for this one to join, so that they end at once.

    Once the group exists, this is not needed: the others notice the lost connection.

    Args:
        text: the reason in one line.
    """
    if world_size() == 1:
        return
    if any(not _NUMBER.fullmatch(os.environ.get(name, "")) for name in _GROUP_NUMBERS):
        return
    if not os.environ.get("MASTER_ADDR") or _port() >= 2**16:
        return
    try:
        import torch

        if torch.distributed.is_initialized():
            return
        deadline = time.monotonic() + _NOTICE_S
        store = _open_store(deadline)
        if store is None:
            return
        own = min(rank(), world_size())  # see _check_other_rank
        store.set(_store_key("failed", own), text[:500].encode())
        others = [other for other in range(world_size()) if other != rank()]
        while _hosts_store() and others and time.monotonic() < deadline:
            others = [
                other
                for other in others
                if not any(store.check([_store_key(event, other)]) for event in ("read", "failed"))
            ]
            time.sleep(_POLL_S)
    except (AttnimgError, RuntimeError, ValueError, ImportError):
        return  # the error of this process matters more than why it can't be reported


def _open_store(deadline: float) -> Any:
    """Return the key-value store of the group; None if it is not served until the deadline.

    Raises:
        AttnimgError: another program listens at its address (code bad-environment).
    """
    from torch.distributed import TCPStore

    host, port = _address()
    while not _hosts_store() and not _is_served(host, port):
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_S)
    wait = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    found: list[Any] = []

    def connect() -> None:
        try:
            found.append(
                TCPStore(
                    host, port, world_size(), _hosts_store(), wait, wait_for_workers=False,
                    multi_tenant=True,
                )
            )  # fmt: skip
        except RuntimeError as error:
            found.append(error)

    # In a thread: if another program listens there and never answers, torch waits forever.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(wait.total_seconds() + _ANSWER_S)
    if found and not isinstance(found[0], RuntimeError):
        return found[0]
    why = str(found[0]).splitlines()[0][:200] if found else "a program that does not answer"
    raise AttnimgError(
        f"the processes can't use {host}:{port}",
        why=f"rank {rank()} found {why}\nneeded a port that only rank 0 of this run listens on",
        do="set MASTER_PORT to a free port, and give each process a RANK of its own",
        code="bad-environment",
        exit_code=1,
    )


def _hosts_store() -> bool:
    """Return whether this process serves the store, which torchrun's agent may do instead.

    Source: torch 2.13, distributed/rendezvous.py, _create_c10d_store (2026-11-27).
    """
    return rank() == 0 and not _agent_hosts_store()


def _agent_hosts_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _is_served(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], _port()


def _port() -> int:
    return _number("MASTER_PORT", 0)


def _store_key(event: str, number: int) -> str:
    """Return a process's key in the store; it includes the count of torchrun's restarts."""
    return f"attnimg/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{event}/{number}"


def _destroy_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Exit; with several processes, skip the teardown of torch's threads.

    Gloo's threads and DDP's reducer outlive the interpreter, and their teardown sometimes aborts
    (SIGABRT) after everything is written: torchrun would report a failed run. Seen with torch 2.13
    on a CPU, about once in ten runs of two processes (2026-11-21).
    """
    if world_size() == 1:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def require_same_on_all_ranks(
    facts: Mapping[str, object], *, cpu: bool, timeout_s: float | None
) -> None:
    """Raise unless all processes have the same values.

    Args:
        facts: name -> value that must be equal; errors show the names, such as config keys.
        cpu: whether the processes use gloo, because there is no GPU.
        timeout_s: as for `join`.

    Raises:
        AttnimgError: two processes differ (rank-mismatch), or one did not answer (rank-lost).
    """
    if world_size() == 1:
        return
    join_group(cpu=cpu, timeout_s=timeout_s)
    own = {name: json.dumps(fact, sort_keys=True, default=str) for name, fact in facts.items()}
    with lost_rank_errors(timeout_s):
        all_facts = gather_objects(own)
    first = all_facts[0]
    other = next((number for number, found in enumerate(all_facts) if found != first), None)
    if other is None:
        return
    names = sorted(first.keys() | all_facts[other].keys())
    differing = [name for name in names if first.get(name) != all_facts[other].get(name)]
    lines = []
    for name in differing[:5]:
        ours, theirs = first.get(name, "nothing"), all_facts[other].get(name, "nothing")
        lines.append(f"{name}: rank 0 has {_shorten(ours, theirs)}, "
                     f"rank {other} has {_shorten(theirs, ours)}")  # fmt: skip
    if len(differing) > len(lines):
        lines.append(f"and {len(differing) - len(lines)} more")
    raise AttnimgError(
        f"the processes do not agree: {', '.join(differing[:5])}",
        why="\n".join(lines),
        do="start every process with the same config, model, data, packages and kind of GPU",
        code="rank-mismatch",
        exit_code=1,
    )


def _shorten(text: str, other: str, *, width: int = 120) -> str:
    """Return text cut to its first difference from another, with a little before it."""
    if len(text) <= width:
        return text
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
    return f"...{text[max(0, same - 40) : same + width]}..."


@contextmanager
def lost_rank_errors(timeout_s: float | None) -> Iterator[None]:
    """Turn torch's error about a process that ended or does not answer into an AttnimgError.

    Raises:
        AttnimgError: code rank-lost.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not _LOST_RANK.search(str(error)):
            raise
        found = str(error).splitlines()[0]
        raise _lost_rank_error(_ranks_without_answer(), timeout_s, found=found) from error


def _lost_rank_error(ranks: list[int], timeout_s: float | None, *, found: str) -> AttnimgError:
    ranks_text = f"rank {', '.join(map(str, ranks))}" if ranks else "another process"
    limit = "torch's default timeout" if timeout_s is None else f"ddp_timeout: {timeout_s:g} s"
    return AttnimgError(
        f"{ranks_text} of {world_size()} did not answer",
        why=f"rank {rank()} waited for {limit}, or lost its connection\nfound {found}",
        do="check the output of that process and its GPU; raise ddp_timeout if a step or an "
        "evaluation takes longer",
        code="rank-lost",
        key="ddp_timeout",
        exit_code=1,
    )


def _ranks_without_answer() -> list[int]:
    """Return the processes that do not write to the group's store within _ANSWER_S seconds."""
    from torch.distributed.distributed_c10d import _get_default_store

    rank_0_hosts = rank() != 0 and not _agent_hosts_store()
    try:
        store = _get_default_store()
        store.set(f"attnimg/alive/{rank()}", "1")
        # Rank 0 checks last, since the store that it hosts ends with it.
        time.sleep(_ANSWER_S * 0.8 if rank_0_hosts else _ANSWER_S)
        if rank_0_hosts and not _is_served(*_address()):
            return [0]
        return [r for r in range(world_size()) if not store.check([f"attnimg/alive/{r}"])]
    except (RuntimeError, ValueError):  # the store's process has ended, or there is no store
        return [0] if rank_0_hosts else []


def gather_objects(own: T) -> list[T]:
    """Return the values of all processes, by rank; every process must call this."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    found: list[T] = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set in any process; every process must call this."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    on_gpu = torch.distributed.get_backend() == "nccl"
    flags = torch.tensor([int(flag)], device="cuda" if on_gpu else "cpu")
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


# A terminal sends Ctrl-C to the whole process group, and torchrun then sends its own signal to
# each worker as well: two signals this close together count as one.
ONE_SIGNAL_SECONDS = 2.0


class Stopped(BaseException):
    """Raised when a run has stopped on a signal; like KeyboardInterrupt, it is not an Exception.

    Args:
        number: the signal: 1, 2 or 15.
        step: optimizer steps done.
        checkpoint: the one to resume from; None when no step was done.
    """

    def __init__(self, number: int, *, step: int = 0, checkpoint: Path | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}")
        self.number, self.step, self.checkpoint = number, step, checkpoint

    @property
    def exit_code(self) -> int:
        """Return what a shell expects: 129 for SIGHUP, 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class StopFlag:
    """Record the signal that this process received; raise at once if no step is running.

    Attributes:
        number: the received signal; None if there was none.
        training: whether a step is running, so that stopping can wait for its end.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.training = False
        self._at = 0.0
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """Handle a signal, as `signal.signal` calls it.

        Raises:
            Stopped: no step is running, or this is the second request.
        """
        if number == signal.SIGHUP:
            self._leave_terminals()
        first, repeat = self.number is None, time.monotonic() - self._at < ONE_SIGNAL_SECONDS
        if first:
            self.number, self._at = number, time.monotonic()
        if not self.training or not (first or repeat):
            raise Stopped(number)

    def _leave_terminals(self) -> None:
        """Discard further output: writing to a closed terminal raises EIO."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Handle Ctrl-C, SIGTERM and SIGHUP inside the block; restore the handlers after it.

    An ignored SIGHUP stays ignored, as nohup(1) requires.
    """
    flag = StopFlag()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, flag.receive) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
