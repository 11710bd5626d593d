"""Sign images and statements about them, and verify both, with cosign.

Published images are signed keyless, by the release workflow's identity; a key of one's own works
too. A rehearsal makes a key, and nothing of it goes to sigstore's public log.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from recipes.artifact import code_list
from recipes.release.programs import run
from recipes.release.repository import Registry, Repository

# Characters of the first line of a key's file.
_LINE = 100
# What is attested -> its name for cosign, and the predicate type of the statement.
KINDS = {
    "cyclonedx": ("cyclonedx", "https://cyclonedx.org/bom"),
    "spdx": ("spdxjson", "https://spdx.dev/Document"),
    "provenance": ("slsaprovenance1", "https://slsa.dev/provenance/v1"),
    "vex": ("openvex", "https://openvex.dev/ns"),
    "machine-code": (code_list.TYPE, code_list.TYPE),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Signing:
    """With what images are signed and verified.

    Attributes:
        key: of a private key, a file or what cosign takes as --key; empty for keyless.
        public: of its public key.
        identity, issuer: of a keyless signature.
        logged: whether signatures go to sigstore's public log, and must be there.
        env: variables for cosign.
    """

    key: str
    public: str
    identity: str
    issuer: str
    logged: bool
    env: Mapping[str, str]

    @property
    def text(self) -> str:
        """How it signs, for the record."""
        if not self.public:
            return f"keyless, {self.identity}"
        return f"key {self.public if _is_uri(self.public) else Path(self.public).name}"


def choose_signing(
    registry: Registry, repository: Repository, *, env: Mapping[str, str], folder: Path, sign: bool
) -> Signing:
    """Return with what to sign or verify.

    Args:
        registry: whose signer signs published images.
        repository: where the image is.
        env: COSIGN_KEY and COSIGN_PUBLIC_KEY name a key pair.
        folder: of the key pair of rehearsals, which is made if it is to sign and there is none.
        sign: whether it has to sign, and not to verify only.

    Raises:
        AttnimgError: there is nothing to sign or to verify with, a file of a key is missing (code
            "no-key"), or has no public key (code "bad-key").
    """
    key = env.get("COSIGN_KEY", "")
    public = env.get("COSIGN_PUBLIC_KEY", "")
    extra: dict[str, str] = {}
    if repository.loopback and not key and not public:
        key, public, extra = *_rehearsal_keys(folder, make=sign), {"COSIGN_PASSWORD": ""}
    elif key and not public:
        public = _public_of(key)
    if sign and not key and "ACTIONS_ID_TOKEN_REQUEST_URL" not in env:
        raise AttnimgError(
            "there is nothing to sign with",
            why="found neither COSIGN_KEY nor the identity of a workflow run",
            do="run the workflow release.yml, or set COSIGN_KEY=FILE (cosign generate-key-pair)",
            code="no-key",
        )
    for name, file in (("COSIGN_KEY", key if sign else ""), ("COSIGN_PUBLIC_KEY", public)):
        if file and not _is_uri(file) and not Path(file).is_file():
            raise _no_key(name, f"found no file {file}, needed that of the key")
    if public and not _is_uri(public):
        _refuse_other_key(Path(public))
    return Signing(
        key=key,
        public=public,
        identity=registry.identity,
        issuer=registry.signer.issuer,
        logged=not repository.loopback,
        env=extra,
    )


def _refuse_other_key(path: Path) -> None:
    """Check that a file has a public key, before any registry is asked."""
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            first = stream.readline(_LINE).strip()
        begins = f"it begins with {first!r}" if first else "it is empty"
        fault = "" if "PUBLIC KEY" in first else begins
    except OSError as error:
        fault = str(error.strerror)
    if fault:
        raise AttnimgError(
            f"{path} is not a public key",
            why=f"{fault}, needed -----BEGIN PUBLIC KEY-----",
            do="set COSIGN_PUBLIC_KEY to the public key of who signed the image, cosign.pub",
            code="bad-key",
        )


def _is_uri(key: str) -> bool:
    """Return whether cosign gets a key from somewhere else: awskms://, k8s://, env://..."""
    return "://" in key


def _public_of(key: str) -> str:
    """Return where cosign finds the public key of a private one."""
    if key.startswith("env://"):
        raise _no_key("COSIGN_PUBLIC_KEY", f"found only COSIGN_KEY={key}, which has no public key")
    # Keys of a KMS, a token or a secret of Kubernetes verify under the same name.
    return key if _is_uri(key) else str(Path(key).with_suffix(".pub"))


def _no_key(name: str, why: str) -> AttnimgError:
    return AttnimgError(
        f"{name} does not name a key",
        why=why,
        do=f"set {name} to the file (cosign public-key --key KEY writes a public one)",
        code="no-key",
    )


def sign(
    digest: str, repository: Repository, signing: Signing, *, notes: Mapping[str, str]
) -> None:
    """Sign an image of the registry; `notes` become annotations of the signature."""
    command = ["cosign", "sign", *_signing_options(signing)]
    command += [f"--annotations={key}={value}" for key, value in notes.items()]
    reference = repository.at(digest)
    run([*command, reference], host=repository.host, env=signing.env, writes=True)


def attest(
    kind: str, predicate: Path, digest: str, repository: Repository, signing: Signing
) -> None:
    """Attach a signed statement to an image, in place of an earlier one of its kind."""
    command = ["cosign", "attest", *_signing_options(signing), "--replace=true"]
    command += [f"--type={KINDS[kind][0]}", f"--predicate={predicate}", repository.at(digest)]
    run(command, host=repository.host, env=signing.env, writes=True)


def verify_signature(digest: str, repository: Repository, signing: Signing) -> None:
    """Verify the signature of an image.

    Raises:
        AttnimgError: it has none of this signer (code "not-verified").
    """
    _verify(
        ["verify"],
        digest,
        repository,
        signing,
        what=f"the image {repository.at(digest)} is not signed",
    )


def verify_statement(
    kind: str, digest: str, repository: Repository, signing: Signing
) -> dict[str, Any]:
    """Verify the statement of a kind about an image; return its predicate.

    Raises:
        AttnimgError: there is none of this signer about this image, or more than one
            (code "not-verified").
    """
    name, uri = KINDS[kind]
    what = f"the image {repository.at(digest)} has no valid {kind} statement"
    output = _verify(
        ["verify-attestation", f"--type={name}"], digest, repository, signing, what=what
    )
    found = [_statement(line) for line in output.splitlines() if line.startswith("{")]
    wanted = digest.removeprefix("sha256:")
    about = [
        statement
        for statement in found
        if statement["predicateType"] == uri
        and [subject["digest"].get("sha256") for subject in statement["subject"]] == [wanted]
    ]
    if len(about) != 1 or len(found) != 1:
        raise _not_verified(what, f"found {len(about)} about it among {len(found)}, needed one")
    predicate: dict[str, Any] = about[0]["predicate"]
    return predicate


def _signing_options(signing: Signing) -> list[str]:
    key = [f"--key={signing.key}"] if signing.key else []
    return ["--yes", *key, f"--tlog-upload={str(signing.logged).lower()}"]


def _verify(
    command: list[str], digest: str, repository: Repository, signing: Signing, *, what: str
) -> str:
    if signing.public:
        who = [f"--key={signing.public}"]
    else:
        who = [f"--certificate-identity-regexp={signing.identity}"]
        who += [f"--certificate-oidc-issuer={signing.issuer}"]
    log = [] if signing.logged else ["--insecure-ignore-tlog=true"]
    try:
        return run(["cosign", *command, *who, *log, repository.at(digest)], host=repository.host)
    except AttnimgError as error:
        if error.code not in ("not-verified", "no-image", "program"):
            raise
        raise _not_verified(what, error.why) from error


def _not_verified(what: str, why: str) -> AttnimgError:
    return AttnimgError(
        what,
        why=why,
        do="do not use it; if you made it, sign it with the key that verifies it",
        code="not-verified",
        exit_code=1,
    )


def _statement(line: str) -> dict[str, Any]:
    """Return the statement of an envelope that cosign has verified."""
    statement: dict[str, Any] = json.loads(base64.b64decode(json.loads(line)["payload"]))
    return statement


def _rehearsal_keys(folder: Path, *, make: bool) -> tuple[str, str]:
    key, public = folder / "rehearsal.key", folder / "rehearsal.pub"
    if not make and not public.exists():
        raise AttnimgError(
            "there is no key to verify with",
            why=f"found neither COSIGN_PUBLIC_KEY nor {public}, the key of a rehearsal in this "
            "checkout",
            do="set COSIGN_PUBLIC_KEY to the public key of who signed the image, cosign.pub",
            code="no-key",
        )
    if make and not (key.exists() and public.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        key.unlink(missing_ok=True)
        run(
            ["cosign", "generate-key-pair", f"--output-key-prefix={folder / 'rehearsal'}"],
            host="",
            env={"COSIGN_PASSWORD": ""},
        )
    return str(key), str(public)
