"""Are the packages those of the image, and are the kernels whole and not hidden?"""

from __future__ import annotations

from collections.abc import Iterator

from attnimg.machine.host_facts import Check, Host
from attnimg.select.images import ImageFacts

_REBUILD = "build the child image again from a fresh attnimg image, and install without it"


def check_packages(host: Host, *, image: ImageFacts | None) -> Iterator[Check]:
    """Compare what is installed with the manifest, then look for kernels that hide one another."""
    if image is not None:
        yield from _against_manifest(host, image)
    yield from _trimmed(host)
    shadowing = [*_cute(host), *_damage(host), *_shadows(host)]
    yield from shadowing
    if not shadowing:
        yield Check(code="shadowing", status="ok", what="no kernel is hidden by another one")


def _against_manifest(host: Host, image: ImageFacts) -> Iterator[Check]:
    differ = {
        name: f"{name} {version} -> {host.installed.get(name, 'gone')}"
        for name, version in image.packages.items()
        if host.installed.get(name) != version
    }
    vital = [differ.pop(name) for name in ("torch", *image.kernels) if name in differ]
    if vital:
        what = f"not what attnimg:{image.name} was built and tested with: {', '.join(vital)}"
        yield Check(code="packages", status="fail", what=what, do=_REBUILD)
    if differ:
        yield Check(
            code="packages",
            status="warn",
            what=f"changed since attnimg:{image.name} was built: {', '.join(differ.values())}",
            do="attnimg selftest tells whether they still work together",
        )
    if not vital and not differ:
        what = f"all {len(image.packages)} packages are the image's"
        yield Check(code="packages", status="ok", what=what)


def _trimmed(host: Host) -> Iterator[Check]:
    """Find kernels of which only a part was compiled (`make wheels/NAME TRIM=1`)."""
    small = [f"{name} {text}" for name, text in host.installed.items() if text.endswith("+trim")]
    if small:
        yield Check(
            code="trimmed",
            status="warn",
            what=f"only a part of {_join(small)} was compiled: some precisions, head sizes and "
            "features are missing",
            do="build the image from whole wheels, without TRIM=1; a small one is not published",
        )


def _cute(host: Host) -> Iterator[Check]:
    """flash-attn's own sdist brings 20 files of an old FlashAttention-4 over the real ones."""
    if host.cute_owners and host.cute_owners != ("flash-attn-4",):
        yield Check(
            code="shadowing",
            status="fail",
            what=f"flash_attn/cute/, FlashAttention-4's, is claimed by {_join(host.cute_owners)}",
            do="install a flash-attn wheel without flash_attn/cute (attnimg's images have one), "
            "then: pip install --force-reinstall --no-deps flash-attn-4",
        )


def _damage(host: Host) -> Iterator[Check]:
    for name, files in host.damaged.items():
        shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        yield Check(
            code="damaged",
            status="fail",
            what=f"{name}: missing or not as installed: {shown}",
            do=f"pip install --force-reinstall --no-deps {name}, or a fresh image",
        )


def _shadows(host: Host) -> Iterator[Check]:
    for shadow in host.shadows:
        first, *hidden = shadow.folders
        yield Check(
            code="shadowing",
            status="fail",
            what=f"{shadow.package} in {first} hides the one in {_join(hidden)}",
            do=f"remove {first}/{shadow.package}, or take {first} off PYTHONPATH",
        )


def _join(names: tuple[str, ...] | list[str]) -> str:
    return " and ".join(names)
