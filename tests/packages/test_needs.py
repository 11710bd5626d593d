"""What the backends' files say of head sizes, architectures and features is what packages do.

`make test/packages` downloads them, 17 MB, and runs this. Nothing of them is installed.
"""

from __future__ import annotations

import ast
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from packages import constants, function, read
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from attnimg.backends import find_backend
from attnimg.facts import Needs
from attnimg.run_facts import LayerGroup
from attnimg.selection.judge import layer_reasons
from recipes.read import read_recipes

FLASH_API = "csrc/flash_attn/flash_api.cpp"
INTERFACE = "flash_attn/cute/interface.py"
SIZES = range(8, 521, 8)


def needs(name: str) -> Needs:
    found = find_backend(name)
    assert found is not None
    return found.needs


def takes(name: str, qk: int, v: int, *, major: int, kv_heads: int = 8) -> bool:
    layer = LayerGroup(count=1, heads=8, kv_heads=kv_heads, head_dim_qk=qk, head_dim_v=v)
    return not list(layer_reasons(layer, needs(name).head_dims, major, frozenset()))


def test_flash_attn_takes_what_its_file_says() -> None:
    source = read("flash_attn", FLASH_API)
    assert "cc_major >= 8" in source
    assert needs("flash_attention_2").capability_min == (8, 0)
    limits = set(re.findall(r"head_size <= (\d+), \"FlashAttention (?:for|back)ward", source))
    steps = set(re.findall(r"TORCH_CHECK\(head_size % (\d+) == 0", source))
    (rule,) = needs("flash_attention_2").head_dims
    assert (limits, steps) == ({str(rule.qk[1])}, {str(rule.multiple)})
    assert "only support fp16 and bf16" in source
    assert needs("flash_attention_2").dtypes == {"float16", "bfloat16"}


def test_flash_attn_does_a_soft_cap_or_dropout() -> None:
    assert "Softcapping does not support dropout" in read("flash_attn", FLASH_API)
    assert needs("flash_attention_2").exclusive == {"softcap", "dropout"}


@pytest.mark.parametrize("major", [9, 10])
def test_flash_attn_4_takes_the_head_sizes_that_its_file_says(major: int) -> None:
    found = function(read("flash_attn_4", INTERFACE), "_validate_head_dims")
    names: dict[str, Any] = {}
    found.decorator_list = []
    exec(ast.unparse(found), names)

    def allows(qk: int, v: int) -> bool:
        try:
            names["_validate_head_dims"](qk, v, major, 8)
        except AssertionError:
            return False
        return True

    for qk, v in product(SIZES, SIZES):
        if takes("flash_attention_4", qk, v, major=major):
            assert allows(qk, v), (qk, v)
        elif allows(qk, v):
            # Absorbed MLA, for inference: its queries come in two parts.
            assert v == 512, (qk, v)


def test_flash_attn_4_trains_on_the_architectures_that_its_file_says() -> None:
    source = read("flash_attn_4", INTERFACE)
    gates = {
        name: re.search(r"arch // 10 in \[([\d, ]+)\]", ast.unparse(function(source, name)))
        for name in ("_flash_attn_fwd", "_flash_attn_bwd")
    }
    majors = {name: set(map(int, gate[1].split(","))) for name, gate in gates.items() if gate}
    low, high = needs("flash_attention_4").capability_min, needs("flash_attention_4").capability_max
    assert low is not None
    assert high is not None
    assert set(range(low[0], high[0] + 1)) == majors["_flash_attn_bwd"] & majors["_flash_attn_fwd"]


def test_flash_attn_4_has_sinks_where_its_file_says() -> None:
    source = ast.unparse(function(read("flash_attn_4", INTERFACE), "_flash_attn_bwd"))
    gate = re.search(r"assert arch // 10 in \[([\d, ]+)\], 'Learnable sink", source)
    assert gate
    found = needs("flash_attention_4")
    with_sinks = {9, 10, 11, 12} - {
        place for place, missing in found.features_missing.items() if "sinks" in missing
    }
    assert set(map(int, gate[1].split(","))) == with_sinks


def test_xformers_has_the_kernels_that_its_file_says() -> None:
    cutlass = constants(read("xformers", "xformers/ops/fmha/cutlass.py"), "FwOp")
    flash = constants(read("xformers", "xformers/ops/fmha/flash.py"), "FwOp")
    assert cutlass["CUDA_MAXIMUM_COMPUTE_CAPABILITY"] == "(9, 0)"
    assert cutlass["SUPPORTS_DIFFERENT_VALUE_EMBED"] == "True"
    assert flash["SUPPORTS_DIFFERENT_VALUE_EMBED"] == "False"
    assert flash["SUPPORTED_DTYPES"] == "{torch.half, torch.bfloat16}"
    for major in (7, 8, 9):
        assert takes("xformers", 512, 128, major=major)
        assert "float32" not in needs("xformers").dtypes_missing.get(major, ())
        assert not takes("xformers", 100, 100, major=major)
    largest = int(flash["SUPPORTED_MAX_K"])
    for major in (10, 11, 12):
        assert takes("xformers", largest, largest, major=major)
        assert not takes("xformers", largest + 8, largest + 8, major=major)
        assert not takes("xformers", 192, 128, major=major)
        assert "float32" in needs("xformers").dtypes_missing[major]


def test_torchao_is_forward_only_and_hopper_alone() -> None:
    assert "major == 9" in read("torchao", "torchao/prototype/attention/utils.py")
    assert "backward is not supported" in read("torchao", "torchao/prototype/attention/__init__.py")
    assert needs("fp8").capabilities == {(9, 0)}
    assert needs("fp8").backward == frozenset()


@pytest.mark.parametrize("entry", ["fwd", "bwd", "varlen_fwd", "varlen_bwd"])
def test_flash_attn_on_rdna_passes_no_window_and_no_soft_cap_on(entry: str) -> None:
    found = function(read("flash_attn", "flash_attn/flash_attn_triton_amd/interface_fa.py"), entry)
    # All that reads them prints them.
    printed = {
        id(name)
        for call in ast.walk(found)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "print"
        for name in ast.walk(call)
    }
    ignored = {"window_size_left", "window_size_right", "softcap"}
    assert ignored <= {argument.arg for argument in found.args.args}
    used = {n.id for n in ast.walk(found) if isinstance(n, ast.Name) and id(n) not in printed}
    assert not used & ignored
    assert needs("flash_attention_2").features_missing["gfx1100"] >= {"window", "softcap"}


def test_flash_attn_on_rdna_draws_dropout_from_one_seed() -> None:
    source = read("flash_attn", "flash_attn/flash_attn_triton_amd/utils.py")
    assert "self.philox_seed, self.philox_offset = 0x1BF58, 0x1D4B49" in source
    assert "dropout" in needs("flash_attention_2").features_missing["gfx1100"]


def test_flash_attn_knows_the_variable_and_the_architectures_of_its_variants() -> None:
    backend = find_backend("flash_attention_2")
    assert backend is not None
    interface = read("flash_attn", "flash_attn/flash_attn_interface.py")
    assert 'os.getenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "FALSE") == "TRUE"' in interface
    utils = read("flash_attn", "flash_attn/flash_attn_triton_amd/utils.py")
    is_rdna = set(
        re.findall(r'"(gfx\w+)"', ast.unparse(function(utils, "is_rdna")).replace("'", '"'))
    )
    on_triton = {arch for arch, variant in backend.variants.items() if variant.name == "Triton"}
    assert is_rdna == on_triton
    allowed = re.search(r"allowed_archs = \[(.*?)\]", read("flash_attn", "setup.py"))
    assert allowed
    assert set(re.findall(r"gfx\w+", allowed[1])) == set(backend.variants) - on_triton


RECIPES = read_recipes(Path(__file__).resolve().parents[2])
# Kernel of PyPI -> its metadata in what was downloaded: an sdist's are named PKG-INFO.
METADATA = {
    "flash-attn": ("flash_attn", "PKG-INFO"),
    "flash-attn-4": ("flash_attn_4", "flash_attn_4-4.0.0b36.dist-info/METADATA"),
    "torchao": ("torchao", "torchao-0.18.0.dist-info/METADATA"),
    "xformers": ("xformers", "xformers-0.0.35.dist-info/METADATA"),
}


@pytest.mark.parametrize("name", METADATA)
def test_the_solver_knows_every_version_that_a_kernel_asks_for(name: str) -> None:
    """A bound in its metadata is met by each image that has it, and is a pair or in its recipe."""
    kernel = RECIPES.kernels[name]
    lines = read(*METADATA[name]).splitlines()
    asked = [Requirement(line[15:]) for line in lines if line.startswith("Requires-Dist: ")]
    bounds = {one.name: one.specifier for one in asked if "extra" not in str(one.marker or "")}
    known = {(pair.package, pair.needs): pair.bound for pair in RECIPES.pairs}
    own = {Requirement(text).name for text in kernel.requires}
    for package, bound in bounds.items():
        if package == "torch":
            for release in (
                torch for torch in RECIPES.torch if torch in SpecifierSet(kernel.torch)
            ):
                assert release in bound
        elif str(bound):
            assert SpecifierSet(known[name, package]) == bound, package
        else:
            assert package in own | {"numpy", "typing_extensions"}, "what every image has"


def test_the_pinned_kernels_library_is_one_that_the_pinned_transformers_takes() -> None:
    (pair,) = (pair for pair in RECIPES.pairs if pair.package == "kernels")
    assert RECIPES.stack["kernels"] in SpecifierSet(pair.versions)
    assert RECIPES.stack["transformers"] in SpecifierSet(pair.bound)


def test_xformers_names_the_flash_attn_that_its_recipe_names() -> None:
    source = read("xformers", "xformers/ops/fmha/flash.py")
    least, most = re.findall(r'FLASH_VER_(?:MIN|LAST) = parse_version\("([\d.]+)"\)', source)
    bound = SpecifierSet(f">={least},<={most}")
    assert SpecifierSet(RECIPES.kernels["xformers"].beside["flash-attn"]) == bound
