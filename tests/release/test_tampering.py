"""An image is accepted if it is whole and signed, and refused for each way to change it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import LocalRegistry, MakeSmall, Small, blob_path, make_signer, publish

from attnimg.errors import AttnimgError
from recipes.release import signing, transfer
from recipes.release.checking import run_clean, verify_statements
from recipes.release.repository import Repository
from recipes.release.signing import KINDS, Signing


@contextmanager
def refused(*codes: str, match: str | None = None) -> Iterator[None]:
    """Check that the block raises an error with one of these codes, and says what to do."""
    with pytest.raises(AttnimgError, match=match) as caught:
        yield
    assert caught.value.code in codes
    assert caught.value.do


def verify(digest: str, repository: Repository, signer: Signing) -> None:
    verify_statements(digest, repository, signer, name="cpu")


@pytest.fixture(scope="module")
def released(make_small: MakeSmall, registry: LocalRegistry, signer: Signing) -> Small:
    """A small image with its signature and all statements. Tests leave them as they are."""
    small = make_small("released")
    publish(small, registry.repository, signer)
    return small


def test_a_whole_signed_image_is_accepted_also_when_it_is_signed_again(
    released: Small, registry: LocalRegistry, signer: Signing
) -> None:
    signing.sign(released.digest, registry.repository, signer, notes={"rehearsal": "true"})
    verify_statements(
        released.digest, registry.repository, signer, name="cpu", expected=released.predicates
    )


def test_an_image_is_refused_as_another_image_of_the_recipes(
    released: Small, registry: LocalRegistry, signer: Signing
) -> None:
    with refused("not-verified", match="title: found 'attnimg:cpu', needed 'attnimg:hopper'"):
        verify_statements(released.digest, registry.repository, signer, name="hopper")


def test_an_unsigned_image_and_one_of_another_key_are_refused(
    make_small: MakeSmall, registry: LocalRegistry, signer: Signing, tmp_path: Path
) -> None:
    small, repository = make_small("unsigned"), registry.repository
    transfer.push(small.layout, small.digest, repository)
    with refused("not-verified", match="is not signed"):
        verify(small.digest, repository, signer)
    stranger = make_signer(repository, tmp_path)
    signing.sign(small.digest, repository, stranger, notes={})
    signing.verify_signature(small.digest, repository, stranger)
    with refused("not-verified", match="is not signed"):
        verify(small.digest, repository, signer)


def test_a_signed_image_without_statements_is_refused(
    make_small: MakeSmall, registry: LocalRegistry, signer: Signing
) -> None:
    small = make_small("signed only")
    transfer.push(small.layout, small.digest, registry.repository)
    signing.sign(small.digest, registry.repository, signer, notes={})
    with refused("not-verified", match="has no valid cyclonedx statement"):
        verify(small.digest, registry.repository, signer)


@pytest.fixture(scope="module")
def bare(make_small: MakeSmall, registry: LocalRegistry) -> Small:
    """A small image that is pushed and no more."""
    small = make_small("bare")
    transfer.push(small.layout, small.digest, registry.repository)
    return small


@pytest.mark.parametrize("kind", KINDS)
def test_a_statement_that_is_missing_or_of_another_key_is_refused(
    kind: str, bare: Small, registry: LocalRegistry, signer: Signing, tmp_path: Path
) -> None:
    repository = registry.repository
    with refused("not-verified", match=f"has no valid {kind} statement"):
        signing.verify_statement(kind, bare.digest, repository, signer)
    signing.attest(
        kind, bare.predicates[kind], bare.digest, repository, make_signer(repository, tmp_path)
    )
    with refused("not-verified", match=f"has no valid {kind} statement"):
        signing.verify_statement(kind, bare.digest, repository, signer)
    signing.attest(kind, bare.predicates[kind], bare.digest, repository, signer)
    said = json.loads(bare.predicates[kind].read_text())
    assert signing.verify_statement(kind, bare.digest, repository, signer) == said


def test_a_signature_and_statements_of_another_image_are_refused(
    released: Small, make_small: MakeSmall, registry: LocalRegistry, signer: Signing
) -> None:
    small, repository = make_small("with another's"), registry.repository
    transfer.push(small.layout, small.digest, repository)
    for suffix in ("sig", "att"):
        theirs, ours = (f"{one.digest.replace(':', '-')}.{suffix}" for one in (released, small))
        digest = transfer.find_tag(theirs, repository)
        assert digest is not None
        transfer.tag(digest, ours, repository)
    with refused("not-verified", match="is not signed"):
        signing.verify_signature(small.digest, repository, signer)
    with refused("not-verified", match="has no valid provenance statement"):
        signing.verify_statement("provenance", small.digest, repository, signer)


def test_a_tag_that_was_moved_to_another_image_is_refused(
    released: Small, bare: Small, registry: LocalRegistry, signer: Signing
) -> None:
    repository = registry.repository
    transfer.tag(released.digest, "moved", repository)
    transfer.tag(bare.digest, "moved", repository)
    found = transfer.find_tag("moved", repository)
    assert found == bare.digest
    with refused("not-verified", match="is not signed"):
        verify(found, repository, signer)
    # Who has the digest is not affected.
    verify(released.digest, repository, signer)


def test_bytes_that_were_changed_in_the_registry_are_refused(
    make_small: MakeSmall, registry: LocalRegistry, signer: Signing, tmp_path: Path
) -> None:
    small, repository = make_small("changed later"), registry.repository
    publish(small, repository, signer)
    found = verify_statements(small.digest, repository, signer, name="cpu")
    _, manifest, _ = transfer.layout_manifest(small.layout)

    @contextmanager
    def changed(digest: str, old: bytes, new: bytes) -> Iterator[None]:
        path = blob_path(registry, digest)
        whole = path.read_bytes()
        assert whole.replace(old, new) != whole
        path.write_bytes(whole.replace(old, new))
        yield
        path.write_bytes(whole)

    with (
        changed(small.digest, b'"layers"', b' "layers"'),
        refused("tampered", "program", "no-image"),
    ):
        verify(small.digest, repository, signer)
    with (
        changed(found.image_id, b'"attnimg:cpu"', b'"attnimg:evil"'),
        refused("tampered", "program"),
    ):
        verify(small.digest, repository, signer)
    layer = manifest["layers"][0]["digest"]
    other = transfer.layout_manifest(make_small("changed before").layout)[1]["layers"][0]["digest"]
    evil = (small.layout.parents[1] / "changed before/layout/blobs/sha256" / other[7:]).read_bytes()
    transfer.pull(small.digest, repository, tmp_path / "whole")
    whole = blob_path(registry, layer).read_bytes()
    with changed(layer, whole, evil):
        with refused("program", "registry"):
            transfer.pull(small.digest, repository, tmp_path / "changed")
        # The clean engine has not the whole one, as this machine's own might.
        with refused("program", "registry"):
            run_clean(replace(found, labels={}), repository, folder=tmp_path)
