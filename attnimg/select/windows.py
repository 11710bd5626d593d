"""When a sliding window hides anything: the one rule of the judgement and of the proof.

A layer whose window is not shorter than its row is full attention, and no kernel is asked for the
window: transformers passes it where `key_length > sliding_window`, attnimg's own calls likewise.
key_length is the tokens of the row that the call gets. Packed rows of a batch reach a kernel one
after another, as one row: then its length counts, though no document of it is longer than
sequence_len.
Source: transformers 5.22.2, modeling_flash_attention_utils.py:685 (2026-11-26).
"""

from __future__ import annotations

from dataclasses import replace

from attnimg.facts import Problem


def with_windows_that_hide(problem: Problem) -> Problem:
    """Return the problem without the windows that are not shorter than its row.

    Without a known sequence_len every window stays.
    """
    if problem.model is None or problem.sequence_len is None:
        return problem
    row = problem.sequence_len * (problem.rows if problem.packing else 1)
    layers = tuple(
        replace(layer, window=None) if layer.window is not None and layer.window >= row else layer
        for layer in problem.model.layers
    )
    return replace(problem, model=replace(problem.model, layers=layers))
