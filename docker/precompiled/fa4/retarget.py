"""Write cache entries that run on every x86-64: the launcher is compiled again for its baseline.

CuTe DSL compiles an entry's host part for the CPU that it runs on: built here, all of them had AVX
and some AVX-512, and nothing in a cache's key tells (flash-attn-4 4.0.0b36, 2026-11-21). On a CPU
without those, the first attention call would die of an illegal instruction. So each entry is
exported as LLVM bitcode, and that is compiled for plain x86-64; the GPU's code inside stays as it
is. llvmlite is needed where entries are made, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm


def object_code(bitcode: bytes) -> bytes:
    """Compile LLVM bitcode to an object file for any x86-64 Linux.

    Entries are loaded anywhere in the address space: hence position independent code, and the
    large code model that the DSL itself uses.
    """
    target = llvm.Target.from_triple("x86_64-unknown-linux-gnu")
    machine = target.create_target_machine(
        cpu="x86-64", features="", opt=3, reloc="pic", codemodel="large"
    )
    compiled: bytes = machine.emit_object(llvm.parse_bitcode(bitcode))
    return compiled


def retarget_exports() -> None:
    """From here on, every kernel that this process exports as .o is for any x86-64."""
    from cutlass.cutlass_dsl import tvm_ffi_provider as provider

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    base = provider.TVMFFIJitCompiledFunctionBase
    for kind in (base, *base.__subclasses__()):
        if "export_to_c" in vars(kind):
            kind.export_to_c = _retargeted(kind.export_to_c)


def _retargeted(export: Callable[..., Any]) -> Callable[..., None]:
    def export_to_c(
        kernel: Any, object_file_path: str, function_name: str | None = None, **rest: Any
    ) -> None:
        path = Path(object_file_path)
        bitcode = path.with_suffix(".bc")  # the DSL goes by the suffix
        export(kernel, str(bitcode), function_name, **rest)
        path.write_bytes(object_code(bitcode.read_bytes()))
        bitcode.unlink()

    return export_to_c
