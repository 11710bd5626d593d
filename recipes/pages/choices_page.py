"""Write docs/what-auto-chooses.md: choices of `auto`, ranks, and choices that may surprise."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from attnimg.backends import all_backends
from attnimg.facts import Model, Rank
from attnimg.select.other_layers import kinds
from recipes.files import NOTICE
from recipes.pages.choices import ROW, Choice, taken
from recipes.pages.images_and_kernels import table

_SHORT = {
    "flash_attention_4_generic": "FA4g",
    "flash_attention_4": "FA4",
    "flash_attention_3": "FA3",
    "flash_attention_2": "FA2",
    "flex_attention": "flex",
}

_INTRO = f"""# What `auto` chooses

For packed training in rows of {ROW} tokens, with the packages of the GPU's image; without an image
every package is assumed. GPUs with the same choices share a column. FA2 is `flash_attention_2`,
FA4g `flash_attention_4_generic` (FlashAttention-4 with its generic backward pass), flex
`flex_attention`. Where two are named, layers of different shape run different ones, in the order of
the table of models; `sdpa` beside another one is called document by document, without a mask. GiB:
the memory that one layer keeps and that grows with the square of the row length. **packing
refused**: packed documents would mix, in layers without softmax attention, or because transformers
builds the backend's mask without document boundaries (gpt-oss, except on flash kernels); with
`sample_packing: false` it runs. When the choice fails its proof on the GPU, `attnimg train` goes on
to the next candidate.

"""

_SURPRISES = """
## Choices that may surprise

- **Gemma 3 and Gemma 4 on a T4 or V100** run xFormers, not plain sdpa: its kernels for these GPUs
  take a window and any head size that is a multiple of 8, and each document by itself (xformers
  0.0.35, ops/fmha/cutlass.py, 2026-11-26); plain sdpa would score 8192 x 8192 tokens. With either,
  activations of Gemma 3 overflow float16, the only half precision that these GPUs have
  (https://unsloth.ai/blog/gemma3, 2026-11-26): `fp16: false` and `bf16: false` train in float32.
- **Gemma 2 on a T4 or V100** and **gpt-oss** there run eager: no kernel for these GPUs has a soft
  cap or sinks. Memory grows with the square of the row length, as the table says: use short rows.
- **Gemma 2 on MI200 and MI300** runs flex: flash-attn's CK kernels accept a soft cap and silently
  ignore it (csrc/flash_attn_ck/mha_varlen_fwd.cpp:316, 2.8.3.post2, 2026-11-26).
- **gpt-oss on AMD** runs flex: aiter has sinks, and no image has aiter.
- **gpt-oss packs on flash kernels only**: transformers 5.22.2 builds its mask without document
  boundaries (modeling_gpt_oss.py:460, 2026-11-27), so documents would mix in eager and flex.
- **Gemma 2, 3 and 4 at head_dim 256 on B200 and B300** run FA4g. That it beats FlashAttention-2
  is expected, not measured: the published 4.04 ms against 13.98 ms belong to another patch for
  the same gap (flash-attention PR #2749), which is not in 4.0.0b36. It compiles for sm_100 with a
  window, a soft cap, both and neither, and for sm_103 with both (no GPU, 2026-11-26); without the
  variable that chooses it, FlashAttention-4 refuses the first three. The variable is read at each
  backward call, so it holds for all layers of that size in the process.
- **Layers of head_dim 512 (Gemma 4)** run sdpa document by document beside a flash kernel: no flash
  kernel has a backward pass at that size.
- **Llama 4** runs flex, and plain sdpa below sm_80: its class says that it has no flash attention,
  for the chunks that its mask describes (transformers 5.22.2, modeling_llama4.py).
"""

_RANKS = """
## The ranks

`auto` takes the fitting candidate with the lowest rank. Where a backend has a rank for a situation,
it replaces the general one. A config that names a backend gets that backend; flash_attention_2 and
_3 get the first of flash_attention_4, _3, _2 that fits, until there are timings of that GPU.

"""


def choices_page(found: Iterable[Choice]) -> str:
    """Write one row per model and one column per group of GPUs; then the facts behind them."""
    all_of = list(found)
    columns = _columns(all_of)
    rows = []
    for name in dict.fromkeys(choice.name for choice in all_of):
        cells = [next(c for c in column[0] if c.name == name) for column in columns]
        rows.append((name, *(_cell(cell) for cell in cells)))
    heads = [" ".join(f"`{name}`" for name in names) for _, names in columns]
    machines = [
        (" ".join(f"`{name}`" for name in names), f"`{c[0].image}`" if c[0].image else "none",
         c[0].dtype)
        for c, names in columns
    ]  # fmt: skip
    models = {choice.name: choice.model for choice in all_of}
    return (
        f"<!-- {NOTICE} -->\n\n"
        + _INTRO
        + table(("Model", *heads), rows)
        + "\n"
        + table(("`--on`", "Image", "Precision"), machines)
        + _SURPRISES
        + _RANKS
        + table(("Backend", "Rank", "Where", "Why: it ...", "Source"), _rank_rows())
        + "\n## Layers without softmax attention\n\n"
        + table(("Layers", "Model types", "Needs", "Documents isolated by", "Source"), _kind_rows())
        + "\n## The models\n\n"
        + table(
            ("Model", "Layers", "Heads / kv_heads", "head_dim", "Other"),
            [row for name, model in models.items() for row in _layer_rows(name, model)],
        )
    )


def _columns(found: list[Choice]) -> list[tuple[list[Choice], list[str]]]:
    """Return the groups of GPUs with the same choices: their choices, and their names."""
    columns: dict[tuple[object, ...], tuple[list[Choice], list[str]]] = {}
    for gpu, group in groupby(found, key=lambda choice: choice.gpu.name):
        own = list(group)
        key = (own[0].image, own[0].dtype, *(_cell(choice) for choice in own))
        columns.setdefault(key, (own, []))[1].append(gpu)
    return list(columns.values())


def _cell(choice: Choice) -> str:
    text = " + ".join(_SHORT.get(name, name) for name in taken(choice.plan))
    if choice.memory is not None:
        text += f" ({choice.memory.layer / (1 << 30):.1f} GiB)"
    return text + ("; **packing refused**" if choice.refusals else "")


def _rank_rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for backend in all_backends():
        if not backend.automatic:
            continue
        places = [
            Rank(rank=backend.rank, why=backend.rank_why, source=backend.rank_source),
            *backend.ranks,
        ]
        rows += [
            (f"`{backend.name}`", str(place.rank), _where(place), place.why, place.source)
            for place in places
        ]
    return rows


def _where(place: Rank) -> str:
    said = {True: "", False: "not "}
    parts = [
        " ".join(sorted(place.archs)),
        f"{said[place.packed]}packed" if place.packed is not None else "",
        f"{said[place.compiled]}compiled" if place.compiled is not None else "",
        f"{said[place.routed]}beside others" if place.routed is not None else "",
        f"head_dim from {place.head_dim[0]}" if place.head_dim else "",
    ]
    return ", ".join(filter(None, parts)) or "in general"


def _kind_rows() -> list[tuple[str, ...]]:
    return [
        (
            row.label,
            " ".join(f"`{name}`" for name in row.types),
            " ".join(f"`{name}`" for name in row.packages) or "-",
            " and ".join(f"`{name}`" for name in row.batch) or "nothing",
            row.source,
        )
        for row in kinds().values()
    ]


def _layer_rows(name: str, model: Model) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for group in model.layers:
        sizes = dict.fromkeys((group.head_dim_qk, group.head_dim_v))
        besides = [
            f"window {group.window}" if group.window else "",
            f"soft cap {group.softcap:g}" if group.softcap else "",
            "sinks" if group.sinks else "",
        ]
        rows.append(
            (
                name,
                str(group.count),
                f"{group.heads} / {group.kv_heads}",
                ", v ".join(map(str, sizes)),
                ", ".join(filter(None, besides)) or "-",
            )
        )
    for kind, count in model.other_layers:
        rows.append((name, str(count), "-", "-", f"no softmax attention: {kind}"))
    return rows
