"""List the layers that were replaced in a model: how each is called, and its random inputs.

A layer is called with weights and inputs of the model's sizes. The linear layers of an MLP are left
out: their products are given, so that only the fused part is compared.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnimg.liger import Replaced, ReplacedFunction
from attnimg.run_facts import LayersTask

# Experts that are proven together; a layer may have hundreds, all of one size, and GBs in float64.
EXPERTS = 3

# Root mean squares of the rows of extreme norms: of padding, too small and too large to be squared
# in half precision. With those of float16, which has a small range, last.
_EXTREME_NORMS = ((0.0, 1e-6, 1e6, 1.0), (0.0, 1e-4, 8e3, 1.0))

# Largest values of the rows of an extreme GLU: exp overflows float32 beyond 88. The product of two
# must be within the range of float16.
_EXTREME_GATES = ((20.0, 200.0, 1e4), (20.0, 200.0))

# The layers of a GLU that write its result; the others compute its inputs.
_LAST_LINEARS = ("down_proj", "w2")


class Form(NamedTuple):
    """The form of a call.

    Attributes:
        tokens: of all rows of the batch.
        batch: its rows.
        shares_angles: whether all rows have the same angles, cos and sin of a batch of 1, as
            without position_ids.
        extreme: whether the activations are very large or small.
    """

    tokens: int
    batch: int = 2
    shares_angles: bool = False
    extreme: bool = False

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return max(1, self.tokens // self.batch)


class Draw(NamedTuple):
    """The inputs of a call in float64, with values that each one's dtype can represent.

    Attributes:
        leaves: the inputs that get gradients: activations and weights.
        others: the other arguments.
        dtypes: the dtype of each.
        weights: the names of the leaves that are weights.
        kept: the names of activations that the model uses after the call.
        d_out: gradients of the outputs.
        dim: the dimension of tokens in all but weights.
    """

    leaves: dict[str, Tensor]
    others: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    weights: frozenset[str]
    kept: frozenset[str]
    d_out: tuple[Tensor, ...]
    dim: int = 1


Call = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]


class Subject(NamedTuple):
    """One kind of layer: how to call the replaced layer and the model's own, and its inputs.

    Attributes:
        name: for messages, "LlamaRMSNorm".
        found: calls the replaced layer.
        exact: calls the model's own.
        draw: draws the inputs of a form of call.
        dtypes: for each case, the dtypes of activations and of weights.
        width: numbers in a row.
        rows: rows of a token: the heads of a norm of q or k.
        multiplies: whether its kernel multiplies matrices.
    """

    name: str
    found: Call
    exact: Call
    draw: Callable[[Form, torch.dtype, torch.dtype, torch.Generator], Draw]
    dtypes: tuple[tuple[str, str], ...]
    width: int
    rows: int = 1
    multiplies: bool = False


def build_model(task: LayersTask) -> Any:
    """Return the run's model without weights, on the meta device."""
    config = _find_class(task.config_class).from_dict(json.loads(task.config))
    with torch.device("meta"):
        return _find_class(task.model_class)._from_config(config)


def _find_class(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def list_subjects(
    task: LayersTask, exact: Any, model: Any, replaced: Replaced
) -> Iterator[Subject]:
    """Yield each kind of layer that was replaced: class, sizes and settings differ."""
    activation = (task.dtype, task.dtype)
    seen = set()
    for name in replaced.modules:
        own, found = exact.get_submodule(name), model.get_submodule(name)
        if (kind := _kind(own, found)) in seen:
            continue
        seen.add(kind)
        shapes = {key: tuple(weight.shape) for key, weight in own.named_parameters()}
        if any(len(shape) == 3 for shape in shapes.values()):
            yield _experts(own, found, shapes, task)
        elif any(isinstance(child, nn.Linear) for child in own.children()):
            yield _glu(own, found, (activation,))
        else:
            yield _norm(own, found, shapes, task, heads=_heads(exact))
    for function in replaced.functions:
        # The towers for images and audio call it, and a run trains on text.
        if "vision" not in function.name:
            yield from _ropes(exact, function, task)


def _kind(own: nn.Module, found: nn.Module) -> tuple[object, ...]:
    """Return what distinguishes layers: class, the sizes of their weights, and settings."""
    shapes = tuple((name, tuple(weight.shape)) for name, weight in own.named_parameters())
    settings = (
        (key, value)
        for module in (own, found)
        for key, value in vars(module).items()
        if isinstance(value, str | int | float | bool) and key not in ("training", "layer_idx")
    )
    return (type(own), shapes, *settings)


def _precisions(task: LayersTask, *, casts_weights: bool) -> tuple[tuple[str, str], ...]:
    """Return the dtypes of activations and weights in a run.

    Args:
        task: under autocast, embeddings and norms may be float32, and so activations between them.
        casts_weights: whether weights may be float32 under autocast.
    """
    pairs = [(task.dtype, task.dtype)]
    if task.autocast:
        pairs.append(("float32", "float32" if casts_weights else task.dtype))
        pairs += [(task.dtype, "float32")] if casts_weights else []
    return tuple(pairs)


def _heads(model: Any) -> tuple[int, int]:
    """Return the heads of a model's queries, and their width."""
    text = model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // heads


def _norm(
    own: nn.Module,
    found: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    task: LayersTask,
    *,
    heads: tuple[int, int],
) -> Subject:
    """Return the subject of a norm, whose input, the residual stream, the model uses afterwards.

    A gated norm has a second input, which multiplies the result after an activation. A norm as wide
    as a head is one of q or k, which have a dimension of heads.
    """
    width = next(
        (shape[0] for shape in shapes.values()), json.loads(task.config).get("hidden_size", 64)
    )
    gated = "gate" in inspect.signature(type(own).forward).parameters
    inputs = ("x", "gate") if gated else ("x",)
    groups = (heads[0],) if width == heads[1] else ()

    def draw(
        form: Form, dtype: torch.dtype, weight_dtype: torch.dtype, generator: torch.Generator
    ) -> Draw:
        shape = (form.batch, form.length, *groups, width)
        rows = math.prod(shape[:-1])
        # Rows of different sizes: in the smallest ones, epsilon matters.
        sizes = torch.logspace(-2.5, 1, rows, dtype=torch.float64)
        sizes = sizes[torch.randperm(rows, generator=generator)]
        if form.extreme:
            chosen = torch.tensor(_EXTREME_NORMS[dtype == torch.float16], dtype=torch.float64)
            sizes = chosen.repeat(rows // len(chosen) + 1)[:rows]
        sizes = sizes.view(*shape[:-1], 1)
        x = _round(_normal(shape, generator) * sizes, dtype)
        weights = {key: _round(1 + 0.3 * _normal(shape, generator), weight_dtype)
                   for key, shape in shapes.items()}  # fmt: skip
        # A part along x, without which the gradient's second term would be smaller than rounding.
        along = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-9)
        # The gradient of x is up to 1 / sqrt(epsilon) times as large, for a row of zeros.
        d_out = (_normal(x.shape, generator) + along) * (1e3 * sizes).clamp(1e-3, 1)
        given = {"x": x}
        if gated:
            given["gate"] = _round(2 * _normal(x.shape, generator), dtype)
        return Draw(
            leaves={**given, **weights}, others={},
            dtypes={**dict.fromkeys(inputs, dtype), **dict.fromkeys(weights, weight_dtype)},
            weights=frozenset(weights), kept=frozenset(inputs), d_out=(_round(d_out, dtype),),
        )  # fmt: skip

    def call(module: nn.Module) -> Call:
        return lambda given: (
            torch.func.functional_call(
                module,
                {key: given[key] for key in shapes},
                tuple(given[name] for name in inputs),
            ),
        )

    return Subject(type(own).__name__, call(found), call(own), draw,
                   _precisions(task, casts_weights=True), width, rows=math.prod(groups),
    )  # fmt: skip


class _Given(nn.Module):  # type: ignore[misc]  # torch is Any here
    """Return a tensor in place of a linear layer's product."""

    value: Tensor

    def forward(self, _x: Tensor) -> Tensor:
        """Return the value."""
        return self.value


def _glu(own: nn.Module, found: nn.Module, dtypes: tuple[tuple[str, str], ...]) -> Subject:
    """Return the subject of an MLP; the outputs of its input layers are given."""
    linears = {name: child for name, child in own.named_children() if isinstance(child, nn.Linear)}
    first = [name for name in linears if name not in _LAST_LINEARS]
    width = sum(linears[name].out_features for name in first)

    def call(module: nn.Module) -> Call:
        module = copy.deepcopy(module)
        for name in linears:
            setattr(module, name, _Given() if name in first else nn.Identity())

        def run(given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            for name in first:
                getattr(module, name).value = given[name]
            return (module(given[first[0]]),)

        return run

    def draw(
        form: Form, dtype: torch.dtype, _weight: torch.dtype, generator: torch.Generator
    ) -> Draw:
        def values(features: int) -> Tensor:
            shape = (form.batch, form.length, features)
            if not form.extreme:
                return _round(2 * _normal(shape, generator), dtype)
            sizes = torch.tensor(_EXTREME_GATES[dtype == torch.float16], dtype=torch.float64)
            sizes = sizes.repeat(form.length)[: form.length].view(-1, 1)
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
            return _round((2 * uniform - 1) * sizes, dtype)

        leaves = {name: values(linears[name].out_features) for name in first}
        d_out = _round(_normal((form.batch, form.length, width // 2), generator), dtype)
        return Draw(
            leaves=leaves, others={}, dtypes=dict.fromkeys(leaves, dtype), weights=frozenset(),
            kept=frozenset(), d_out=(d_out,),
        )  # fmt: skip

    return Subject(type(own).__name__, call(found), call(own), draw, dtypes, width)


def _experts(
    own: nn.Module, found: nn.Module, shapes: Mapping[str, tuple[int, ...]], task: LayersTask
) -> Subject:
    """Return the subject of the experts of a layer, with random routing."""
    count = min(EXPERTS, next(iter(shapes.values()))[0])
    sizes = {name: (count, *shape[1:]) for name, shape in shapes.items()}
    hidden = sizes["gate_up_proj"][2]

    def call(module: Any) -> Call:
        module = copy.deepcopy(module)
        module.num_experts = count
        if hasattr(module, "config"):
            # The other implementations have no float64.
            module.config._experts_implementation = "eager"
        return lambda given: (
            torch.func.functional_call(
                module,
                {key: given[key] for key in sizes},
                (given["x"], given["index"], given["routing"]),
            ),
        )

    def draw(
        form: Form, dtype: torch.dtype, weight_dtype: torch.dtype, generator: torch.Generator
    ) -> Draw:
        rows, top = form.tokens, min(2, count)
        # Gates beyond 88, and gradients that stay within the range of float16.
        large, small = (60.0, 2.0**-6) if form.extreme else (1.0, 1.0)
        weights = {key: _round(_normal(shape, generator) / math.sqrt(shape[2]), weight_dtype)
                   for key, shape in sizes.items()}  # fmt: skip
        index = torch.rand((rows, count), generator=generator).topk(top).indices
        leaves = {
            "x": _round(large * _normal((rows, hidden), generator), dtype),
            "routing": _round(torch.rand((rows, top), generator=generator).double() + 0.1, dtype),
            **weights,
        }
        return Draw(
            leaves=leaves, others={"index": index},
            dtypes={"x": dtype, "routing": dtype, **dict.fromkeys(weights, weight_dtype)},
            weights=frozenset(weights), kept=frozenset({"x"}),
            d_out=(_round(small * _normal((rows, hidden), generator), dtype),), dim=0,
        )  # fmt: skip

    pairs = _precisions(task, casts_weights=False)
    return Subject(
        type(own).__name__, call(found), call(own), draw, pairs, hidden * count, multiplies=True
    )


def _ropes(model: Any, replaced: ReplacedFunction, task: LayersTask) -> Iterator[Subject]:
    """Yield a subject of the function that rotates q and k, for each set of angles."""
    text = model.config.get_text_config(decoder=True)
    heads, head_dim = _heads(model)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    embedding = next(m for name, m in model.named_modules() if name.endswith("rotary_emb"))
    embedding = type(embedding)(config=text)
    takes_kind = "layer_type" in inspect.signature(embedding.forward).parameters
    kinds = list(dict.fromkeys(text.layer_types)) if takes_kind else [None]

    for kind in kinds:

        def draw(
            form: Form,
            dtype: torch.dtype,
            angle_dtype: torch.dtype,
            generator: torch.Generator,
            kind: str | None = kind,
        ) -> Draw:
            shape = (form.batch, form.length)
            # As in packed rows: each document begins at 0, and some are long.
            rows = 1 if form.shares_angles else form.batch
            positions = torch.randint(0, 4096, (rows, form.length), generator=generator)
            options = {"layer_type": kind} if kind else {}
            angles = embedding(torch.zeros(1, dtype=torch.float32), positions, **options)
            cos, sin = (_round(x.detach().double(), angle_dtype) for x in angles)
            leaves = {
                name: _round(_normal((*shape, count, head_dim), generator), dtype)
                for name, count in (("q", heads), ("k", kv_heads))
            }
            d_out = tuple(_round(_normal(x.shape, generator), dtype) for x in leaves.values())
            return Draw(
                leaves=leaves, others={"cos": cos, "sin": sin},
                dtypes={"q": dtype, "k": dtype, "cos": angle_dtype, "sin": angle_dtype},
                weights=frozenset(), kept=frozenset({"cos", "sin"}), d_out=d_out,
            )  # fmt: skip

        def call(function: Callable[..., Any]) -> Call:
            # A model's projections are (B, T, H, D), and q and k are transposed views of them.
            return lambda given: tuple(
                out.transpose(1, 2)
                for out in function(
                    given["q"].transpose(1, 2), given["k"].transpose(1, 2),
                    given["cos"], given["sin"],
                )
            )  # fmt: skip

        name = f"{replaced.name} of {kind}" if kind else replaced.name
        pairs = _precisions(task, casts_weights=True)[:1]
        if task.autocast:
            pairs += ((task.dtype, "float32"),)
        found = vars(replaced.module)[replaced.name]
        yield Subject(
            name, call(found), call(replaced.original), draw, pairs, heads * head_dim
        )  # fmt: skip


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _round(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 values that a dtype can represent."""
    return value.to(dtype).double()
