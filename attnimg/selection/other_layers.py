"""Check layers without softmax attention: required packages, and support for packing.

Attention backends and masks do not affect them: packed documents are isolated by kernels that take
document boundaries, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from attnimg.facts import Finding, Machine, Model, Problem
from attnimg.files import read_data

# The document boundaries in train's packed batches; see train/rows.py.
_IN_BATCH = frozenset({"cu_seq_lens_q", "seq_idx"})
# Layers that process each token on its own.
_TOKENWISE = frozenset({"moe", "mlp"})
# The kind of layers that a model type has, but that its config lists in no known way.
UNLISTED = "unlisted"
_UNKNOWN = "of a kind that is not known here"


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherLayers:
    """One kind of such layers in a model.

    Attributes:
        kind: the row of data/other_layers.toml, or the name in the config.
        label: its usual name.
        count: how many layers have it; None when the config does not say.
        needs: the distributions of its kernels.
        missing: those of them that are not installed.
        keeps_apart: whether packed documents are isolated; None when not known.
        why: the reason for keeps_apart.
        source: the source of the reason.
    """

    kind: str
    label: str
    count: int | None
    needs: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    keeps_apart: bool | None = None
    why: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherKind:
    """A row of data/other_layers.toml; the file explains its keys."""

    label: str
    types: list[str]
    packages: list[str]
    batch: list[str]
    source: str
    every: bool = False


def other_layers(model: Model | None, machine: Machine) -> tuple[OtherLayers, ...]:
    """Return the kinds of layers without softmax attention that a model has.

    Args:
        model: the model; None when its config.json is not available.
        machine: the machine, with its packages; if they are not known, all are assumed.
    """
    if model is None:
        return ()
    found = {kind: count for kind, count in model.other_layers if kind not in _TOKENWISE}
    unlisted = found.pop(UNLISTED, None) is not None
    named = next(((name, row) for name, row in kinds().items() if model.type in row.types), None)
    if named is None:
        return tuple(
            OtherLayers(kind=kind, label=f"{kind!r}, {_UNKNOWN}", count=count)
            for kind, count in found.items()
        )
    name, row = named
    if not (found or unlisted or row.every):
        return ()
    count = sum(found.values()) or None
    if row.every:
        count = sum(layer.count for layer in model.layers) or None
    installed = row.packages if machine.packages is None else machine.packages
    missing = tuple(package for package in row.packages if package not in installed)
    absent = [key for key in row.batch if key not in _IN_BATCH]
    if not row.batch:
        why = "transformers passes no document boundaries to it"
    elif missing:
        why = f"only the kernels of {' and '.join(row.packages)} take document boundaries"
    elif absent:
        why = (
            f"it takes document boundaries as {' and '.join(absent)}, which train's batches do not "
            "have yet"
        )
    else:
        why = f"it takes document boundaries as {' and '.join(row.batch)}"
    return (
        OtherLayers(
            kind=name,
            label=row.label,
            count=count,
            needs=tuple(row.packages),
            missing=missing,
            keeps_apart=bool(row.batch) and not missing and not absent,
            why=why,
            source=row.source,
        ),
    )


def findings_on(
    problem: Problem, machine: Machine
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Return the errors and the warnings about a model's layers without softmax attention.

    Args:
        problem: the run.
        machine: the machine, with its packages.
    """
    errors, warnings = [], []
    for layers in other_layers(problem.model, machine):
        assert problem.model is not None
        count = "the layers" if layers.count is None else f"{layers.count} layers"
        missing = " and ".join(layers.missing)
        if problem.packing and layers.keeps_apart is False:
            # Installing kernels does not help if a batch lacks the boundaries that they need.
            batch = kinds()[layers.kind].batch
            helps = missing and batch and _IN_BATCH.issuperset(batch)
            install = f", or, on a GPU, install {missing}" if helps else ""
            error = Finding(
                code="packing-not-isolated",
                key="sample_packing",
                what=f"packed documents would mix in {count} of {problem.model.type}, "
                f"which have {layers.label}",
                why=f"found: {layers.why}{f' ({missing} not installed)' if missing else ''}\n"
                f"needed: layers that get the boundaries of packed documents [{layers.source}]",
                do=f"set sample_packing: false{install}",
            )
            errors.append(error)
        elif problem.packing and layers.keeps_apart is None:
            warning = Finding(
                code="packing-unproven",
                key="sample_packing",
                what=f"it is not known whether packed documents are isolated in {count} "
                f"({layers.label})",
                do="nothing now: attnimg train checks this on the real model before the first "
                "step, and stops when documents leak",
            )
            warnings.append(warning)
        elif missing:
            warning = Finding(
                code="slow-layers",
                key="base_model",
                what=f"{count} with {layers.label} run in plain PyTorch, which is correct but "
                f"slow: {missing} not installed",
                do=f"install {missing}, or accept the speed",
            )
            warnings.append(warning)
    return tuple(errors), tuple(warnings)


def text_of(layers: OtherLayers) -> str:
    """Return a description of one kind of other layers, in one line."""
    count = "some" if layers.count is None else str(layers.count)
    text = f"{count} layers with {layers.label}"
    if layers.needs:
        text += f"; needs {', '.join(layers.needs)}"
    if layers.missing:
        text += f" (not installed: {', '.join(layers.missing)})"
    isolated = {True: "isolated", False: "not isolated", None: "not known to be isolated"}
    return f"{text}; packed documents {isolated[layers.keeps_apart]}" + (
        f": {layers.why}" if layers.why else ""
    )


def hybrid_types() -> frozenset[str]:
    """Return the model types that have or may have such layers."""
    return frozenset(name for row in kinds().values() for name in row.types)


@cache
def kinds() -> dict[str, OtherKind]:
    """Read data/other_layers.toml: name -> kind."""
    return {name: OtherKind(**row) for name, row in read_data("other_layers.toml").items()}
