"""The values of a recipe: images, kernel packages, releases, and the plan made of them.

All are frozen dataclasses of plain values. Versions are strings as upstream writes them, bounds are
version specifiers of PEP 440 (">=2.10"), architectures are compiler targets ("sm_90a", "gfx942").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Accelerator = Literal["cpu", "cuda", "rocm"]
Platform = Literal["linux/amd64", "linux/arm64"]
# In the order of plans and manifest lists. The files of the first have no suffix in their names.
PLATFORMS: tuple[Platform, ...] = ("linux/amd64", "linux/arm64")
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Form = Literal["sdist", "git", "wheel"]
Abi = Literal["torch", "stable", "python"]

# A date of TOML: neither a text nor a number of seconds.
_Day = Annotated[date, Field(strict=True)]


class Strict:
    """The base of values that are read from a file: an unknown key is refused."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Unresolved(Strict):
    """A value that is not known yet. Rendering accepts it, publishing refuses it."""

    reason: str

    def __str__(self) -> str:
        return "unresolved"


@dataclass(frozen=True, kw_only=True, slots=True)
class Code(Strict):
    """The build of a kernel for one architecture.

    Attributes:
        token: the build's name for the architecture; empty if the build takes none.
        code: the machine code that is compiled; empty for none.
    """

    token: str = ""
    code: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal(Strict):
    """A folder of a kernel's source that is deleted before the build.

    Attributes:
        path: its path in the source tree.
        reason: why, with a source.
    """

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """A file patches/KERNEL/[trim/]NAME.patch: a unified diff below the reason for it.

    Attributes:
        name: "cxx20.patch", or "trim/NAME.patch" for the small build only.
        reason: why it is needed, with a source.
        diff: the change.
    """

    name: str
    reason: str
    diff: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Trim(Strict):
    """A small build of a kernel, to test all steps on a small machine; never published.

    Attributes:
        summary: what it still supports.
        env: additional environment variables of its build.
    """

    summary: str
    env: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prebuilt(Strict):
    """A public wheel that is used instead of a build if it fits an image exactly.

    Attributes:
        source: name==version or a URL, as pip takes it.
        sha256: of the file.
        abi: in the format of ImagePlan.abi; empty for torch's stable ABI.
        codes: the machine code in it.
        reason: where it was found, and when.
        platform: of its host code.
    """

    source: str
    sha256: str
    codes: tuple[str, ...]
    reason: str
    abi: str = ""
    platform: Platform = "linux/amd64"


@dataclass(frozen=True, kw_only=True, slots=True)
class Need(Strict):
    """Another kernel that must be in the image.

    Attributes:
        reason: why, with a source.
        kernel: its name.
        beside: it is needed only if this kernel is in the image too; empty for always.
    """

    reason: str
    kernel: str
    beside: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSettings(Strict):
    """How a kernel is built on one kind of accelerator.

    Attributes:
        arch_variable: the environment variable for the tokens; empty for none.
        env: additional environment variables.
        job_memory_gb: the peak memory of one compiler, in GB.
    """

    arch_variable: str = ""
    env: Mapping[str, str]
    job_memory_gb: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Target(Strict):
    """A GPU whose kernels are compiled when an image is built.

    Attributes:
        code: the machine code, "sm_90a".
        multiprocessors: number of SMs of the GPU; the grids of some kernels depend on it.
    """

    code: str
    multiprocessors: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel(Strict):
    """A model that is widely trained, and the exact shape of its attention.

    Attributes:
        model: its name on the Hugging Face hub.
        heads, kv_heads, head_dim: as in its config.json; for MLA as in its attention call.
        head_dim_v: head size of v; None for head_dim.
        windows: the sliding windows of its layers, 0 for a layer without one.
        softcap: of the logits; 0 without one.
        sinks: whether each head has a learned sink.
        source: a key of AheadOfTime.sources.
    """

    model: str
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int | None = None
    windows: tuple[int, ...] = (0,)
    softcap: float = 0.0
    sinks: bool = False
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AheadOfTime(Strict):
    """Kernels that are compiled when an image is built, not at their first use.

    Attributes:
        dtypes: of q, k and v.
        varlen: whether rows are packed documents (cu_seqlens), or of equal length.
        gradient: whether forward and backward are compiled, or forward only.
        models: the models whose attention they compute.
        sources: name -> where models' shapes were read, and when.
        targets: architecture -> the GPU to compile for.
    """

    dtypes: tuple[Literal["bfloat16", "float16"], ...]
    varlen: tuple[bool, ...]
    gradient: tuple[bool, ...]
    models: tuple[TrainedModel, ...]
    sources: Mapping[str, str]
    targets: Mapping[str, Target]


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonSet(Strict):
    """The calls whose Triton kernels are compiled when an image is built.

    Attributes:
        calls: the module below docker/ that makes the calls.
        dtypes: of q, k and v.
        causal: whether attention is causal.
        varlen: whether rows are packed documents (cu_seqlens), or of equal length.
        heads: head_dim -> query heads/key-value heads, "32/8": both are constants in the kernels.
    """

    calls: str
    dtypes: tuple[Literal["bfloat16", "float16"], ...]
    causal: tuple[bool, ...]
    varlen: tuple[bool, ...]
    heads: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel(Strict):
    """One kernel package: kernels/NAME.toml, where NAME is its distribution.

    Attributes:
        source: name==version, or owner/name@commit.
        sha256: of the archive; None for a git commit, which is a hash itself.
        form: an sdist or a git tree is built, a wheel is installed.
        subdirectory: where in the tree the package is.
        paths: the parts of a git tree that its build reads, as git's pathspecs.
        submodules: path -> owner/name@commit, which git archives leave out; for a path below a
            submodule's root, only that folder is used.
        backends: the attnimg backends that use it.
        abi: what its machine code depends on: torch's minor release, its stable ABI, or nothing.
        cxx_standard: the C++ standard of the patched source; None if nothing is compiled.
        torch, python, nvcc: version bounds; an empty nvcc means that no compiler is needed.
        requires: pip requirements of its wheel besides torch.
        beside: kernel or package -> its versions that work together with this kernel.
        needs: kernels it needs in the same image.
        ships: paths below site-packages that its source installs.
        owns: those of them that no other package may install.
        platforms: those it can be built for; for a wheel, those whose wheel has its machine code.
        archs: architecture -> how it is built for it.
        build: accelerator -> how it is built there.
        remove: folders that are deleted first.
        patches: the files of patches/NAME, applied in order of their names.
        trim: the small build; None if the whole build is small.
        prebuilt: public wheels; the first that fits is used instead of a build.
        ahead_of_time: kernels that are compiled for an image besides its wheel; None for none.
        triton: calls whose Triton kernels are compiled for an image; None for none.
    """

    name: str
    version: str
    summary: str
    source: str
    form: Form
    backends: tuple[str, ...]
    abi: Abi
    torch: str
    python: str
    nvcc: str
    requires: tuple[str, ...]
    ships: tuple[str, ...]
    archs: Mapping[str, Code]
    build: Mapping[str, BuildSettings]
    sha256: str | Unresolved | None = None
    subdirectory: str = ""
    paths: tuple[str, ...] = (".",)
    submodules: Mapping[str, str] = field(default_factory=dict)
    cxx_standard: int | None = None
    beside: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    owns: tuple[str, ...] = ()
    platforms: tuple[Platform, ...] = PLATFORMS
    remove: tuple[Removal, ...] = ()
    patches: tuple[Patch, ...] = ()
    trim: Trim | None = None
    prebuilt: tuple[Prebuilt, ...] = ()
    ahead_of_time: AheadOfTime | None = None
    triton: TritonSet | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageKernel(Strict):
    """A kernel in an image, for its `archs` and on its `platforms`; empty: all of the image's."""

    name: str
    archs: tuple[str, ...] = ()
    platforms: tuple[Platform, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Image(Strict):
    """One image: images/NAME.toml, or its `frontier` variant.

    Attributes:
        aliases: additional tags.
        archs: the architectures it supports.
        platforms: those it is built for; the pages and the examples are about the first.
        base: the image it starts from, one of bases.toml; empty in a file for the first.
        python: of its base.
        size_max_mb: compressed with zstd -3, in 10**6 bytes.
        layers_max_mb: stage of the Dockerfile -> the same for the layers of that stage.
    """

    name: str
    summary: str
    archs: tuple[str, ...]
    accelerator: Accelerator
    torch: str | Unresolved
    kernels: tuple[ImageKernel, ...]
    platforms: tuple[Platform, ...]
    size_max_mb: int | Unresolved
    base: str = ""
    python: str = ""
    layers_max_mb: Mapping[str, int] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    channel: Literal["stable", "frontier"] = "stable"


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuBuild(Strict):
    """The CPU build of a torch release.

    Attributes:
        index: the package index that has it.
        wheels: file name -> the SHA-256 hashes that are accepted.
    """

    index: str
    wheels: Mapping[str, tuple[str, ...] | Unresolved]


@dataclass(frozen=True, kw_only=True, slots=True)
class RocmBuild(Strict):
    """The ROCm build of a torch release.

    Attributes:
        release: of ROCm, one of rocm.toml; torch's version ends with it: +rocm7.2.
        index: the package index that has it, and triton-rocm.
        triton: the version of triton-rocm that it requires.
        hashes: requirement -> the SHA-256 hashes that are accepted, "torch==2.14.1+rocm7.2".
    """

    release: str
    index: str
    triton: str
    hashes: Mapping[str, tuple[str, ...]] | Unresolved


@dataclass(frozen=True, kw_only=True, slots=True)
class Rocm(Strict):
    """One ROCm release: what compiles for it, and the oldest driver that it runs with.

    Attributes:
        apt: a line of apt's sources: address, suite, component.
        apt_key: the address of the key that signs it.
        apt_key_fingerprint: of that key.
        packages: those to install.
    """

    apt: str
    apt_key: str
    apt_key_fingerprint: Annotated[str, Field(pattern=r"^[0-9A-F]{40}$")]
    packages: tuple[str, ...]
    driver_min: str | Unresolved


@dataclass(frozen=True, kw_only=True, slots=True)
class Torch(Strict):
    """One torch release.

    Attributes:
        archs: platform -> the machine code of its CUDA build, where that was read.
        cpu: its CPU build; None if no image of the accelerator cpu may have it.
        rocm: its ROCm build; None likewise.
        platforms: those of its CUDA build on PyPI.
    """

    toolkit: str
    cxx_standard: int
    triton: str
    python: str
    archs: Mapping[Platform, tuple[str, ...]] = field(default_factory=dict)
    cpu: CpuBuild | None = None
    rocm: RocmBuild | None = None
    platforms: tuple[Platform, ...] = ("linux/amd64",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolkit(Strict):
    """One CUDA release: the oldest driver it runs with, its compiler, the compiler's targets."""

    driver_min: str
    nvcc: str
    archs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionPair(Strict):
    """Versions that work together: if `package` is in `versions`, `needs` must be in `bound`."""

    package: str
    versions: str
    needs: str
    bound: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Base(Strict):
    """A base image (bases.toml).

    Attributes:
        name: its short name.
        reference: its registry, name and tag.
        digest: of the index, or the manifest, that the tag named when `make lock` ran.
        platforms: platform -> digest of its image; empty if `digest` is unresolved.
        python: its Python.
        debian: its release of Debian.
        glibc, glibcxx: newest versions of the symbols of its C and C++ libraries.
        python_fixes_until, debian_fixes_until: the last day of security fixes.
        open: what is missing for images on this base; empty if they can be built.
    """

    name: str
    reference: str
    digest: str | Unresolved
    platforms: Mapping[str, str]
    python: str
    debian: str
    glibc: str
    glibcxx: str
    python_fixes_until: _Day
    debian_fixes_until: _Day
    open: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowance(Strict):
    """A finding of a gate that is accepted: an entry of allowed.toml.

    Attributes:
        gate: the gate's name.
        file: a glob pattern of paths; * also matches /.
        found: a part of the finding's text; empty for any.
        reason: why, with a source.
    """

    gate: str
    file: str
    reason: str
    found: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cve(Strict):
    """The answer to a known vulnerability of a package: an entry of cves.toml.

    Attributes:
        id: CVE-..., GHSA-... or PYSEC-...
        package: a Python package of an image, or deb:NAME.
        version: the version that was read; the answer is for no other.
        status, justification: those of OpenVEX.
        reason: what was read, with a source.
        expires: the last day on which it counts.
    """

    id: str
    package: str
    version: str
    status: Literal["not_affected", "affected", "fixed", "under_investigation"]
    reason: str
    expires: _Day
    justification: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipes:
    """All recipes of a checkout.

    Attributes:
        images: by name, frontier variants as NAME-frontier.
        kernels: by name.
        torch: by version, oldest first.
        cuda: by release.
        stack: pinned packages that every image has, name -> version (pyproject.toml).
        pairs: which versions of these work together.
        bases: by name.
        allowed: findings of gates that are accepted.
        cves: answers to known vulnerabilities.
        rocm: by release.
    """

    images: Mapping[str, Image]
    kernels: Mapping[str, Kernel]
    torch: Mapping[str, Torch]
    cuda: Mapping[str, Toolkit]
    stack: Mapping[str, str]
    pairs: tuple[VersionPair, ...]
    bases: Mapping[str, Base] = field(default_factory=dict)
    allowed: tuple[Allowance, ...] = ()
    cves: tuple[Cve, ...] = ()
    rocm: Mapping[str, Rocm] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One kernel of a plan.

    Attributes:
        archs: the image's architectures that it is built for.
        tokens: the build's names for them.
        codes: the machine code that must be in it, and no other.
        build: how it is built on the image's accelerator.
        prebuilt: the public wheel that is used instead of a build; None if it is built.
        key: the wheel's name in a cache; it changes with the recipe and the architectures.
    """

    kernel: Kernel
    archs: tuple[str, ...]
    tokens: tuple[str, ...]
    codes: tuple[str, ...]
    build: BuildSettings
    key: str
    prebuilt: Prebuilt | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePlan:
    """An image that can be built on one platform, with its kernels in order of installation.

    Attributes:
        platform: what it is for.
        name: of the image's files for this platform: "hopper", "hopper-arm64".
        others: the plans for the image's other platforms; empty in those.
        unresolved: field -> reason; empty if the image may be published.
        abi: what a compiled extension must match, "cp311-torch2.14-cu130", on arm64 with "-arm64".
        lock: names the lock files of its torch and stack layers, "2.14.1-cu130", likewise.
        base: its base image.
        cpu_torch: the CPU build of its torch for this platform; None on other accelerators.
        toolkit: the CUDA or ROCm release of its torch; None on cpu.
        driver_min: the oldest GPU driver that this release runs with; None on cpu.
        nvcc: the version of CUDA's compiler; empty where none is needed.
        rocm_torch, rocm: the ROCm build of its torch, and its ROCm release; None elsewhere.
    """

    image: Image
    steps: tuple[Step, ...]
    unresolved: Mapping[str, str]
    abi: str
    lock: str
    base: Base
    cpu_torch: CpuBuild | None
    toolkit: str | Unresolved | None
    driver_min: str | Unresolved | None
    nvcc: str
    platform: Platform
    name: str
    others: tuple[ImagePlan, ...] = ()
    rocm_torch: RocmBuild | None = None
    rocm: Rocm | None = None


def on_all_platforms(plans: Iterable[ImagePlan]) -> Iterator[ImagePlan]:
    """Yield each plan, then those for the other platforms of its image."""
    for plan in plans:
        yield plan
        yield from plan.others


def steps_and_platforms(plan: ImagePlan) -> dict[str, tuple[Step, tuple[Platform, ...]]]:
    """Return the kernels of an image on any platform: name -> step, and the platforms it is on."""
    found: dict[str, tuple[Step, tuple[Platform, ...]]] = {}
    for one in on_all_platforms([plan]):
        for step in one.steps:
            first, platforms = found.get(step.kernel.name, (step, ()))
            found[step.kernel.name] = first, (*platforms, one.platform)
    return found


def platform_suffix(platform: Platform) -> str:
    """Return the suffix of the names of a platform's files: "" or "-arm64"."""
    return "" if platform == PLATFORMS[0] else f"-{platform.rpartition('/')[2]}"
