"""``secateur reproduce``: the papers' experiments, each run recorded and resumable, and the page of the records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.numbers import numbers
from secateur.cli.progress import Progress
from secateur.cli.refusals import check_place, errors, plain_endings
from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.recipes.images import Images
    from secateur.recipes.papers.recipe import Job, Recipe

__all__ = ["reproduce"]

#: Where records go, and where the page of them.
RESULTS, PAGE = Path("results/papers"), Path("docs/results.md")
#: Where checkpoints are kept: outside of the results.
WORK = Path("runs/papers")


@plain_endings
def reproduce(  # noqa: PLR0913, PLR0917 - one argument for each option
    experiment: Annotated[
        str, typer.Argument(help="mnist-mlp, mnist-lenet5, cifar-resnet20 or cifar-wrn; none with --report.")
    ] = "",
    recipe: Annotated[str, typer.Option(help="paper: as published; ours: free to be better.")] = "ours",
    method: Annotated[
        list[str] | None, typer.Option(help="Gate method, can be repeated; all of the recipe's without it.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds with commas between.")] = "0,1,2",
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Share of parameters (CIFAR: MACs) to keep, can be repeated; the recipe's own without it."),
    ] = None,
    lambdas: Annotated[
        str, typer.Option(help="Weights of the L0 norm of each gated layer, commas between, for --recipe paper.")
    ] = "",
    validate: Annotated[
        bool, typer.Option("--validate", help="Judge on a part of the training images; test images stay untouched.")
    ] = False,
    data_dir: Annotated[Path | None, typer.Option(help="Directory that holds the data set's files.")] = None,
    results: Annotated[Path, typer.Option(help="Directory of the records.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Directory of the checkpoints.")] = WORK,
    device: Annotated[str, typer.Option(help="Device to train on, as torch names it.")] = "cpu",
    report: Annotated[bool, typer.Option("--report", help="Write the page of all records, and train nothing.")] = False,
    page: Annotated[Path, typer.Option(help="The page that --report writes.")] = PAGE,
) -> None:
    """Train an experiment of the papers with every method, size and seed asked for; what is recorded is kept."""
    if report:
        _report(results, page)
        return
    from secateur.recipes.data import load
    from secateur.recipes.memory import keep_memory
    from secateur.recipes.papers.experiments import recipe_of

    found = recipe_of(experiment, recipe)
    jobs = _jobs(found, method, seeds, budget, lambdas, validate)
    check_place(results / "record.json")
    keep_memory()
    if left := [job for job in jobs if not _done(job, results)]:
        images = load(found.data, data_dir).to(device)
        for job in left:
            _run(job, images, results, work)


def _jobs(
    recipe: Recipe, methods: list[str] | None, seeds: str, budgets: list[float] | None, lambdas: str, validated: bool
) -> list[Job]:
    from secateur.recipes.papers.recipe import Job, Point

    if budgets and lambdas:
        raise SecateurError("got --budget and --lambdas; a size is asked for by one of them")
    points = recipe.points
    if budgets:
        on_macs = recipe.points[0].keep_macs is not None or recipe.data != "mnist"
        points = tuple(Point(keep_macs=share) if on_macs else Point(keep_params=share) for share in budgets)
    if lambdas:
        points = (Point(lambdas=numbers(lambdas, "--lambdas", float)),)
    from_seeds = numbers(seeds, "--seeds", int)
    # All methods with a seed before the next seed: a table of each size is there as soon as possible.
    return [
        Job(recipe, name, point, seed, validated)
        for point in points
        for seed in from_seeds
        for name in methods or recipe.methods
    ]


def _done(job: Job, results: Path) -> bool:
    """Whether there is a record of the job, made with the recipe as it is now."""
    from secateur.recipes.papers.result import is_of, read_result

    path = results / f"{job.title}.json"
    if not path.exists():
        return False
    if other := is_of(read_result(path), job):
        errors().print(f"{path}: was made with {other}; it is trained again and replaced")
        return False
    errors().print(f"{path}: done before", style="dim")
    return True


def _run(job: Job, images: Images, results: Path, work: Path) -> None:
    from secateur.recipes.papers.report import one_line
    from secateur.recipes.papers.result import log_text, write_result
    from secateur.recipes.papers.run import run
    from secateur.recipes.record import write_text

    errors().print(job.title)
    with Progress(errors()) as progress:
        result, epochs = run(job, images, work, progress)
    write_text(results / f"{job.title}.log", log_text(epochs))
    write_result(results / f"{job.title}.json", result)
    typer.echo(one_line(result))


def _report(results: Path, page: Path) -> None:
    from secateur.recipes.papers.picture import picture
    from secateur.recipes.papers.report import collected, page_of

    found, notes = collected(results)
    for note in notes:
        errors().print(note)
    if not found:
        raise SecateurError(f"{results}: holds no record of a recipe as it is now; expected *.json of this command")
    check_place(page)
    drawing = page.with_name(f"{page.stem}.svg")
    picture(found, drawing)
    from secateur.recipes.record import write_text

    write_text(page, page_of(found, notes, drawing.name))
