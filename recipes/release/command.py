"""The commands of a release, with what they print at their end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from attnimg.errors import AttnimgError
from recipes.facts import ImagePlan, Recipes
from recipes.release import page as release_page
from recipes.release import steps, transfer
from recipes.release.checking import check_released
from recipes.release.programs import report, run
from recipes.release.publishable import (
    ALL_TESTS,
    OCI,
    refuse_fewer_tests,
    refuse_other_rehearsal,
)
from recipes.release.record import FOLDER, Record, record_path
from recipes.release.repository import Repository, find_repository, parse_repository, read_registry
from recipes.release.signing import choose_signing
from recipes.release.steps import Release
from recipes.release.tags import TAG
from recipes.solve.plan import refuse_unresolved

_STEPS: Mapping[str, Callable[[Release], Record]] = {
    "push": steps.push,
    "test": steps.test,
    "attest": steps.attest,
    "verify": steps.verify,
    "promote": steps.promote,
}


def release(
    plan: ImagePlan, recipes: Recipes, *, step: str | None, root: Path, env: Mapping[str, str]
) -> str:
    """Run a release or one step of it; return what happened.

    Args:
        plan: of the image.
        recipes: of the plan.
        step: the one to run; None for all.
        root: the checkout.
        env: REGISTRY, REHEARSAL and TESTS are its settings.

    Raises:
        AttnimgError: as the steps.
    """
    job = Release(
        plan=plan,
        recipes=recipes,
        registry=read_registry(root),
        repository=find_repository(root, env),
        root=root,
        rehearsal=_is_rehearsal(env),
        tests=env.get("TESTS") or ALL_TESTS,
    )
    refuse_other_rehearsal(job.repository, rehearsal=job.rehearsal)
    if step in (None, "push", "test"):
        # Before hours of building.
        if not job.rehearsal:
            refuse_unresolved(plan)
        refuse_fewer_tests(job.tests, name=plan.image.name, rehearsal=job.rehearsal)
    if step is None:
        # Before hours of building, too.
        choose_signing(job.registry, job.repository, env=env, folder=root / FOLDER, sign=True)
    record = _STEPS[step](job) if step else steps.release(job)
    return _summary(record, step)


def _is_rehearsal(env: Mapping[str, str]) -> bool:
    value = env.get("REHEARSAL", "").strip()
    if value.lower() in ("", "0", "no", "false", "off"):
        return False
    if value.lower() not in ("1", "yes", "true", "on"):
        raise AttnimgError(
            "REHEARSAL can't be read",
            why=f"found {value!r}, needed 1 for a rehearsal, or 0 or nothing for a release",
            do="set REHEARSAL=1, or unset it",
            code="bad-setting",
        )
    return True


def find_digest(tag: str, repository: Repository) -> str:
    """Return the digest of the image that has a tag in the registry.

    Raises:
        AttnimgError: no image has it (code "no-image"), or the registry does not answer.
    """
    digest = transfer.find_tag(tag, repository)
    if digest is None:
        raise AttnimgError(
            f"there is no image {repository.name}:{tag}",
            why=f"the registry {repository.host} has no such tag",
            do=f"set TAG to one that {release_page.PAGE} lists, or DIGEST=sha256:...; or correct "
            "REGISTRY",
            code="no-image",
        )
    return digest


def verify(
    name: str, digest: str | None, *, tag: str = "", root: Path, env: Mapping[str, str]
) -> str:
    """Verify an image of the registry without a record; return what was verified.

    What the user gave is checked first, then the key, and then the registry is asked.

    Args:
        name: of the image.
        digest: of the image; None for the one that has the tag.
        tag: of the image.
        root: the checkout.
        env: REGISTRY, COSIGN_PUBLIC_KEY.

    Raises:
        AttnimgError: it is neither a digest nor a tag (code "bad-reference"), or as choose_signing,
            find_digest and check_released.
    """
    if digest is not None:
        refuse_no_digest(digest, name=name)
    elif not TAG.fullmatch(tag):
        raise AttnimgError(
            "the tag can't be read",
            why=f"found {tag!r}, needed at most 128 letters, digits, dots, dashes and _",
            do=f"correct TAG, for example TAG={name}, or set DIGEST=sha256:... instead",
            code="bad-reference",
        )
    repository = find_repository(root, env)
    signer = choose_signing(
        read_registry(root), repository, env=env, folder=root / FOLDER, sign=False
    )
    if digest is None:
        digest = find_digest(tag, repository)
    _, images = transfer.read_list(repository.at(digest), repository)
    lines = []
    for platform, one in images.items():
        if len(images) > 1 or one != digest:
            report(f"verify: {platform}")
        where = check_released(
            one, repository, signer, name=name, folder=root / FOLDER, platform=platform
        )
        lines.append(
            f"verify: {repository.at(one)} ({platform}) is signed ({signer.text}); "
            f"pulled into {where}"
        )
    return "\n".join(lines)


def refuse_no_digest(image: str, *, name: str) -> None:
    """Check that a text is the digest of an image.

    Args:
        image: the text.
        name: of the image that it should name, for the error.

    Raises:
        AttnimgError: it is something else (code "bad-reference").
    """
    if not transfer.DIGEST.fullmatch(image):
        raise AttnimgError(
            "the digest can't be read",
            why=f"found {image!r}, needed sha256: and 64 digits 0-9a-f",
            do=f"set DIGEST to one that {release_page.PAGE} lists; after a release of your own, "
            f"build/release/{name}.json has it",
            code="bad-reference",
        )


def pull(name: str, digest: str, *, root: Path, env: Mapping[str, str]) -> str:
    """Pull an image into the engine; return its reference.

    Raises:
        AttnimgError: the registry does not have it, or it is another image.
    """
    refuse_no_digest(digest, name=name)
    repository: Repository = find_repository(root, env)
    reference = repository.at(digest)
    report(f"pull: {reference}")
    run(["docker", "pull", "-q", reference], host=repository.host)
    label = f'{{{{index .Config.Labels "{OCI}.title"}}}}'
    title = run(["docker", "image", "inspect", "--format", label, reference], host="").strip()
    if title != f"attnimg:{name}":
        raise AttnimgError(
            f"{reference} is not the image {name}",
            why=f"found the title {title or 'none'}, needed attnimg:{name}",
            do=f"correct DIGEST; if the image is right, name it in the target, not {name}",
            code="other-image",
        )
    return reference


def _summary(record: Record, step: str | None) -> str:
    kind = "rehearsal" if record.rehearsal else "release"
    path = record_path(record.image, parse_repository(record.registry))
    lines = [
        f"{step or 'release'}: {record.reference}",
        f"  {kind} of attnimg:{record.image} {record.version}, {record.bytes / 1e6:.1f} MB pushed, "
        f"image ID {record.image_id[:19]}",
        f"  done: {', '.join(record.steps)}; record: {path}",
    ]
    if record.tags:
        lines.append(f"  tags: {', '.join(record.tags)}, for {', '.join(record.listed)}")
    lines += [f"  without {platform}: {why}" for platform, why in record.left_out.items()]
    return "\n".join(lines)
