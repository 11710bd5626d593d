"""Apply a plan: which model classes take a backend, and what a loaded model really runs."""

from attnimg.apply.classes import class_of, reason_against_class
from attnimg.apply.model import require_applied, running, switch
from attnimg.apply.registry import prepare, restored
from attnimg.apply.routed import backend_of

__all__ = [
    "backend_of",
    "class_of",
    "prepare",
    "reason_against_class",
    "require_applied",
    "restored",
    "running",
    "switch",
]
