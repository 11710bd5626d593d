"""A release: where it goes, under which tags, and what may not be published."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from attnimg.errors import AttnimgError
from recipes.gates import GateFinding, gate_names
from recipes.read import read_recipes
from recipes.release import record as records
from recipes.release.command import release
from recipes.release.gates_result import GatesResult
from recipes.release.programs import answer_error
from recipes.release.publishable import OCI, check_publishable
from recipes.release.repository import find_repository, parse_repository, read_registry
from recipes.release.tags import immutable_tag, moving_tags, refuse_changed, refuse_shared
from recipes.run_gates import GateResult
from recipes.solve.plan import solve_all

ROOT = Path(__file__).parents[3]
RECIPES = read_recipes(ROOT)
PLANS = {plan.image.name: plan for plan in solve_all(RECIPES)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = f"sha256:{'a' * 64}"


@pytest.mark.parametrize(
    ("text", "registry", "loopback"),
    [
        ("ghcr.io/attnimg", "ghcr.io/attnimg", False),
        ("registry.example.com:5000/team/images/", "registry.example.com:5000/team/images", False),
        ("127.0.0.1:5000/rehearsal", "127.0.0.1:5000/rehearsal", True),
        ("localhost:5000/x", "localhost:5000/x", True),
        ("LOCALHOST:5000/x", "localhost:5000/x", True),
        ("Registry.Example.com/team", "registry.example.com/team", False),
        ("registry:1/x", "registry:1/x", False),
        ("registry:65535/a-b/c__d.e", "registry:65535/a-b/c__d.e", False),
        (f"ghcr.io/{'a' * 239}", f"ghcr.io/{'a' * 239}", False),
        ("127.example.com/x", "127.example.com/x", False),
        ("localhost.example.com/x", "localhost.example.com/x", False),
        ("10.0.0.1:5000/x", "10.0.0.1:5000/x", False),
    ],
)
def test_a_registry_is_a_host_and_a_namespace(text: str, registry: str, loopback: bool) -> None:
    repository = parse_repository(text)
    assert (repository.registry, repository.loopback) == (registry, loopback)
    assert repository.at(DIGEST) == f"{registry}/attnimg@{DIGEST}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "needed host"),
        ("ghcr.io", "no namespace"),
        ("ghcr.io/", "no namespace"),
        ("localhost:5000", "no namespace"),
        ("https://ghcr.io/x", "without https"),
        ("attnimg/x", "with a dot or a port"),
        ("a b.c/x", "needed host"),
        ("-:5000/x", "needed host"),
        (".:5000/x", "needed host"),
        ("a..b:5000/x", "needed host"),
        ("a-.example.com/x", "needed host"),
        ("[::1]:5000/x", "no IPv6"),
        ("localhost:0/x", "port is 0"),
        ("localhost:99999/x", "port is 99999"),
        ("localhost:\u0665/x", "needed host"),
        ("ghcr.io/Team", "small letters"),
        ("ghcr.io/a//b", "small letters"),
        (f"ghcr.io/{'a' * 240}", "256 characters"),
    ],
)
def test_what_is_no_registry_is_refused(text: str, why: str) -> None:
    with pytest.raises(AttnimgError) as caught:
        parse_repository(text)
    assert caught.value.code == "bad-registry"
    assert why in caught.value.why
    assert "REGISTRY=" in caught.value.do


def test_the_environment_replaces_the_registry_of_the_recipe() -> None:
    assert find_repository(ROOT, {}).registry == read_registry(ROOT).registry
    assert find_repository(ROOT, {"REGISTRY": ""}).registry == read_registry(ROOT).registry
    assert find_repository(ROOT, {"REGISTRY": "localhost:1/x/"}).registry == "localhost:1/x"


@pytest.mark.parametrize(
    "text", ["registry = 1", "registry =", 'registry = "ghcr.io/x"\nsoruce = "x"']
)
def test_a_registry_file_that_is_wrong_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/registry.toml").write_text(text)
    with pytest.raises(AttnimgError, match=r"registry\.toml"):
        read_registry(tmp_path)


@pytest.mark.parametrize(
    ("image", "version", "revision", "tag"),
    [
        ("hopper", "0.2.0", COMMIT, "hopper-0.2.0-torch2.14.1-cu130-0123456789ab"),
        ("cpu", "0.2.0rc1", COMMIT, "cpu-0.2.0rc1-torch2.13.0-cpu-0123456789ab"),
        ("cpu", "0.2.0+local", COMMIT, "cpu-0.2.0_local-torch2.13.0-cpu-0123456789ab"),
        ("cpu", "dev", f"{COMMIT}-dirty", "cpu-dev-torch2.13.0-cpu-0123456789ab-dirty"),
        (
            "ampere-frontier",
            "0.2.0",
            COMMIT,
            "ampere-frontier-0.2.0-torch2.15.0-cu132-0123456789ab",
        ),
    ],
)
def test_the_immutable_tag_names_everything_that_a_rebuild_changes(
    image: str, version: str, revision: str, tag: str
) -> None:
    assert immutable_tag(PLANS[image], version=version, revision=revision) == tag


@pytest.mark.parametrize("version", ["1.0/evil", "1.0 x", "1" * 128, "ü"])
def test_a_version_that_makes_no_tag_is_refused(version: str) -> None:
    with pytest.raises(AttnimgError, match="can't get a tag") as caught:
        immutable_tag(PLANS["cpu"], version=version, revision=COMMIT)
    assert "pyproject.toml" in caught.value.do


def test_moving_tags_are_the_name_and_its_aliases_and_no_two_images_share_one() -> None:
    assert moving_tags(PLANS["ampere"]) == ("ampere", "ada")
    refuse_shared(PLANS)
    with pytest.raises(AttnimgError, match="same tag") as caught:
        refuse_shared({"ampere": PLANS["ampere"], "other": PLANS["ampere"]})
    assert "ada: ampere, other" in caught.value.why


def test_an_immutable_tag_is_never_moved() -> None:
    refuse_changed("cpu-1", found=None, digest=DIGEST)
    refuse_changed("cpu-1", found=DIGEST, digest=DIGEST)
    with pytest.raises(AttnimgError, match="cpu-1 is taken"):
        refuse_changed("cpu-1", found=f"sha256:{'b' * 64}", digest=DIGEST)


# ---- what may be published ----------------------------------------------------------------------

BASE = replace(PLANS["cpu"].base, digest=DIGEST)
PLAN = replace(PLANS["cpu"], base=BASE, unresolved={})
LABELS = {
    f"{OCI}.title": "attnimg:cpu",
    f"{OCI}.version": "0.2.0",
    f"{OCI}.revision": COMMIT,
    f"{OCI}.created": "2026-11-27T00:00:00Z",
    f"{OCI}.base.name": BASE.reference,
    f"{OCI}.base.digest": DIGEST,
}
PASSED = GatesResult(
    image="cpu", source="build/cpu.tar", kind="image", layers=({"name": "base"},), passed=True,
    gates=tuple(GateResult(gate=gate) for gate in sorted(gate_names())), image_id=DIGEST,
    digest=DIGEST, checked_by="", evidence={},
)  # fmt: skip
FINDING = GateFinding(file="torch", found="2.0", needed="2.1", do="pin it")


def with_gate(result: GateResult) -> GatesResult:
    """What the gates found, with another result of one gate."""
    gates = tuple(result if one.gate == result.gate else one for one in PASSED.gates)
    return replace(PASSED, gates=gates)


REMOTE, LOCAL = (
    parse_repository("registry.example.com/team"),
    parse_repository("127.0.0.1:1/rehearsal"),
)


def check(
    labels=LABELS, gates_result=PASSED, plan=PLAN, repository=REMOTE, head=COMMIT, rehearsal=False
):
    return check_publishable(
        plan, labels=labels, gates_result=gates_result, version="0.2.0", head=head,
        repository=repository, rehearsal=rehearsal,
    )  # fmt: skip


def test_a_resolved_labelled_image_that_passed_the_gates_may_be_published_also_in_a_rehearsal() -> (
    None
):
    assert check() == ()
    assert check(repository=LOCAL) == ()
    assert check(repository=LOCAL, rehearsal=True) == ()


@pytest.mark.parametrize(
    ("label", "value", "found"),
    [
        ("version", "dev", "label version: found dev"),
        ("version", "", "label version: found none"),
        ("version", "0.1.0", "label version: found 0.1.0, needed 0.2.0"),
        ("revision", "", "label revision: found none"),
        ("revision", f"{COMMIT}-dirty", "needed a commit of 40 digits"),
        ("revision", "main", "needed a commit of 40 digits"),
        ("revision", "f" * 40, f"needed {COMMIT}, this checkout's"),
        ("created", "", "label created: found none"),
        ("base.name", "", "label base.name: found none"),
        ("base.name", "attnimg-base:bookworm", "label base.name: found attnimg-base:bookworm"),
        ("base.digest", "", "label base.digest: found none"),
        ("base.digest", f"sha256:{'b' * 64}", f"needed {DIGEST}, the recipe's"),
    ],
)
def test_a_missing_or_different_label_is_refused_and_a_warning_in_a_rehearsal(
    label: str, value: str, found: str
) -> None:
    labels = LABELS | {f"{OCI}.{label}": value}
    for repository in (REMOTE, LOCAL):
        with pytest.raises(AttnimgError) as caught:
            check(labels, repository=repository)
        assert caught.value.code == "not-publishable"
        assert found in caught.value.why
        assert "REHEARSAL=1" in caught.value.do
    (warning,) = check(labels, repository=LOCAL, rehearsal=True)
    assert found in warning


def test_an_unresolved_value_is_refused_and_a_warning_in_a_rehearsal() -> None:
    plan = PLANS["rocm"]
    labels = LABELS | {f"{OCI}.title": "attnimg:rocm"}
    gates_result = replace(PASSED, image="rocm")
    with pytest.raises(AttnimgError, match="rocm can't be published") as caught:
        check(labels, gates_result, plan=plan)
    assert "images/rocm: torch is unresolved" in caught.value.why
    warnings = check(labels, gates_result, plan=plan, repository=LOCAL, rehearsal=True)
    assert any("torch is unresolved" in text for text in warnings)


@pytest.mark.parametrize(
    ("gates_result", "found"),
    [
        (replace(PASSED, gates=()), "gates: found no result of duplicates, glibc, "),
        (replace(PASSED, gates=PASSED.gates[:-1]), f"no result of {PASSED.gates[-1].gate}"),
        (
            replace(PASSED, gates=(*PASSED.gates, GateResult(gate="always"))),
            "gates: found always, which this checkout does not have",
        ),
        (
            replace(PASSED, gates=(*PASSED.gates, PASSED.gates[0])),
            f"gates: found two results of {PASSED.gates[0].gate}",
        ),
        (replace(PASSED, image="hopper"), "gates: found the result of hopper, needed cpu"),
        (replace(PASSED, passed=False), "gates: found passed false without a finding"),
        (
            with_gate(GateResult(gate="pins", findings=(FINDING,))),
            "gate pins: 1 finding (torch)",
        ),
        (with_gate(GateResult(gate="sbom", skip_reason="no syft")), "gate sbom was skipped: no s"),
    ],
)
def test_what_the_gates_did_not_pass_is_refused_also_in_a_rehearsal(
    gates_result, found: str
) -> None:
    for repository, rehearsal in ((REMOTE, False), (LOCAL, True)):
        with pytest.raises(AttnimgError) as caught:
            check(gates_result=gates_result, repository=repository, rehearsal=rehearsal)
        assert found in caught.value.why
        assert "make gate/cpu" in caught.value.do


def test_an_image_of_something_else_is_refused_also_in_a_rehearsal() -> None:
    with pytest.raises(AttnimgError, match="cpu can't be published"):
        check(LABELS | {f"{OCI}.title": "attnimg:hopper"}, repository=LOCAL, rehearsal=True)


def test_a_release_is_refused_before_anything_is_built_and_runs_all_tests(tmp_path: Path) -> None:
    resolved = {"REGISTRY": "registry.example.com/team"}
    with pytest.raises(AttnimgError, match="rocm can't be published"):
        release(PLANS["rocm"], RECIPES, step=None, root=ROOT, env=resolved)
    with pytest.raises(AttnimgError, match="goes to a registry of this machine"):
        release(PLAN, RECIPES, step=None, root=ROOT, env=resolved | {"REHEARSAL": "1"})
    with pytest.raises(AttnimgError, match="runs all tests"):
        release(PLAN, RECIPES, step="push", root=ROOT, env=resolved | {"TESTS": "tests/x.py"})
    with pytest.raises(AttnimgError, match="runs all tests"):
        release(PLAN, RECIPES, step="test", root=ROOT, env=resolved | {"TESTS": "tests/x.py"})
    with pytest.raises(AttnimgError, match="goes to a registry of this machine"):
        release(PLAN, RECIPES, step="promote", root=ROOT, env=resolved | {"REHEARSAL": "1"})


def test_a_rehearsal_is_refused_with_a_registry_elsewhere() -> None:
    with pytest.raises(AttnimgError) as caught:
        check(rehearsal=True)
    assert caught.value.code == "not-a-rehearsal"


def test_no_image_of_the_recipes_is_published_today() -> None:
    """Their base is unresolved; the release starts to work when `make lock` has resolved it."""
    for name, plan in PLANS.items():
        if plan.unresolved:
            gates_result = replace(PASSED, image=name)
            with pytest.raises(AttnimgError, match="can't be published") as caught:
                check(LABELS | {f"{OCI}.title": f"attnimg:{name}"}, gates_result, plan=plan)
            assert "is unresolved" in caught.value.why


# ---- the state of a release, and what registries answer ------------------------------------------

RECORD = records.Record(
    image="cpu", registry=LOCAL.registry, image_id=DIGEST, digest=DIGEST,
    reference=LOCAL.at(DIGEST), bytes=1, layers=(records.Layer(digest=DIGEST, bytes=1),),
    labels=LABELS,
    version="0.2.0", revision=COMMIT, started="2026-11-27T00:00:00Z", rehearsal=("why",),
)  # fmt: skip


def test_a_record_is_read_as_it_was_written_and_a_rehearsal_has_its_own(tmp_path: Path) -> None:
    pushed = records.write_record(RECORD.done("push", seconds=1.23), tmp_path)
    assert records.read_record("cpu", LOCAL, tmp_path) == pushed
    assert records.read_record("cpu", REMOTE, tmp_path) is None
    assert records.needed_record("cpu", LOCAL, tmp_path, after="push") == pushed
    with pytest.raises(AttnimgError) as caught:
        records.needed_record("cpu", LOCAL, tmp_path, after="verify")
    assert (caught.value.code, caught.value.do) == ("no-step", "make tested/cpu")
    other = parse_repository("127.0.0.1:2/rehearsal")
    with pytest.raises(AttnimgError, match="another registry"):
        records.needed_record("cpu", other, tmp_path, after="push")
    with pytest.raises(AttnimgError, match="has not reached this step"):
        records.needed_record("hopper", LOCAL, tmp_path, after="push")


# Of skopeo 1.9.3, cosign 2.5.0, Docker 26, docker-registry 2.8.2, and public registries.
@pytest.mark.parametrize(
    ("output", "what"),
    [
        (
            'time="2026-11-27T23:00:00Z" level=fatal msg="trying to reuse blob sha256:0 at '
            'destination: pinging container registry 127.0.0.1:1: Get \\"http://127.0.0.1:1/\\": '
            'dial tcp 127.0.0.1:1: connect: connection refused"',
            "can't be reached",
        ),
        ("Error: dial tcp: lookup registry.example.com: no such host", "can't be reached"),
        ("received unexpected HTTP status: 503 Service Unavailable, status code 503", "reached"),
        (
            "Error: GET https://x/token: DENIED: requested access to the resource is denied",
            "creden",
        ),
        ("reading manifest: unauthorized: authentication required", "refuses the credentials"),
        (
            "writing blob: received unexpected HTTP status: 500: write: no space left on device",
            "its disk may be full",
        ),
        ("toomanyrequests: You have reached your pull rate limit", "no more requests"),
        ("x509: certificate signed by unknown authority", "no TLS certificate"),
        ("http: server gave HTTP response to HTTPS client", "no TLS certificate"),
        ("reading manifest cpu in 127.0.0.1:1/x: manifest unknown", "does not have the image"),
        ("NAME_UNKNOWN: repository name not known to registry", "does not have the image"),
        ("Cannot connect to the Docker daemon at unix:///x. Is it running?", "no Docker engine"),
        (
            'Error: Get "https://127.0.0.1:1/v2/": x509: certificate signed by unknown authority',
            "127.0.0.1:1 has no TLS certificate",
        ),
        (
            'Post "https://fulcio.sigstore.dev/api/v2/signingCert": dial tcp: lookup '
            "fulcio.sigstore.dev on 10.0.0.1:53: no such host",
            "fulcio.sigstore.dev can't be reached",
        ),
        (
            'Post "https://rekor.sigstore.dev/api/v1/log/entries": dial tcp 10.0.0.1:443: connect: '
            "connection refused",
            "rekor.sigstore.dev can't be reached",
        ),
        ("dial tcp: lookup example.com: Temporary failure in name resolution", "registry example"),
        (
            "no matching signatures: searching log query: Post "
            '"https://rekor.sigstore.dev/api/v1/log/entries/retrieve": dial tcp: lookup '
            "rekor.sigstore.dev: no such host",
            "rekor.sigstore.dev can't be reached",
        ),
        ("Error: no signatures found", "found no valid signature"),
        (
            "Error: no matching signatures: cert verification failed: x509: certificate signed by "
            "unknown authority. Check your TUF root",
            "found no valid signature",
        ),
        ("cert verification failed: x509: certificate has expired", "found no valid signature"),
        (
            "none of the expected identities matched what was in the certificate, got subjects "
            "[https://example.com/forbidden]",
            "found no valid signature",
        ),
        # Faults of this machine, not of the registry.
        (
            "permission denied while trying to connect to the Docker daemon socket at unix:///x: "
            'Get "http://%2Fx/v1.24/info": dial unix /x: connect: permission denied',
            "may not use the Docker engine",
        ),
        ("failed to connect to the docker API at unix:///x; check if the path", "no Docker engine"),
        ("getting signer: reading key: open cosign.key: permission denied", "can't use the key"),
        ("getting signer: reading key: decrypt: unexpected EOF", "can't use the key"),
        ("loading public key: pem to public key: PEM decoding failed", "can't use the key"),
        ("open /home/me/.docker/config.json: permission denied", "can't use a file of this"),
        ("write /tmp/pulled/blobs/sha256/0: no space left on device", "this machine can't store"),
        (
            "received unexpected HTTP status: 500: write /var/lib/registry/0: no space left on "
            "device",
            "the registry example.com can't store",
        ),
        ("could not parse reference: example.com/forbidden/x@sha256:aa", "can't read the name"),
        (
            'Error parsing image name "docker://example.com/x:forbidden:y": invalid reference '
            "format",
            "can't read the name",
        ),
        (
            'initializing source docker://example.com/denied/x: "manifest unknown"',
            "does not have the image",
        ),
        ("Error: something else", "skopeo failed"),
        ("", "skopeo failed"),
    ],
)
def test_errors_of_a_registry_become_plain_messages(output: str, what: str) -> None:
    output = f"first line\n{output}" if output else ""
    error = answer_error("skopeo", output, host="example.com", writes=True)
    assert what in error.what
    assert error.why
    assert error.do
    assert "level=fatal" not in error.why
    # Who verifies or pulls an image has no release that continues, and pushes nothing.
    reading = answer_error("skopeo", output, host="example.com")
    assert not re.search("continue|push|sent twice", reading.do)
    assert "what it gets" not in reading.what
    assert "{" not in f"{error} {reading}"


@pytest.mark.parametrize(
    ("output", "code", "what"),
    [
        ("received unexpected HTTP status: 500 Internal Server Error", "registry", "has a fault"),
        ("failed to register layer: no space left on device", "local", "this machine can't store"),
    ],
)
def test_a_fault_of_a_registry_that_is_read_is_not_a_full_disk_there(
    output: str, code: str, what: str
) -> None:
    error = answer_error("docker", output, host="example.com")
    assert error.code == code
    assert what in error.what


@pytest.mark.parametrize("value", ["0", "no", "false", "off", "NO", " ", ""])
def test_a_rehearsal_that_is_switched_off_is_none(value: str) -> None:
    env = {"REGISTRY": REMOTE.registry, "REHEARSAL": value}
    with pytest.raises(AttnimgError, match="rocm can't be published"):
        release(PLANS["rocm"], RECIPES, step=None, root=ROOT, env=env)


@pytest.mark.parametrize("value", ["1", "yes", "true", "ON"])
def test_a_rehearsal_that_is_switched_on_is_one(value: str) -> None:
    env = {"REGISTRY": REMOTE.registry, "REHEARSAL": value}
    with pytest.raises(AttnimgError, match="goes to a registry of this machine"):
        release(PLANS["rocm"], RECIPES, step=None, root=ROOT, env=env)


def test_a_rehearsal_that_is_neither_is_refused() -> None:
    with pytest.raises(AttnimgError, match="REHEARSAL can't be read"):
        release(PLAN, RECIPES, step=None, root=ROOT, env={"REHEARSAL": "maybe"})


def test_the_readme_says_whether_images_are_published() -> None:
    published = read_registry(ROOT).published
    assert ("not published yet" in (ROOT / "README.md").read_text()) == (not published)
    for one in published:
        assert one.image in PLANS
        assert one.digest.startswith("sha256:")


def test_no_file_names_the_registry_but_its_recipe() -> None:
    registry = read_registry(ROOT).registry
    pages = {*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "Makefile"}
    pages |= {*(ROOT / ".github/workflows").glob("*.yml")}
    named = {path.name for path in pages if registry in path.read_text(encoding="utf-8")}
    assert named <= {"releases.md"}  # whose commands `make render` writes


def test_a_build_is_tagged_by_its_name_and_aliases_whatever_the_registry_is() -> None:
    bake = json.loads((ROOT / "docker/docker-bake.json").read_text())
    for name, plan in PLANS.items():
        assert bake["target"][name]["tags"] == [
            f"attnimg:{tag}${{TAG_END}}" for tag in moving_tags(plan)
        ]
    assert "REGISTRY" not in bake["variable"]
