"""Resolve libraries and symbols inside an image as glibc's loader would (ld.so(8)).

scope of a file = libraries that are loaded globally (Python's and some of torch's)
                + the file + the libraries that it needs, and those that they need
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass

from recipes.artifact.facts import Artifact, Elf, Symbol, visible_elves

# Libraries of a GPU driver, and a pattern of their functions; an image never has them.
# Source: CUDA 13.0, cuda.h and nvml.h (2026-11-25).
DRIVER = {"libcuda.so.1": r"cu[A-Z]", "libnvidia-ml.so.1": r"nvml[A-Z]"}
# Debian's /etc/ld.so.conf.d and the loader's own folders; {} is for the processor's triplet.
_SYSTEM = (
    "usr/local/lib/{}", "usr/local/lib", "lib/{}", "usr/lib/{}",
    "lib64", "usr/lib64", "lib", "usr/lib",
)  # fmt: skip
_PYTHON = re.compile(r"usr/(local/)?bin/python3\.\d+")
_TORCH = re.compile(r".*/torch/_C\.[\w.-]*so")
_GLOBAL = re.compile(r".*/torch/lib/libtorch_global_deps\.so")
_MAX_LINKS = 40  # as in the Linux kernel: more of them are a loop


@dataclass(frozen=True, slots=True)
class Processor:
    """The names of a platform's processor.

    Attributes:
        elf: that in the header of an ELF file.
        machine: that in the names of wheels, which uname prints.
        triplet: that of Debian's folders of libraries.
    """

    elf: str
    machine: str
    triplet: str


PROCESSORS = {
    "linux/amd64": Processor("EM_X86_64", "x86_64", "x86_64-linux-gnu"),
    "linux/arm64": Processor("EM_AARCH64", "aarch64", "aarch64-linux-gnu"),
}


class LoaderView:
    """The files of an artifact as the loader sees them.

    Args:
        elves: path -> shared library or program of the host.
        links: path -> target of that symbolic link.
        triplet: of the processor, in the names of system folders.
    """

    def __init__(self, elves: Mapping[str, Elf], links: Mapping[str, str], triplet: str) -> None:
        self.elves = elves
        self._system = tuple(folder.format(triplet) for folder in _SYSTEM)
        self._links = links
        self._defined_by: dict[str, set[str]] = {}
        for path, elf in elves.items():
            for name in elf.defines:
                self._defined_by.setdefault(name, set()).add(path)
        # Libraries that Python and torch load before an extension, soname -> path; and the paths
        # whose symbols every file sees.
        self._loaded: dict[str, str] = {}
        self._global: set[str] = set()
        self._scopes: dict[str, frozenset[str]] = {}
        self._found: dict[tuple[str, str], str | None] = {}

    def load(self, path: str, *, global_symbols: bool) -> None:
        """Load a file before all others; its symbols are for all, or for those that need it."""
        scope = self.scope(path)
        for place in sorted(scope & set(self.elves)):
            self._loaded.setdefault(self.elves[place].soname, place)
        if global_symbols:
            self._global |= scope
        # Earlier lookups may have another result now.
        self._scopes.clear()
        self._found.clear()

    def resolve_links(self, path: str) -> str:
        """Follow symbolic links in a path."""
        for _ in range(_MAX_LINKS):
            parts = path.split("/")
            for count in range(1, len(parts) + 1):
                head = "/".join(parts[:count])
                if head in self._links:
                    target = posixpath.join("/", posixpath.dirname(head), self._links[head])
                    path = posixpath.normpath(posixpath.join(target, *parts[count:])).lstrip("/")
                    break
            else:
                return path
        return path

    def find(self, path: str, soname: str) -> str | None:
        """Return the path of a library that a file needs; None if it is not found."""
        key = (path, soname)
        if key not in self._found:
            self._found[key] = self._search(path, soname)
        return self._found[key]

    def _search(self, path: str, soname: str) -> str | None:
        origin = posixpath.dirname(path)
        search = [text.replace("${ORIGIN}", "$ORIGIN") for text in self.elves[path].search]
        own = [folder.replace("$ORIGIN", f"/{origin}") for folder in search]
        for folder in own:
            place = self.resolve_links(posixpath.normpath(f"{folder}/{soname}").lstrip("/"))
            if place in self.elves:
                return place
        if soname in self._loaded and "site-packages" in path:
            return self._loaded[soname]
        for folder in self._system:
            place = self.resolve_links(f"{folder}/{soname}")
            if place in self.elves:
                return place
        return None

    def scope(self, path: str) -> frozenset[str]:
        """Return the paths where a file's symbols are searched, and names of missing libraries."""
        if path not in self._scopes:
            seen, queue = {path}, [path]
            while queue:
                here = queue.pop()
                for soname in self.elves[here].needed:
                    place = self.find(here, soname)
                    if place is None:
                        seen.add(soname)
                    elif place not in seen:
                        seen.add(place)
                        queue.append(place)
            self._scopes[path] = frozenset(seen | self._global)
        return self._scopes[path]

    def users(self, path: str) -> list[str]:
        """Return the files that are loaded together with one, because they need it."""
        return [other for other in self.elves if other != path and path in self.scope(other)]

    def is_defined(self, symbol: Symbol, scope: frozenset[str]) -> bool:
        """Return whether a symbol is defined in a scope, in its version if it has one."""
        paths = self._defined_by.get(symbol.name, set())
        if not symbol.version:
            return not paths.isdisjoint(scope)
        if not self._defined_by.get(str(symbol), set()).isdisjoint(scope):
            return True
        # A library without versions satisfies any.
        return any(p in scope and not self.elves[p].versions_defined for p in paths)


def loader_view(artifact: Artifact, platform: str) -> LoaderView:
    """Return the loader's view of an artifact after Python has run `import torch`.

    The loader skips files for another processor than the platform's.
    """
    processor = PROCESSORS[platform]
    files = [file for file in (*artifact.below, *artifact.files) if file.visible]
    elves = {file.path: elf for file, elf in visible_elves(files) if elf.machine == processor.elf}
    links = {file.path: file.target for file in files if file.kind == "link"}
    links |= {file.path: f"/{file.target}" for file in files if file.kind == "hardlink"}
    view = LoaderView(elves, links, processor.triplet)
    for first, global_symbols in ((_PYTHON, True), (_TORCH, False), (_GLOBAL, True)):
        for path in sorted(path for path in elves if first.fullmatch(path)):
            view.load(path, global_symbols=global_symbols)
    return view
