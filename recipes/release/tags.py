"""Choose the tags of an image: those that move to each new release, and one that never moves."""

from __future__ import annotations

import re
from collections.abc import Mapping

from attnimg.errors import AttnimgError
from recipes.facts import ImagePlan

# Of OCI's distribution-spec.
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_COMMIT_DIGITS = 12


def moving_tags(plan: ImagePlan) -> tuple[str, ...]:
    """Return the tags that always name the newest release: `ampere` and its alias `ada`."""
    return (plan.image.name, *plan.image.aliases)


def immutable_tag(plan: ImagePlan, *, version: str, revision: str) -> str:
    """Return the tag of one release: hopper-0.2.0-torch2.14.1-cu130-0123456789ab.

    Args:
        plan: of the image.
        version: of attnimg.
        revision: the commit that it was built from; "-dirty" at its end is kept.

    Raises:
        AttnimgError: they make no tag (code "bad-tag").
    """
    commit, _, state = revision.partition("-")
    parts = [plan.image.name, version, f"torch{plan.lock}", commit[:_COMMIT_DIGITS], state]
    # A local version has a plus sign, which no tag may have.
    tag = "-".join(part for part in parts if part).replace("+", "_")
    if not TAG.fullmatch(tag):
        raise AttnimgError(
            f"the image {plan.image.name} can't get a tag for its release",
            why=f"found {tag!r}, needed at most 128 letters, digits, dots, dashes and _",
            do="correct the version in pyproject.toml, then make release/" + plan.image.name,
            code="bad-tag",
        )
    return tag


def refuse_changed(tag: str, *, found: str | None, digest: str) -> None:
    """Check that an immutable tag is free, or names this image already.

    Args:
        tag: the immutable tag.
        found: the digest that the registry has for it; None if it has none.
        digest: of the image that is promoted.

    Raises:
        AttnimgError: it names another image (code "tag-taken").
    """
    if found not in (None, digest):
        raise AttnimgError(
            f"the tag {tag} is taken",
            why=f"found {found} under it, needed {digest} or nothing: others may have pinned it. "
            "With another platform, a manifest list has another digest",
            do="release another commit, or another version of pyproject.toml; never move this tag",
            code="tag-taken",
            exit_code=1,
        )


def refuse_shared(plans: Mapping[str, ImagePlan]) -> None:
    """Check that no moving tag belongs to two images.

    Raises:
        AttnimgError: one does (code "tag-twice").
    """
    owners: dict[str, list[str]] = {}
    for name, plan in plans.items():
        for tag in moving_tags(plan):
            owners.setdefault(tag, []).append(name)
    if twice := [f"{tag}: {', '.join(names)}" for tag, names in owners.items() if len(names) > 1]:
        raise AttnimgError(
            "two images have the same tag",
            why="\n".join(twice),
            do="correct `aliases` in the files of these images in recipes/images/",
            code="tag-twice",
        )
