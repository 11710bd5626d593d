"""Judge whether this machine and this image will do for a run. Pure: all comes in as arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attnimg.facts import Machine
from attnimg.machine.doctor.gpu import check_gpu
from attnimg.machine.doctor.host import check_folders, check_shared_memory, check_user
from attnimg.machine.doctor.packages import check_packages
from attnimg.machine.doctor.shipped_kernels import check_shipped_kernels
from attnimg.machine.doctor.variants import check_variants
from attnimg.machine.host_facts import Check, Host
from attnimg.select.images import ImageFacts

__all__ = ["examine"]


def examine(
    machine: Machine,
    host: Host,
    *,
    image: ImageFacts | None,
    images: Mapping[str, ImageFacts],
) -> tuple[Check, ...]:
    """Run every check; none stops the others.

    Args:
        machine: its GPU and driver.
        host: its user, folders and packages.
        image: what this image was built as; None outside an image.
        images: every image there is, to name the right one.
    """
    return tuple(_checks(machine, host, image=image, images=images))


def _checks(
    machine: Machine,
    host: Host,
    *,
    image: ImageFacts | None,
    images: Mapping[str, ImageFacts],
) -> Iterator[Check]:
    if image is None:
        yield Check(code="image", status="ok", what="not in an attnimg image; judging the machine")
    else:
        yield Check(code="image", status="ok", what=f"attnimg:{image.name}")
    yield from check_gpu(machine, image=image, images=images)
    yield from check_packages(host, image=image)
    yield from check_shipped_kernels(machine, host)
    yield from check_variants(machine, host)
    yield from check_user(host)
    yield from check_folders(host)
    yield from check_shared_memory(host)
