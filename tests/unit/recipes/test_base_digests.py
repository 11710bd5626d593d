"""`make lock` asks a registry for digests: Debian's docker-registry on loopback, with real images.

Where that is not installed (apt-get install docker-registry) the tests against it are skipped.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from loopback import Handler, Server, free_port

from attnimg.errors import AttnimgError
from recipes.read import read_recipes
from recipes.solve.bases import lock_bases
from recipes.solve.registry import TagDigests, UnreachableError, resolve_tag

ROOT = Path(__file__).resolve().parents[3]
RECIPES = read_recipes(ROOT)
OCI = "application/vnd.oci.image"
DOCKER = "application/vnd.docker"
IMAGE_KINDS = {
    OCI: f"{OCI}.manifest.v1+json",
    DOCKER: f"{DOCKER}.distribution.manifest.v2+json",
}
INDEX_KINDS = {
    OCI: f"{OCI}.index.v1+json",
    DOCKER: f"{DOCKER}.distribution.manifest.list.v2+json",
}
# htpasswd -nbB reader secret
HTPASSWD = "reader:$2y$05$MxnDFHRHVTUWSyEnQSPEvOrOWUTJDgpwWvRp0dGGrVVQ7jGKY1kzS\n"


class Registry:
    """A docker-registry of the machine, in a folder of its own."""

    def __init__(self, folder: Path, *, htpasswd: str = "") -> None:
        self.host = f"127.0.0.1:{free_port()}"
        auth = ""
        if htpasswd:
            (folder / "htpasswd").write_text(htpasswd)
            auth = f"auth: {{htpasswd: {{realm: here, path: {folder}/htpasswd}}}}\n"
        (folder / "config.yml").write_text(
            f"version: 0.1\nlog: {{level: error}}\n{auth}"
            f"storage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
            f"http: {{addr: '{self.host}'}}\n"
        )
        command = ["docker-registry", "serve", str(folder / "config.yml")]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(300):
            try:
                httpx.get(f"http://{self.host}/v2/")
                break
            except httpx.TransportError:
                time.sleep(0.1)

    def push_blob(self, name: str, content: bytes) -> str:
        digest = sha256(content)
        place = httpx.post(f"http://{self.host}/v2/{name}/blobs/uploads/").headers["location"]
        address = httpx.URL(place).copy_merge_params({"digest": digest})
        httpx.put(address, content=content).raise_for_status()
        return digest

    def push(self, name: str, tag: str, kind: str, content: dict[str, Any]) -> str:
        """Push a manifest, and return its digest; an empty tag pushes it by digest alone."""
        data = json.dumps(content).encode()
        address = f"http://{self.host}/v2/{name}/manifests/{tag or sha256(data)}"
        httpx.put(address, content=data, headers={"Content-Type": kind}).raise_for_status()
        return sha256(data)

    def push_image(self, name: str, tag: str, architecture: str, *, vendor: str = OCI) -> str:
        config = json.dumps({"os": "linux", "architecture": architecture, "rootfs": {}}).encode()
        kind = IMAGE_KINDS[vendor]
        kinds = (f"{OCI}.config.v1+json", f"{OCI}.layer.v1.tar")
        if vendor == DOCKER:
            kinds = (f"{DOCKER}.container.image.v1+json", f"{DOCKER}.image.rootfs.diff.tar.gzip")
        entries = [
            {"mediaType": media, "size": len(data), "digest": self.push_blob(name, data)}
            for media, data in zip(kinds, (config, b"a layer"), strict=True)
        ]
        manifest = {"schemaVersion": 2, "mediaType": kind, "config": entries[0]}
        return self.push(name, tag, kind, {**manifest, "layers": entries[1:]})

    def push_index(self, name: str, tag: str, *, vendor: str = OCI) -> tuple[str, dict[str, str]]:
        """Push an index for two platforms, and an attestation as BuildKit adds one."""
        digests = {
            platform: self.push_image(name, "", platform.split("/")[1], vendor=vendor)
            for platform in ("linux/amd64", "linux/arm64")
        }
        platforms = [
            {"os": "linux", "architecture": "amd64"},
            {"os": "linux", "architecture": "arm64", "variant": "v8"},
            {"os": "unknown", "architecture": "unknown"},
        ]
        entries = [
            {"mediaType": IMAGE_KINDS[vendor], "size": 9, "digest": digest, "platform": platform}
            for platform, digest in zip(
                platforms, [*digests.values(), digests["linux/amd64"]], strict=True
            )
        ]
        kind = INDEX_KINDS[vendor]
        content = {"schemaVersion": 2, "mediaType": kind, "manifests": entries}
        return self.push(name, tag, kind, content), digests


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def start_registry(folder: Path, **rest: str) -> Iterator[Registry]:
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is not installed: apt-get install docker-registry")
    registry = Registry(folder, **rest)
    try:
        yield registry
    finally:
        registry.process.terminate()
        registry.process.wait()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    yield from start_registry(tmp_path_factory.mktemp("registry"))


@pytest.mark.parametrize("vendor", [OCI, DOCKER])
def test_an_index_has_its_own_digest_and_one_for_each_platform(
    registry: Registry, vendor: str
) -> None:
    digest, platforms = registry.push_index("team/python", f"index-{vendor[-5:]}", vendor=vendor)
    found = resolve_tag(f"{registry.host}/team/python:index-{vendor[-5:]}")
    assert found == TagDigests(digest, platforms)
    assert list(found.platforms) == ["linux/amd64", "linux/arm64"]


@pytest.mark.parametrize("vendor", [OCI, DOCKER])
def test_a_manifest_has_the_platform_of_its_config(registry: Registry, vendor: str) -> None:
    digest = registry.push_image("python", "one", "amd64", vendor=vendor)
    found = resolve_tag(f"{registry.host}/python:one")
    assert found == TagDigests(digest, {"linux/amd64": digest})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        pytest.param("python:3.111", "it has no such tag (404 Not Found)", id="a wrong tag"),
        pytest.param("pythn:3.11", "it has no such tag (404 Not Found)", id="a wrong name"),
        pytest.param("config:1", "its index has no image for any platform", id="an empty index"),
    ],
)
def test_what_the_registry_does_not_have_is_refused(
    registry: Registry, name: str, why: str
) -> None:
    registry.push_image("python", "3.11", "amd64")
    kind = INDEX_KINDS[OCI]
    registry.push("config", "1", kind, {"schemaVersion": 2, "mediaType": kind, "manifests": []})
    with pytest.raises(AttnimgError, match="the registry has no digest of 127") as caught:
        resolve_tag(f"{registry.host}/{name}")
    assert caught.value.why == why
    assert "recipes/bases.toml" in caught.value.do


def test_a_registry_that_asks_for_a_login_is_named(tmp_path: Path) -> None:
    for registry in start_registry(tmp_path, htpasswd=HTPASSWD):
        with pytest.raises(AttnimgError, match="has no digest") as caught:
            resolve_tag(f"{registry.host}/python:3.11")
        assert caught.value.why == "it asks for a login, or has no such image (401 Unauthorized)"


class TokenHandler(Handler):
    """Docker Hub's way in front of a registry: 401 with the address of tokens, then the answer."""

    registry: Registry
    field = "token"
    tokens = 0

    def route(self) -> None:
        host = self.headers["Host"]
        if self.path.startswith("/token?"):
            asked = httpx.URL(self.path).params
            type(self).tokens += 1
            ok = asked["scope"] == "repository:team/python:pull" and asked["service"] == "here"
            secret = base64.b64encode(b"pull").decode()
            self.send(200 if ok else 403, json.dumps({self.field: secret}).encode(), {})
        elif self.headers.get("Authorization") != "Bearer " + base64.b64encode(b"pull").decode():
            scope = f'scope="repository:{self.path.split("/v2/")[1].split("/manifests")[0]}:pull"'
            realm = f'Bearer realm="http://{host}/token",service="here",{scope}'
            self.send(401, b"{}", {"WWW-Authenticate": realm})
        else:
            accept = {"Accept": self.headers["Accept"]}
            got = httpx.get(f"http://{self.registry.host}{self.path}", headers=accept)
            names = ("Content-Type", "Docker-Content-Digest")
            self.send(got.status_code, got.content, {n: got.headers.get(n, "") for n in names})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize("field", ["token", "access_token"])
def test_a_token_is_asked_for_as_docker_hub_and_ghcr_do(registry: Registry, field: str) -> None:
    digest, platforms = registry.push_index("team/python", "3.11")
    handler = type("Handler", (TokenHandler,), {"registry": registry, "field": field})
    with Server(handler) as server:
        assert resolve_tag(f"{server.host}/team/python:3.11") == TagDigests(digest, platforms)
        assert handler.tokens == 1


def test_a_token_that_is_refused_is_named(registry: Registry) -> None:
    handler = type("Handler", (TokenHandler,), {"registry": registry})
    with Server(handler) as server:
        with pytest.raises(AttnimgError) as caught:
            resolve_tag(f"{server.host}/private/python:3.11")
        assert caught.value.why == "it refuses access, or has no such image (403 Forbidden)"


class WrongAnswer(Handler):
    """What is no registry, or one whose bytes are not those that it names."""

    body = b"<html>captive portal</html>"
    headers_sent: ClassVar[dict[str, str]] = {}

    def route(self) -> None:
        self.send_response(200)
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)


@pytest.mark.parametrize(
    ("body", "headers", "why"),
    [
        pytest.param(
            b"<html>", {"Content-Type": "text/html"}, "it is text/html, not an image", id="a portal"
        ),
        pytest.param(b"{}", {"Content-Type": "text/json"}, "not an image", id="another kind"),
        pytest.param(
            b"{}",
            {"Docker-Content-Digest": "sha256:" + "0" * 64},
            "the registry says sha256:0000",
            id="bytes that were changed",
        ),
    ],
)
def test_what_is_no_registry_is_refused(body: bytes, headers: dict[str, str], why: str) -> None:
    with Server(type("Handler", (WrongAnswer,), {"body": body, "headers_sent": headers})) as server:
        with pytest.raises(AttnimgError) as caught:
            resolve_tag(f"{server.host}/python:3.11")
        assert why in caught.value.why


INDEX = {"Content-Type": INDEX_KINDS[OCI]}
MANIFEST = {"Content-Type": IMAGE_KINDS[OCI]}
AMD64 = {"os": "linux", "architecture": "amd64"}


def index_of(**entry: Any) -> bytes:
    return json.dumps({"manifests": [{"digest": "sha256:" + "a" * 64, **entry}]}).encode()


@pytest.mark.parametrize(
    ("body", "headers", "why"),
    [
        pytest.param(b"[]", INDEX, "no JSON object", id="a list"),
        pytest.param(b"[" * 200_000, INDEX, "no JSON object", id="lists in lists"),
        pytest.param(b"\xff{}", INDEX, "no JSON object", id="no UTF-8"),
        pytest.param(b'{"manifests": null}', INDEX, "manifests", id="no list of manifests"),
        pytest.param(b'{"manifests": {"a": 1}}', INDEX, "manifests", id="a table of manifests"),
        pytest.param(b'{"manifests": [1]}', INDEX, "manifests.0", id="a number for a manifest"),
        pytest.param(index_of(digest=None, platform=AMD64), INDEX, "digest", id="no digest"),
        pytest.param(
            index_of(digest='evil/../x"\n[y]', platform=AMD64), INDEX, "digest", id="a path"
        ),
        pytest.param(
            index_of(digest="sha256:" + "a" * 64 + "\n", platform=AMD64),
            INDEX, "digest", id="a line after the digest",
        ),
        pytest.param(
            index_of(platform={**AMD64, "architecture": 'amd64"\n[y]'}),
            INDEX, "architecture", id="a table in the platform",
        ),
        pytest.param(index_of(platform={"os": "linux"}), INDEX, "architecture", id="half"),
        pytest.param(index_of(platform=[]), INDEX, "platform", id="a list for the platform"),
        pytest.param(index_of(platform=None), INDEX, "no image for any platform", id="none"),
        pytest.param(b'{"layers": []}', MANIFEST, "config", id="a manifest without a config"),
        pytest.param(b'{"config": {"digest": "../../x"}}', MANIFEST, "digest", id="a config path"),
        pytest.param(
            json.dumps({"config": {"digest": "sha256:" + "b" * 64}}).encode(),
            MANIFEST, "its config has sha256:", id="another config",
        ),
        pytest.param(b"none", {**INDEX, "Content-Encoding": "gzip"}, "can't be read", id="no gzip"),
        pytest.param(b" " * 5_000_000, INDEX, "more than 4194304 bytes", id="a large answer"),
        pytest.param(
            gzip.compress(b" " * 100_000_000, 9),
            {**INDEX, "Content-Encoding": "gzip"}, "more than 4194304 bytes", id="a gzip bomb",
        ),
    ],
)  # fmt: skip
def test_a_damaged_answer_is_refused(body: bytes, headers: dict[str, str], why: str) -> None:
    with Server(type("Handler", (WrongAnswer,), {"body": body, "headers_sent": headers})) as server:
        with pytest.raises(AttnimgError) as caught:
            resolve_tag(f"{server.host}/team/python:3.11")
        assert why in caught.value.why


def test_of_two_images_for_a_platform_the_first_counts() -> None:
    entries = [{"digest": f"sha256:{sign * 64}", "platform": AMD64} for sign in "ab"]
    body = json.dumps({"manifests": entries}).encode()
    with Server(type("Handler", (WrongAnswer,), {"body": body, "headers_sent": INDEX})) as server:
        found = resolve_tag(f"{server.host}/team/python:3.11")
        assert dict(found.platforms) == {"linux/amd64": "sha256:" + "a" * 64}


class OtherTokens(TokenHandler):
    """A registry that asks for a token at `realm`, and gives `given` there."""

    realm = "http://{host}/token"
    given: ClassVar[dict[str, Any]] = {}
    sent: ClassVar[list[str]] = []

    def route(self) -> None:
        if self.path.startswith("/token"):
            self.send(200, json.dumps(self.given).encode(), {})
        elif "Authorization" in self.headers:
            self.sent.append(self.headers["Authorization"])
            self.send(404, b"{}", {})
        else:
            realm = self.realm.format(host=self.headers["Host"])
            self.send(401, b"{}", {"WWW-Authenticate": f'Bearer realm="{realm}",service="s"'})


@pytest.mark.parametrize(
    "given",
    [{}, {"token": None}, {"token": ""}, {"token": {"a": 1}}, {"token": "\u2603"},
     {"token": "a\r\nX: y"}, {"access_token": 1}],
)  # fmt: skip
def test_what_is_no_token_is_not_sent(given: dict[str, Any]) -> None:
    handler = type("Handler", (OtherTokens,), {"given": given, "sent": []})
    with Server(handler) as server:
        with pytest.raises(AttnimgError, match="has no digest") as caught:
            resolve_tag(f"{server.host}/team/python:3.11")
        assert "token" in caught.value.why
    assert handler.sent == []


@pytest.mark.parametrize(
    "realm",
    ["", "/token", "http://[::1", "file:///etc/passwd", "http://127.0.0.1:99999/",
     "http://" + "a" * 70 + ".x/"],
)  # fmt: skip
def test_a_wrong_address_of_tokens_is_refused(realm: str) -> None:
    with Server(type("Handler", (OtherTokens,), {"realm": realm})) as server:
        with pytest.raises(AttnimgError) as caught:
            resolve_tag(f"{server.host}/team/python:3.11")
        assert f"it names the address {realm!r}" in caught.value.why


class Redirecting(TokenHandler):
    """A registry behind so many redirects."""

    times = 0

    def route(self) -> None:
        count = int(httpx.URL(self.path).params.get("n", "0"))
        if count < self.times:
            self.send(307, b"", {"Location": f"{self.path.partition('?')[0]}?n={count + 1}"})
        else:
            self.send(200, index_of(platform=AMD64), INDEX)


@pytest.mark.parametrize(("times", "passes"), [(1, True), (5, True), (6, False)])
def test_redirects_are_followed_five_times(times: int, passes: bool) -> None:
    with Server(type("Handler", (Redirecting,), {"times": times})) as server:
        if passes:
            assert dict(resolve_tag(f"{server.host}/python:3.11").platforms) == {
                "linux/amd64": "sha256:" + "a" * 64
            }
        else:
            with pytest.raises(AttnimgError, match="has no digest") as caught:
                resolve_tag(f"{server.host}/python:3.11")
            assert caught.value.why == "it redirects more than 5 times"


@pytest.mark.parametrize(
    "name", ["lib/x", "lib/x:\u00e9", "lib/x:1@sha256:" + "0" * 64, "../x:1", "lib//x:1", "x:1?a"]
)
def test_a_reference_of_another_form_is_refused_before_anything_is_asked(name: str) -> None:
    with pytest.raises(AttnimgError) as caught:
        resolve_tag(f"127.0.0.1:{free_port()}/{name}")
    assert "needed registry/name:tag" in caught.value.why


def test_a_registry_that_is_not_there_is_unreachable() -> None:
    with pytest.raises(UnreachableError, match=r"127[.]0[.]0[.]1:.*refused"):
        resolve_tag(f"127.0.0.1:{free_port()}/python:3.11")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_lock_writes_digests_and_leaves_the_rest(checkout: Path) -> None:
    path = checkout / "recipes/bases.toml"
    before = path.read_text().splitlines()
    digests = {
        name: f"sha256:{sign * 64}" for name, sign in (("linux/amd64", "1"), ("linux/arm64", "2"))
    }
    found = TagDigests("sha256:" + "3" * 64, digests)
    (line,) = lock_bases(RECIPES, root=checkout, resolve=lambda _: found)
    assert f"is now {found.digest}, for linux/amd64 linux/arm64" in line
    changed = [
        new for old, new in zip(before, path.read_text().splitlines(), strict=True) if old != new
    ]
    assert [text.partition(" = ")[0] for text in changed] == ["digest", "platforms"]
    base = read_recipes(checkout).bases["bookworm"]
    assert (base.digest, dict(base.platforms)) == (found.digest, digests)
    (line,) = lock_bases(read_recipes(checkout), root=checkout, resolve=lambda _: found)
    assert f"has {found.digest}" in line


def test_lock_without_a_network_changes_nothing_and_says_so(checkout: Path) -> None:
    def unreachable(reference: str) -> TagDigests:
        raise UnreachableError("docker.io: no route")

    before = (checkout / "recipes/bases.toml").read_bytes()
    (line,) = lock_bases(RECIPES, root=checkout, resolve=unreachable)
    assert (
        line == "docker.io/library/python:3.11-slim-bookworm stays unresolved: docker.io: no route"
    )
    assert (checkout / "recipes/bases.toml").read_bytes() == before
