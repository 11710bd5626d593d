"""Apply a plan: which model classes take a backend, and what a loaded model really runs."""

from attnimg.apply.classes import class_of, facts_of
from attnimg.apply.model import require_applied, running, switch
from attnimg.apply.registry import prepare, restored
from attnimg.apply.routed import backend_of

__all__ = [
    "backend_of",
    "class_of",
    "facts_of",
    "prepare",
    "require_applied",
    "restored",
    "running",
    "switch",
]
