"""Links of all pages lead somewhere, and the commands that pages name exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from markdown_pages import Page, broken_links, missing_paths, read_page

from attnimg.__main__ import COMMANDS
from attnimg.selection.gpus_and_images import image_catalogue

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = {name for names in re.findall(r"^([\w./%-][^:=\n]*):(?!=)", MAKEFILE, re.M)
           for name in names.split()}  # fmt: skip
IMAGES = {name for image in image_catalogue().values() for name in (image.name, *image.aliases)}
# Images with compilers; they have no gates and no wheels of their own.
BAKE = json.loads((ROOT / "docker/docker-bake.json").read_text(encoding="utf-8"))
DEVEL = {name.replace("_", "-") for name in BAKE["target"] if name.endswith("_devel")}
# What pages write where a reader puts the name of an image.
PLACEHOLDERS = {"NAME", "TAG", "%"}


def wrong_commands(page: Page) -> list[str]:
    """Return the commands, targets and images of a page that do not exist."""
    wrong = []
    for program, words in page.commands:
        plain = [word for word in words if not word.startswith("-")]
        if program == "attnimg":
            wrong += [f"attnimg {name}" for name in plain[:1] if name not in COMMANDS]
        else:
            wrong += [f"make {target}" for target in plain if not is_target(target)]
    for tag, word in page.images:
        if tag not in IMAGES | PLACEHOLDERS | DEVEL | {"NAME-devel"}:
            wrong.append(f"attnimg:{tag}")
        if word and word not in {*COMMANDS, "python", "bash"}:
            wrong.append(f"attnimg:{tag} {word}")
    return wrong


def is_target(name: str) -> bool:
    """Return whether the Makefile has a target, and, after a slash, the image exists."""
    stem, _, image = name.partition("/")
    known = image in IMAGES | PLACEHOLDERS or (stem in ("build", "test", "run") and image in DEVEL)
    return name in TARGETS or (f"{stem}/%" in TARGETS and known)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_commands_exist(path: Path) -> None:
    page = read_page(path.read_text(encoding="utf-8"))
    assert broken_links(path, page, root=ROOT) == []
    assert wrong_commands(page) == []
    assert missing_paths(page, root=ROOT) == []


def test_pages_have_links_and_commands() -> None:
    pages = [read_page(path.read_text(encoding="utf-8")) for path in PAGES]
    assert len(PAGES) > 25
    assert sum(len(page.links) for page in pages) > 60
    assert sum(len(page.commands) for page in pages) > 60
    assert sum(len(page.paths) for page in pages) > 60
    assert sum(len(page.images) for page in pages) > 5


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        pytest.param("[a](other.md)", [], id="a page"),
        pytest.param("[a](other.md#the-second-title)", [], id="a heading"),
        pytest.param("[a](#here)\n\n# Here", [], id="a heading of the page itself"),
        pytest.param("[a](other.md#x-1)", [], id="an anchor that is written as HTML"),
        pytest.param("[a](https://example.com/no.md)", [], id="another site"),
        pytest.param("`[a](no.md)`", [], id="code"),
        pytest.param("[a](no.md)", ["no.md"], id="no such page"),
        pytest.param("[a](other.md#third)", ["other.md#third"], id="no such heading"),
        pytest.param("[a](#here)", ["#here"], id="no such heading of the page itself"),
        pytest.param("![a](no.png)", ["no.png"], id="no such picture"),
        pytest.param('<img src="no.png">', ["no.png"], id="no such picture in HTML"),
        pytest.param("| [a](no.md) |\n|---|", ["no.md"], id="a link in a table"),
        pytest.param("[a](../../x.md)", ["../../x.md"], id="out of the repository"),
    ],
)
def test_a_broken_link_is_found(tmp_path: Path, text: str, broken: list[str]) -> None:
    (tmp_path / "other.md").write_text('# First\n\n## The *second* title!\n\n<a id="x-1"></a>\n')
    path = tmp_path / "page.md"
    path.write_text(text)
    assert broken_links(path, read_page(text), root=tmp_path) == broken


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        pytest.param("make lock render check", [], id="targets"),
        pytest.param('make run/cpu ARGS="train x.yaml"  # or', [], id="a target of an image"),
        pytest.param("ATTACK_SEED=1 make attack", [], id="a variable before it"),
        pytest.param(".venv/bin/attnimg explain x.yaml --on h100", [], id="a command"),
        pytest.param("attnimg --help", [], id="an option alone"),
        pytest.param("docker run --rm attnimg:ada doctor", [], id="an image by its alias"),
        pytest.param("make rendr", ["make rendr"], id="no such target"),
        pytest.param("make build/hoper", ["make build/hoper"], id="no such image"),
        pytest.param("make build/cpu-devel", [], id="an image with compilers"),
        pytest.param("make gate/cpu-devel", ["make gate/cpu-devel"], id="it has no gates"),
        pytest.param("make build/rocm-devel", ["make build/rocm-devel"], id="rocm has none"),
        pytest.param("attnimg explian x", ["attnimg explian"], id="no such command"),
        pytest.param("docker run \\\n  attnimg:hoper train", ["attnimg:hoper"], id="a wrong tag"),
        pytest.param("docker run attnimg:cpu trian x", ["attnimg:cpu trian"], id="in an image"),
    ],
)
def test_a_command_that_does_not_exist_is_found(code: str, wrong: list[str]) -> None:
    assert wrong_commands(read_page(f"text\n\n```bash\n{code}\n```\n")) == wrong
    if "\n" not in code:
        assert wrong_commands(read_page(f"Run `{code}` now.")) == wrong


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        pytest.param("`docs/a.md`, `docs/`, `docs/*.md`", [], id="a file, a folder, a pattern"),
        pytest.param("`docs/<name>.md` `docs` `x/b.md`", [], id="other code"),
        pytest.param("`docs/b.md`", ["docs/b.md"], id="no such file"),
        pytest.param("`docs/*.toml`", ["docs/*.toml"], id="no file of a pattern"),
    ],
)
def test_a_path_that_does_not_exist_is_found(tmp_path: Path, text: str, missing: list[str]) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").touch()
    assert missing_paths(read_page(text), root=tmp_path) == missing


def test_the_site_has_every_page() -> None:
    def pages(nav: object) -> set[str]:
        if isinstance(nav, str):
            return {nav}
        return set().union(
            *(pages(one) for one in (nav.values() if isinstance(nav, dict) else nav))
        )

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert pages(nav) == {path.name for path in (ROOT / "docs").glob("*.md")}
