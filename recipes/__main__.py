"""`python -m recipes`: render files from the recipes, solve, check, lock, gate, scan, release."""

from __future__ import annotations

import datetime
import errno
import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from attnimg.errors import AttnimgError
from attnimg.files import data_file
from attnimg.selection.gpus_and_images import cpu_name
from recipes.bump import commit_bumps, find_bumps
from recipes.cves import grype_config, refuse_expired, refuse_wrong_cves
from recipes.facts import ImagePlan, Recipes, on_all_platforms
from recipes.files import write_all
from recipes.package_index import PackageIndex
from recipes.pages import built, gpu_runs
from recipes.pages.model_pages import FAMILIES_RECORD, RELOAD_RECORD
from recipes.read import read_recipes
from recipes.release import page as release_page
from recipes.release.repository import find_repository, read_registry
from recipes.render.transformers_models import model_lists
from recipes.render_all import outdated_files, render_files
from recipes.scan import refuse_findings, scan
from recipes.solve.lock import lock_all, pinned_versions, read_locks
from recipes.solve.plan import solve, solve_all
from recipes.solve.sources import fetch_sources

ROOT = Path(__file__).resolve().parent.parent


def render(arguments: Namespace) -> None:
    """Write every file that is generated from the recipes."""
    _write(arguments, _render_all(arguments.root))


def check(arguments: Namespace) -> None:
    """Check that the images can be built and that the generated files are up to date."""
    if paths := outdated_files(_render_all(arguments.root), root=arguments.root):
        raise AttnimgError(
            "generated files are out of date",
            why="they differ from what the recipes generate: " + ", ".join(paths),
            do="make render, and commit the files that it writes",
            code="drift",
            exit_code=1,
        )
    recipes = read_recipes(arguments.root)
    plans = solve_all(recipes)
    locks = read_locks(plans, root=arguments.root)
    pins = {
        pin
        for plan in on_all_platforms(plans)
        for pin in pinned_versions(plan, lock=locks[plan.name]).items()
    }
    refuse_wrong_cves(recipes.cves, pins=pins)


def classes(arguments: Namespace) -> None:
    """List the causal language models of transformers, and what they don't support."""
    _write(arguments, model_lists())


def print_plans(arguments: Namespace) -> None:
    """Print an image's contents, or why it can't be built and the nearest image that can."""
    recipes = read_recipes(arguments.root)
    for name in arguments.names or recipes.images:
        for plan in on_all_platforms([_plan(name, recipes)]):
            _print(f"{name}: {plan.abi} for {' '.join(plan.image.archs)} on {plan.platform}")
            for step in plan.steps:
                code = f"code {' '.join(step.codes)}" if step.codes else "no machine code"
                _print(f"  {step.kernel.name} {step.kernel.version}: {code}, key {step.key}")
                if step.prebuilt:
                    _print(f"    not built, uses the public wheel {step.prebuilt.source}")
            for key, reason in plan.unresolved.items():
                _print(f"  unresolved: {key}: {reason}")


def lock(arguments: Namespace) -> None:
    """Resolve the base's digest, unresolved wheels of torch, and all packages, with hashes."""
    # Imported here: what asks registries is needed for nothing else.
    from recipes.solve.bases import lock_bases
    from recipes.solve.torch_wheels import lock_torch_wheels

    for line in lock_bases(read_recipes(arguments.root), root=arguments.root):
        _print(f"lock: {line}")
    plans = solve_all(read_recipes(arguments.root))
    for line in lock_torch_wheels(plans, root=arguments.root, env=os.environ):
        _print(f"lock: {line}")
    for path in lock_all(solve_all(read_recipes(arguments.root)), root=arguments.root):
        _print(f"lock: wrote {path}")


def sources(arguments: Namespace) -> None:
    """Fetch the git trees that the image's kernels are built from, to build/sources."""
    root = arguments.root
    plan = _plan(arguments.name, read_recipes(root))
    for tree in fetch_sources(plan, root=root, clones=arguments.clones):
        _print(f"sources: {tree.relative_to(root)}")


def gate(arguments: Namespace) -> None:
    """Check a finished image or wheelhouse by all gates; exit with 1 if one fails."""
    # Imported here, since `make lock` runs before their dependencies are installed.
    from recipes.run_gates import check_artifact, format_json, format_report

    recipes = read_recipes(arguments.root)
    plan = _plan_for_platform(arguments.name, recipes)
    if arguments.archive and arguments.unpacked:
        raise AttnimgError(
            "two images are given",
            why=f"found --archive {arguments.archive} and --unpacked {arguments.unpacked}, "
            "needed at most one",
            do="check one after the other",
        )
    artifact, results = check_artifact(
        plan,
        recipes,
        image=arguments.archive or arguments.unpacked,
        wheels=arguments.wheels,
        root=arguments.root,
        child=arguments.child,
        layout=arguments.layout,
    )
    _print((format_json if arguments.json else format_report)(plan.name, artifact, results))
    if any(result.findings for result in results):
        sys.exit(1)


def record_build(arguments: Namespace) -> None:
    """Record the contents of a wheelhouse in docs/built/IMAGE.json, for the tables of images."""
    from recipes.artifact.read import read_wheelhouse

    root = arguments.root
    plan = _plan_for_platform(arguments.name, read_recipes(root))
    artifact = read_wheelhouse(arguments.wheels, over=None, log=lambda _: None)
    text = built.build_record(
        built.read_manifest(artifact, image=plan.image.name),
        built.list_codes(artifact),
        day=datetime.date.today().isoformat(),
        machine=arguments.machine,
        earlier=built.read_records(root).get(plan.name, {}),
    )
    _write(arguments, {f"{built.FOLDER}/{plan.name}.json": text})
    render(arguments)


def scan_packages(arguments: Namespace) -> None:
    """Scan an image's Python packages for known vulnerabilities; exit with 3 if that can't be."""
    root = arguments.root
    recipes = read_recipes(root)
    plan = _plan_for_platform(arguments.name, recipes)
    findings = scan(
        plan,
        recipes.cves,
        lock=read_locks((plan,), root=root)[plan.name],
        pip_audit=arguments.pip_audit,
        today=datetime.date.today(),
    )
    for finding in findings:
        if cve := finding.answer:
            _print(f"  {finding}\n    {cve.status} until {cve.expires}: {cve.reason}")
    refuse_findings(arguments.name, findings)
    _print(f"scan: {arguments.name} has no known vulnerability without an answer")


def print_grype_config(arguments: Namespace) -> None:
    """Print the configuration with which grype accepts what recipes/cves.toml answers."""
    cves = read_recipes(arguments.root).cves
    refuse_expired(cves, today=datetime.date.today())
    _print(json.dumps(grype_config(cves), indent=1))


def bump(arguments: Namespace) -> None:
    """Make a commit of each pin that has a newer release on the package index."""
    root, today = arguments.root, datetime.date.today()
    lock = (root / "requirements/lock.txt").read_text(encoding="utf-8")
    recipes = read_recipes(root)
    packages = PackageIndex(base=solve_all(recipes)[0].base)
    bumps = find_bumps(recipes, packages, lock=lock, pin=arguments.pin)
    if arguments.dry_run or not bumps:
        for found in bumps:
            _print(f"bump: {found}, in {found.file}")
        _print(f"bump: {len(bumps)} pins have a newer release")
        return
    failed = []
    for subject, error in commit_bumps(bumps, root, relock=_make_lock, today=today):
        _print(f"bump: {'left out: ' if error else ''}{subject}")
        failed += [f"{subject}: {error}"] if error else []
    if failed:
        raise AttnimgError(
            f"{len(failed)} of {len(bumps)} pins were not bumped",
            why="\n".join(failed),
            do="bump them by hand: correct the recipe, and make lock",
            code="not-bumped",
            exit_code=1,
        )


def _make_lock(root: Path, package: str) -> None:
    # -o: a changed pyproject.toml must not install .venv again.
    command = ["make", "-C", str(root), "-o", ".venv/ready", "lock"]
    command += [*([f"UPGRADE={package}"] if package else [])]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise AttnimgError(
            "make lock failed",
            why="\n".join(process.stderr.strip().splitlines()[-5:]),
            do="make lock, and correct what it reports",
            code="no-lock",
            exit_code=1,
        )


def index(arguments: Namespace) -> None:
    """Write a wheelhouse as a package index of static files."""
    from recipes.wheel_index import write_index

    _plan(arguments.name, read_recipes(arguments.root))
    found = write_index(arguments.name, arguments.wheels, arguments.to, base_url=arguments.base_url)
    _print(f"index: {len(found)} wheels in {arguments.to}/simple")


def gpu_run(arguments: Namespace) -> None:
    """Print the report of one run on a GPU; exit with 1 if its records are not complete."""
    records = gpu_runs.read_run(arguments.file)
    _print(gpu_runs.runs_page({arguments.file.stem: records}))
    if found := gpu_runs.find_faults(records, all_right=arguments.all_right):
        raise AttnimgError(
            f"the records of {arguments.file} are not complete",
            why="\n".join(found),
            do="run tests/gpu/suite.py to its end, with a larger --budget or fewer --steps",
            code="incomplete-run",
            exit_code=1,
        )


def release(arguments: Namespace) -> None:
    """Build an image, run the gates, push, test, sign, verify and tag it, or run one of these."""
    from recipes.release import command

    recipes = read_recipes(arguments.root)
    plan = _plan_for_platform(arguments.name, recipes)
    _print(command.release(plan, recipes, step=arguments.step, root=arguments.root, env=os.environ))


def verify(arguments: Namespace) -> None:
    """Verify an image of the registry, by its digest or tag, with no record of its release."""
    from recipes.release import command

    name, root, env = arguments.name, arguments.root, os.environ
    _plan(name, read_recipes(root))
    tag = arguments.tag or ""
    _print(command.verify(name, arguments.digest, tag=tag, root=root, env=env))


def pull(arguments: Namespace) -> None:
    """Pull an image from the registry by its digest; print its reference."""
    from recipes.release import command

    root = arguments.root
    _plan(arguments.name, read_recipes(root))
    _print(command.pull(arguments.name, arguments.digest, root=root, env=os.environ))


def registry(arguments: Namespace) -> None:
    """Print the registry and namespace that images are published to: REGISTRY, or the recipe's."""
    _print(find_repository(arguments.root, os.environ).registry)


def _render_all(root: Path) -> dict[str, str]:
    """Return every generated file: path -> text."""

    def read(path: str) -> str:
        return (root / path).read_text(encoding="utf-8")

    recipes = read_recipes(root)
    plans = solve_all(recipes)
    records = built.read_records(root)
    texts = render_files(
        plans,
        recipes,
        locks=read_locks(plans, root=root),
        runners=read("recipes/runners.toml"),
        families=read(FAMILIES_RECORD),
        reload=read(RELOAD_RECORD),
        # Of the installed package, whose schema it describes.
        config_keys=data_file("config_keys.toml").read_text("utf-8"),
        built=records,
    )
    readme = built.replace_table(read("README.md"), "images", built.images_table(plans, records))
    releases, where = read(release_page.PAGE), read_registry(root)
    releases = built.replace_table(releases, "published", release_page.published_part(where))
    releases = built.replace_table(releases, "verify", release_page.verify_part(where))
    page = gpu_runs.runs_page(gpu_runs.read_runs(root), gpu_runs.read_notes(root))
    generated = {"docs/gpu-runs.md": page, "README.md": readme, release_page.PAGE: releases}
    return texts | generated


def _plan(name: str, recipes: Recipes) -> ImagePlan:
    """Plan one image; raise if there is none of that name."""
    if name not in recipes.images:
        raise AttnimgError(
            f"there is no image {name!r}",
            why=f"found {name!r}; known: {', '.join(recipes.images)}",
            do=f"name one of these, or write recipes/images/{name}.toml",
            code="unknown-image",
        )
    return solve(recipes.images[name], recipes)


def _plan_for_platform(name: str, recipes: Recipes) -> ImagePlan:
    """Plan one image for PLATFORM; without it for this machine's, or the image's first.

    Raises:
        AttnimgError: there is no such image, or it is not built for PLATFORM (code "no-platform").
    """
    plan, asked = _plan(name, recipes), os.environ.get("PLATFORM", "")
    plans = {one.platform: one for one in on_all_platforms([plan])}
    if asked and asked not in plans:
        raise AttnimgError(
            f"the image {name} is not built for {asked}",
            why=f"found PLATFORM={asked}; recipes/images/{name}.toml has {', '.join(plans)}",
            do=f"set PLATFORM={plan.platform}",
            code="no-platform",
        )
    here = asked or f"linux/{cpu_name(os.uname().machine)}"
    return next((one for key, one in plans.items() if key == here), plan)


def _write(arguments: Namespace, texts: dict[str, str]) -> None:
    for path in write_all(arguments.root, texts):
        _print(f"{arguments.command}: wrote {path}")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _parser() -> ArgumentParser:
    """Return the parser of the command line; `run` is the function of the command."""
    parser = ArgumentParser(prog="recipes", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[Namespace], None], *, image: bool = False) -> ArgumentParser:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.add_argument("--root", type=Path, default=ROOT, help="the checkout to work on")
        if image:
            command.add_argument("name", metavar="IMAGE", help="a file of recipes/images")
        command.set_defaults(run=run)
        return command

    add("render", render)
    add("check", check)
    add("classes", classes)
    add("solve", print_plans).add_argument("names", metavar="IMAGE", nargs="*")
    add("lock", lock)
    command = add("sources", sources, image=True)
    command.add_argument(
        "--from", dest="clones", metavar="DIR", type=Path, help="git clones to read, no network"
    )
    command = add("gate", gate, image=True)
    command.add_argument("--archive", type=Path, help="from `docker save`, or an OCI archive")
    command.add_argument("--child", action="store_true", help="the archive is made FROM the image")
    command.add_argument("--unpacked", type=Path, help="the folder of an unpacked image")
    command.add_argument("--wheels", type=Path, help="a wheelhouse, with or without an image")
    command.add_argument("--layout", type=Path, help="write the image there as it will be pushed")
    command.add_argument("--json", action="store_true", help="write JSON")
    command = add("built", record_build, image=True)
    command.add_argument("--wheels", type=Path, required=True, help="the wheelhouse")
    command.add_argument("--machine", required=True, help="the build machine, in general words")
    command = add("gpu-run", gpu_run)
    command.add_argument("file", type=Path, help="the file that tests/gpu/suite.py wrote")
    command.add_argument(
        "--all-right", action="store_true", help="refuse a run in which a unit failed"
    )
    command = add("scan", scan_packages, image=True)
    command.add_argument("--pip-audit", type=Path, required=True, help="the program")
    add("grype-config", print_grype_config)
    command = add("bump", bump)
    command.add_argument("pin", metavar="PIN", nargs="?", default="", help="one package only")
    command.add_argument("--dry-run", action="store_true", help="list newer releases only")
    command = add("index", index, image=True)
    command.add_argument("--wheels", type=Path, required=True, help="the wheelhouse")
    command.add_argument("--to", type=Path, required=True, help="the folder of the index")
    command.add_argument("--base-url", default="", help="where the files will be")
    command = add("release", release, image=True)
    command.add_argument(
        "--step", choices=("push", "test", "attest", "verify", "promote"), help="this one only"
    )
    command = add("verify", verify, image=True)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--digest", help="sha256:...")
    which.add_argument("--tag", help="of the registry")
    command = add("pull", pull, image=True)
    command.add_argument("digest", metavar="DIGEST", help="sha256:...")
    add("registry", registry)
    return parser


def main() -> None:
    """Run the command line; print user errors without a traceback."""
    arguments = _parser().parse_args()
    try:
        arguments.run(arguments)
    except AttnimgError as error:
        _exit(error)
    except OSError as error:
        if error.errno not in _OF_THE_USER:
            raise
        _exit(
            AttnimgError(
                f"{arguments.command} can't use a file",
                why=str(error),
                do="correct its owner and permissions, or free space there; a command that was run "
                "with sudo leaves files of root",
                code="local",
                exit_code=1,
            )
        )


# Faults with a file that are no faults of this program.
_OF_THE_USER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def _exit(error: AttnimgError) -> NoReturn:
    sys.stderr.write(str(error).replace("attnimg:", "recipes:", 1) + "\n")
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
