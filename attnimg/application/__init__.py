"""Apply a plan to a model, and check which attention implementation the model runs."""

from attnimg.application.model import (
    current_implementation,
    find_model_class,
    inner_model,
    read_class_limits,
    require_applied,
    switch_backend,
)
from attnimg.application.registry import (
    Hold,
    load_and_register,
    registered_names,
    registries,
    restore_registries,
    unregister,
)
from attnimg.application.router import plan_backend

__all__ = [
    "Hold",
    "current_implementation",
    "find_model_class",
    "inner_model",
    "load_and_register",
    "plan_backend",
    "read_class_limits",
    "registered_names",
    "registries",
    "require_applied",
    "restore_registries",
    "switch_backend",
    "unregister",
]
