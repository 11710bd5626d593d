"""Put a backend's function where transformers looks for it, and take it away again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

from attnimg.backends._attend import as_applied, attention_function
from attnimg.facts import AttentionFunction, Backend, LayerGroup

# transformers' slot for the one flash implementation that is loaded; 5.17 has not all of them.
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

# Signals that stop a run. Their handlers are always set again: Python does not see a handler that C
# code has set.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def restored() -> Iterator[None]:
    """Leave transformers' registries of attention and mask functions as they were on entry.

    A model that was given one of attnimg's backends runs it only inside.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import modeling_flash_attention_utils as flash

    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before = [dict(registry) for registry in registries]
    slot = {name: getattr(flash, name) for name in _FLASH_SLOT if hasattr(flash, name)}
    try:
        yield
    finally:
        for registry, content in zip(registries, before, strict=True):
            registry.clear()
            registry.update(content)
        for name, value in slot.items():
            setattr(flash, name, value)


def prepare(backend: Backend, *, layers: tuple[LayerGroup, ...] = (), trusted: bool = False) -> str:
    """Load a backend's kernel and give the name that transformers has for it from now on.

    A name of transformers' own stays as it is and costs nothing. Others are registered with the
    mask function that they need: without one transformers hands them no mask at all.

    Args:
        backend: what the plan chose.
        layers: the model's attention; v of another head size than q and k needs a call of our own.
        trusted: whether hub kernels of publishers the hub does not vouch for may run.

    Returns:
        What from_pretrained and set_attn_implementation take.

    Raises:
        AttnimgError: the kernel is missing or broken.
    """
    with process_settings_kept():
        return _prepared(as_applied(backend, layers), trusted=trusted)


def _prepared(backend: Backend, *, trusted: bool) -> str:
    name = backend.applied_as or backend.name
    if backend.load_attend is not None:
        register(name, attention_function(backend, trusted=trusted))
    elif backend.family is not None or backend.hub_repo is not None:
        from attnimg.backends._transformers_flash import flash_name, load_flash

        loaded = flash_name(backend)
        load_flash(loaded, trusted=trusted)
        if name == backend.hub_repo:
            # With the revision of kernels.lock: transformers loads the path once more by itself.
            name = loaded
    return name


def register(name: str, function: AttentionFunction) -> None:
    """Register a function that takes no mask but that of the padding.

    Args:
        name: without "flash", "sdpa" and "flex" in it: transformers goes by these.
        function: transformers' attention interface.
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

    # afmoe passes attention_mask by this name, and its view() needs a contiguous output.
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, flash_attention_mask)


@contextmanager
def process_settings_kept() -> Iterator[None]:
    """Restore signal handlers, the signal mask, umask and working directory after the block.

    A kernel's library may change these when it is imported. The proof refuses such kernels, but the
    proof may be a kept one, and an import may behave differently in this process.
    """
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    umask = os.umask(0o077)
    os.umask(umask)
    try:
        yield
    finally:
        os.umask(umask)
        os.fchdir(directory)
        os.close(directory)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            _set_handlers(handlers)


def _set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # None: it was set by C code, and can't be set from here.
        changed = signal.getsignal(number) is not handler or number in _STOPPING
        if handler is not None and changed:
            # SIGKILL and SIGSTOP can't have a handler.
            with suppress(OSError):
                signal.signal(number, handler)
