"""Register a backend's function with transformers, and restore transformers' registries."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

from attnimg.backends._loading import only_own_code
from attnimg.backends._transformers import (
    applied_form,
    attention_function,
    flash_name,
    load_flash,
)
from attnimg.facts import AttentionFunction, Backend
from attnimg.run_facts import LayerGroup

# transformers' globals for the one loaded flash implementation; 5.17 does not have all of them.
# Source: transformers 5.17.0 and 5.22.2, modeling_flash_attention_utils.py (2026-11-26).
_FLASH_SLOT = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)

# Signals that stop a run. Their handlers are always restored, because Python can't detect a handler
# that C code has set.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Names that attnimg itself registers start with this.
_OWN = "attnimg_"

# transformers' registries belong to the process: threads change them one after another.
registries = threading.RLock()


class Hold:
    """Keep names registered with transformers while this object, or a copy of it, is referenced.

    Args:
        names: those in transformers' registries; only attnimg's own are ever removed.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        _holds.add(self)
        weakref.finalize(self, _unregister_unused, self.names).atexit = False

    def __deepcopy__(self, memo: object) -> Hold:
        """Return another hold, for the copy of a model."""
        return Hold(self.names)

    def release(self) -> None:
        """Unregister the names that no other hold has, or let the active blocks do it."""
        with registries:
            _holds.discard(self)
            _unregister_unused(self.names)


_holds: weakref.WeakSet[Hold] = weakref.WeakSet()


def _held() -> frozenset[str]:
    return frozenset(name for hold in _holds for name in hold.names)


def _unregister_unused(names: Iterable[str]) -> None:
    with registries:
        if not _blocks:
            unregister(frozenset(names) - _held())


class _Before:
    """The content of transformers' registries and globals when a block began."""

    def __init__(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers import modeling_flash_attention_utils as flash

        self.registries = [
            (interface._global_mapping, interface._global_mapping.copy())
            for interface in (AttentionInterface, AttentionMaskInterface)
        ]
        self.slot = {name: getattr(flash, name) for name in _FLASH_SLOT if hasattr(flash, name)}

    def restore(self) -> None:
        """Restore the content. Names that are held now stay registered."""
        from transformers import modeling_flash_attention_utils as flash

        held = _held()
        for registry, content in self.registries:
            stay = {name: registry[name] for name in held if name in registry}
            registry.clear()
            registry.update(content | stay)
        for name, value in self.slot.items():
            setattr(flash, name, value)
        if not _blocks:  # an active block may run names without a hold
            unregister(self.registries[0][1].keys() - held)


# The blocks of `restore_registries` that are active, in the order in which they began.
_blocks: list[_Before] = []


@contextmanager
def restore_registries() -> Iterator[None]:
    """Restore transformers' registries of attention and mask functions after the block.

    Models can run the backends that were registered in the block only until it ends. The names of
    a Hold stay registered. A block of another thread that began later keeps what it needs: when it
    ends, it also restores what this block would have restored.
    """
    with registries:
        before = _Before()
        _blocks.append(before)
    try:
        yield
    finally:
        with registries:
            place = _blocks.index(before)
            _blocks.remove(before)
            if place < len(_blocks):
                _blocks[place].registries, _blocks[place].slot = before.registries, before.slot
            else:
                before.restore()


def registered_names() -> frozenset[str]:
    """Return the names in transformers' registry of attention functions."""
    from transformers import AttentionInterface

    return frozenset(AttentionInterface._global_mapping)


def unregister(names: Iterable[str]) -> None:
    """Remove those names that attnimg registered from transformers' registries."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in names:
        if name.startswith(_OWN):
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)


def load_and_register(
    backend: Backend, *, layers: tuple[LayerGroup, ...] = (), trusted: bool = False
) -> str:
    """Load a backend's kernel, register it if needed, and return its name in transformers.

    A name that transformers itself has is not registered again. Other functions are registered
    together with the mask function that they need, without which transformers passes no mask.

    Args:
        backend: the backend that the plan chose.
        layers: the model's attention layers; attnimg calls the kernel directly if the head_dim of
            v differs from that of q and k.
        trusted: whether hub kernels of untrusted publishers may run (trust_remote_code).

    Returns:
        The value of attn_implementation that selects it in from_pretrained.

    Raises:
        AttnimgError: the kernel is missing or broken.
    """
    with keep_process_settings():
        return _load_and_register(applied_form(backend, layers), trusted=trusted)


def _load_and_register(backend: Backend, *, trusted: bool) -> str:
    name = backend.applied_as or backend.name
    if backend.load_function is not None:
        with only_own_code(backend.name):
            function = attention_function(backend, trusted=trusted)
        register(name, function)
    elif backend.family is not None or backend.hub_repo is not None:
        loaded = flash_name(backend)
        with only_own_code(backend.name):
            load_flash(loaded, trusted=trusted)
        if name == backend.hub_repo:
            # transformers loads the path again, so it needs the revision of kernels.lock.
            name = loaded
    return name


def register(name: str, function: AttentionFunction) -> None:
    """Register an attention function, with the mask function that passes only the padding mask.

    Args:
        name: must not contain "flash", "sdpa" or "flex", which transformers treats specially.
        function: a function of transformers' attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    assert not any(word in name for word in ("flash", "sdpa", "flex")), name

    @wraps(function)
    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **arguments: Any
    ) -> Any:
        output, weights = function(module, query, key, value, attention_mask, **arguments)
        return output.contiguous(), weights

    # afmoe passes attention_mask as a keyword, and calls view(), which needs a contiguous output.
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, flash_attention_mask)


@contextmanager
def keep_process_settings() -> Iterator[None]:
    """Restore signal handlers, the signal mask, umask and working directory after the block.

    Importing a kernel's library may change these. A proof refuses such a kernel, but the proof may
    come from the cache, and the import may behave differently in this process.
    """
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    directory = os.open(".", os.O_PATH | os.O_DIRECTORY)  # which this user need not read
    umask = os.umask(0o077)
    os.umask(umask)
    try:
        yield
    finally:
        os.umask(umask)
        os.fchdir(directory)
        os.close(directory)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        # Only the main thread can set handlers in Python.
        if threading.current_thread() is threading.main_thread():
            _set_handlers(handlers)


def _set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # None: C code has set the handler, and Python can't set it again.
        changed = signal.getsignal(number) is not handler or number in _STOPPING
        if handler is not None and changed:
            # SIGKILL and SIGSTOP can't have a handler.
            with suppress(OSError):
                signal.signal(number, handler)
