"""Read from an ELF file what the loader and a GPU use: names, symbols, machine code."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerDefSection, GNUVerNeedSection

from recipes.artifact.facts import Elf, Symbol
from recipes.artifact.fatbin import (
    CUDA_MACHINE,
    bundle_codes,
    cubin_code,
    embedded_codes,
    fatbin_codes,
)

MAGIC = b"\x7fELF"
_AMDGPU = 224
_FATBINS = (".nv_fatbin", "__nv_relfatbin")
_BUNDLES = (".hip_fatbin", "__CLANG_OFFLOAD_BUNDLE__")
_ALLOCATED, _EXECUTABLE = 0x2, 0x4
# EF_AMDGPU_MACH. Source: https://llvm.org/docs/AMDGPUUsage.html, its table (2026-11-25).
_GFX = {
    0x2F: "gfx906", 0x30: "gfx908", 0x36: "gfx1030", 0x3F: "gfx90a", 0x41: "gfx1100",
    0x46: "gfx1101", 0x47: "gfx1102", 0x48: "gfx1200", 0x4C: "gfx942", 0x4E: "gfx1201",
    0x4F: "gfx950",
}  # fmt: skip
# A symbol table's entry: name, info, other, section, value, size.
_SYMBOL = struct.Struct("<IBBHQQ")
_WEAK, _LOCAL = 2, 0
_HIDDEN = (1, 2)


def read_elf(stream: BinaryIO) -> Elf:
    """Read one file; its `faults` list the parts that can't be read."""
    faults: list[str] = []
    try:
        file = ELFFile(stream)
        machine = _machine(file)
        section_codes, embedded = _codes(file, stream, faults)
        elf = Elf(
            machine=machine,
            codes=section_codes | embedded,
            section_codes=section_codes,
            faults=tuple(faults),
        )
        dynamic = file.get_section_by_name(".dynamic")
        if not isinstance(dynamic, DynamicSection):
            return elf
        tags = [(tag.entry.d_tag, tag) for tag in dynamic.iter_tags()]
        defines, undefined = _symbols(file)
        return replace(
            elf,
            soname=next((tag.soname for name, tag in tags if name == "DT_SONAME"), ""),
            needed=tuple(tag.needed for name, tag in tags if name == "DT_NEEDED"),
            search=tuple(_search_folders(tags)),
            defines=defines,
            undefined=undefined,
            versions_defined=frozenset(_versions_defined(file).values()),
            versions_needed=_versions_needed(file),
        )
    except (ELFError, ValueError, struct.error, UnicodeDecodeError, KeyError) as error:
        return Elf(machine="unknown", faults=(*faults, f"{type(error).__name__}: {error}"))


def _machine(file: ELFFile) -> str:
    number_or_name: object = file["e_machine"]
    named: dict[object, str] = {CUDA_MACHINE: "EM_CUDA", _AMDGPU: "EM_AMDGPU"}
    return named.get(number_or_name, str(number_or_name))


def _codes(
    file: ELFFile, stream: BinaryIO, faults: list[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the GPU code of a file: in the sections for GPU code, and in other data."""
    machine = _machine(file)
    if machine == "EM_CUDA":
        stream.seek(0)
        code = cubin_code(file["e_flags"], file["e_ident"]["EI_ABIVERSION"], stream.read())
        return frozenset({code}), frozenset()
    if machine == "EM_AMDGPU":
        mach = file["e_flags"] & 0xFF
        return frozenset({_GFX.get(mach, f"gfx-mach-{mach:#x}")}), frozenset()
    section_codes: set[str] = set()
    embedded: set[str] = set()
    for section in file.iter_sections():
        place, size = section["sh_offset"], section["sh_size"]
        if section["sh_type"] != "SHT_PROGBITS" or not size:
            continue
        try:
            if section.name in _FATBINS:
                section_codes |= fatbin_codes(stream, start=place, size=size)
            elif section.name in _BUNDLES:
                section_codes |= bundle_codes(stream, start=place, size=size)
            elif section["sh_flags"] & _ALLOCATED and not section["sh_flags"] & _EXECUTABLE:
                embedded |= embedded_codes(stream, start=place, size=size)
        except (ValueError, struct.error) as error:
            faults.append(f"{section.name}: {error}")
    return frozenset(section_codes), frozenset(embedded)


def _search_folders(tags: list[tuple[str, Any]]) -> Iterator[str]:
    """Yield the folders of DT_RUNPATH, or of DT_RPATH where there is none, as the loader does."""
    names = {name for name, _ in tags}
    wanted = "DT_RUNPATH" if "DT_RUNPATH" in names else "DT_RPATH"
    for name, tag in tags:
        if name == wanted:
            text = tag.runpath if wanted == "DT_RUNPATH" else tag.rpath
            yield from (folder for folder in text.split(":") if folder)


def _symbols(file: ELFFile) -> tuple[frozenset[str], tuple[Symbol, ...]]:
    """Return the dynamic symbols: those it defines, and those it needs.

    The table is unpacked at once: pyelftools parses single symbols, which takes minutes per image.
    """
    table = file.get_section_by_name(".dynsym")
    if table is None:
        raise ValueError("it has a .dynamic section but no .dynsym")
    names = file.get_section(table["sh_link"]).data()
    versions = _symbol_versions(file)
    defines: set[str] = set()
    undefined: list[Symbol] = []
    for place, (name_at, info, other, section, _, _) in enumerate(
        _SYMBOL.iter_unpack(table.data())
    ):
        bind = info >> 4
        if not name_at or bind == _LOCAL:
            continue
        name = names[name_at : names.index(b"\0", name_at)].decode("utf-8", "replace")
        version = versions.get(place, "")
        if section == 0:
            if bind != _WEAK:
                undefined.append(Symbol(name=name, version=version))
        elif other & 3 not in _HIDDEN:
            defines.add(name)
            if version:
                defines.add(f"{name}@{version}")
    return frozenset(defines), tuple(undefined)


def _symbol_versions(file: ELFFile) -> dict[int, str]:
    """Return a symbol's index -> the name of its version, for symbols that have one."""
    section = file.get_section_by_name(".gnu.version")
    if section is None:
        return {}
    names = _versions_defined(file)
    needs = file.get_section_by_name(".gnu.version_r")
    if isinstance(needs, GNUVerNeedSection):
        for _, versions in needs.iter_versions():
            names |= {version["vna_other"]: version.name for version in versions}
    data = section.data()
    indexes = struct.unpack(f"<{len(data) // 2}H", data)
    return {
        place: names[index & 0x7FFF]
        for place, index in enumerate(indexes)
        if index & 0x7FFF in names
    }


def _versions_defined(file: ELFFile) -> dict[int, str]:
    """Return index -> name of each version that a file defines, without the file's own."""
    section = file.get_section_by_name(".gnu.version_d")
    if not isinstance(section, GNUVerDefSection):
        return {}
    found = {}
    for version, names in section.iter_versions():
        if not version["vd_flags"] & 1:
            found[version["vd_ndx"]] = next(iter(names)).name
    return found


def _versions_needed(file: ELFFile) -> dict[str, tuple[str, ...]]:
    section = file.get_section_by_name(".gnu.version_r")
    if not isinstance(section, GNUVerNeedSection):
        return {}
    # The loader only warns of a missing weak version (flag 2).
    return {
        need.name: tuple(v.name for v in versions if not v["vna_flags"] & 2)
        for need, versions in section.iter_versions()
    }
