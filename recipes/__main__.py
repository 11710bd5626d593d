"""`python -m recipes`: render files from the recipes, solve, check, lock, gate, publish."""

from __future__ import annotations

import datetime
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from attnimg.errors import AttnimgError
from recipes.facts import Plan
from recipes.files import write_all
from recipes.pages.built import FOLDER as BUILT
from recipes.pages.built import codes_found, images_table, listed, read_records, record, with_table
from recipes.pages.checkpoints_page import RECORD as RELOAD
from recipes.pages.config_keys_page import TEXTS as CONFIG_KEYS
from recipes.pages.families_page import RECORD as FAMILIES
from recipes.pages.gpu_runs import faults, read_notes, read_run, read_runs, runs_page
from recipes.read.recipes import read_recipes
from recipes.render import model_classes, positions
from recipes.rendered import drifted, rendered
from recipes.solve.lock import lock_all, read_locks
from recipes.solve.plan import refuse_unresolved, solve, solve_all
from recipes.solve.sources import have_sources

ROOT = Path(__file__).resolve().parent.parent

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)
Root = Annotated[Path, typer.Option("--root", help="The checkout to work on.")]
Name = Annotated[str, typer.Argument(metavar="IMAGE", help="A file of recipes/images.")]


@app.command()
def render(root: Root = ROOT) -> None:
    """Write every file that is generated from the recipes."""
    for path in write_all(root, _texts(root)):
        typer.echo(f"render: wrote {path}")


@app.command()
def check(root: Root = ROOT) -> None:
    """Check that the images can be built and that the generated files are up to date."""
    if paths := drifted(_texts(root), root=root):
        raise AttnimgError(
            "generated files are not what the recipes say",
            why="differ: " + ", ".join(paths),
            do="make render, and commit what it writes",
            code="drift",
            exit_code=1,
        )


@app.command()
def classes(root: Root = ROOT) -> None:
    """List the causal language models of transformers, and what they don't support."""
    version = metadata.version("transformers")
    classes_text = model_classes.classes_toml(model_classes.model_classes(), transformers=version)
    causal_text = model_classes.causal_toml(model_classes.causal_types(), transformers=version)
    positions_text = positions.positions_toml(*positions.position_tables(), transformers=version)
    files = {
        model_classes.PATH: classes_text,
        model_classes.CAUSAL_PATH: causal_text,
        positions.PATH: positions_text,
    }
    for path in write_all(root, files):
        typer.echo(f"classes: wrote {path}")


@app.command(name="solve")
def solve_command(
    names: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...")] = None,
    root: Root = ROOT,
) -> None:
    """Print an image's contents, or why it can't be built and which similar image can."""
    for name in names or list(read_recipes(root).images):
        _print(_plan(name, root))


@app.command()
def lock(root: Root = ROOT) -> None:
    """Resolve the packages of every image again, with hashes."""
    for path in lock_all(solve_all(read_recipes(root)), root=root):
        typer.echo(f"lock: wrote {path}")


@app.command()
def sources(
    name: Name,
    clones: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Git clones to read, no network.")
    ] = None,
    root: Root = ROOT,
) -> None:
    """Fetch the git trees that the image's kernels are built from, to build/sources."""
    for tree in have_sources(_plan(name, root), root=root, clones=clones):
        typer.echo(f"sources: {tree.relative_to(root)}")


@app.command()
def gate(
    name: Name,
    archive: Annotated[
        Path | None, typer.Option(help="What `docker save` writes, or an OCI archive.")
    ] = None,
    unpacked: Annotated[Path | None, typer.Option(help="An unpacked image, a folder.")] = None,
    wheels: Annotated[Path | None, typer.Option(help="A wheelhouse, alone or with one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    root: Root = ROOT,
) -> None:
    """Check a finished image or wheelhouse by all gates; exit with 1 if one fails."""
    # Imported here, since `make lock` runs before their dependencies are installed.
    from recipes.judge import gate_artifact, report, report_json

    plan = _plan(name, root)
    if archive and unpacked:
        raise AttnimgError(
            "two images are given",
            why=f"found --archive {archive} and --unpacked {unpacked}, needed one at most",
            do="judge one after the other",
        )
    artifact, verdicts = gate_artifact(
        plan, read_recipes(root), image=archive or unpacked, wheels=wheels, root=root
    )
    typer.echo((report_json if as_json else report)(name, artifact, verdicts))
    if any(verdict.findings for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def built(
    name: Name,
    wheels: Annotated[Path, typer.Option(help="The wheelhouse that was built.")],
    machine: Annotated[str, typer.Option(help="What it was built on, in general words.")],
    root: Root = ROOT,
) -> None:
    """Record the contents of a wheelhouse in docs/built/NAME.json, for the tables of images."""
    from recipes.artifact.read import read_wheelhouse

    _plan(name, root)
    artifact = read_wheelhouse(wheels, over=None, say=lambda _: None)
    manifest = listed(artifact, image=name)
    day = datetime.date.today().isoformat()
    codes, earlier = codes_found(artifact), read_records(root).get(name, {})
    text = record(manifest, codes, day=day, machine=machine, earlier=earlier)
    for path in write_all(root, {f"{BUILT}/{name}.json": text}):
        typer.echo(f"built: wrote {path}")
    render(root)


@app.command(name="gpu-run")
def gpu_run(
    file: Annotated[Path, typer.Argument(help="What tests/gpu/day.py wrote.")],
    all_right: Annotated[
        bool, typer.Option("--all-right", help="Refuse a run in which a unit failed.")
    ] = False,
) -> None:
    """Print the report of one run; exit with 1 if its records are not complete."""
    records = read_run(file)
    typer.echo(runs_page({file.stem: records}))
    if found := faults(records, all_right=all_right):
        raise AttnimgError(
            f"the records of {file} are not complete",
            why="\n".join(found),
            do="run tests/gpu/day.py to its end, with a larger --budget or fewer --steps",
            code="incomplete-run",
            exit_code=1,
        )


@app.command()
def publish(name: Name, root: Root = ROOT) -> None:
    """Exit with 0 if an image may be published: none of its values is unresolved."""
    refuse_unresolved(_plan(name, root))


def _texts(root: Path) -> dict[str, str]:
    recipes = read_recipes(root)
    plans = solve_all(recipes)
    runners = (root / "recipes/runners.toml").read_text(encoding="utf-8")
    families = (root / FAMILIES).read_text(encoding="utf-8")
    reload = (root / RELOAD).read_text(encoding="utf-8")
    locks = read_locks(plans, root=root)
    config_keys = (root / CONFIG_KEYS).read_text(encoding="utf-8")
    built = read_records(root)
    texts = rendered(
        plans, recipes, locks=locks, runners=runners, families=families, reload=reload,
        config_keys=config_keys, built=built,
    )  # fmt: skip
    readme = (root / "README.md").read_text(encoding="utf-8")
    readme = with_table(readme, images_table(plans, built))
    runs = runs_page(read_runs(root), read_notes(root))
    return {**texts, "docs/gpu-runs.md": runs, "README.md": readme}


def _plan(name: str, root: Path) -> Plan:
    recipes = read_recipes(root)
    if name not in recipes.images:
        raise AttnimgError(
            f"there is no image {name!r}",
            why=f"found {name!r}; known: {', '.join(recipes.images)}",
            do=f"name one of these, or write recipes/images/{name}.toml",
            code="unknown-image",
        )
    return solve(recipes.images[name], recipes)


def _print(plan: Plan) -> None:
    typer.echo(f"{plan.image.name}: {plan.abi} for {' '.join(plan.image.archs)}")
    for step in plan.steps:
        built = f"code {' '.join(step.codes)}" if step.codes else "no machine code of its own"
        typer.echo(f"  {step.kernel.name} {step.kernel.version}: {built}, key {step.key}")
        if step.prebuilt:
            typer.echo(f"    taken prebuilt, not built: {step.prebuilt.source}")
    for key, reason in plan.unresolved.items():
        typer.echo(f"  unresolved: {key}: {reason}")


def main() -> None:
    """Run the command line; print user errors without a traceback."""
    try:
        app()
    except AttnimgError as error:
        print(str(error).replace("attnimg:", "recipes:", 1), file=sys.stderr)  # noqa: T201 - stderr
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
