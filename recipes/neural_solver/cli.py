"""`flashbias neural-solver`: data, training, times and scale of the neural solver. Each prints a line of JSON last."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Train and time the neural PDE solver with spatial distances.", no_args_is_help=True)

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default a GPU if there is one.")]
Out = Annotated[Path | None, typer.Option(help="Folder; by default recipes/results and the device's name.")]
Seed = Annotated[int, typer.Option(help="Of weights and data.")]
Layers = Annotated[int, typer.Option(min=1, help="Of the model; 8 in the library's scripts.")]
Checkout = Annotated[Path | None, typer.Option(help="A checkout of Neural-Solver-Library.")]


@app.command()
def elasticity_data(
    folder: Annotated[Path, typer.Argument(help="What run.py is given as --data_path.")],
    samples: Annotated[int, typer.Option(min=1, help="Meshes of 972 points.")] = 1200,
    seed: Seed = 0,
) -> None:
    """Solve plane-stress problems on perforated plates, unless the folder has such data: 0.2 to 0.5 s for a sample."""
    from .elasticity_data import files, prepare

    made = prepare(folder, samples, seed)
    print(json.dumps({"folder": str(files(folder)[0].parent), "made": made}))


@app.command()
def car_data(
    folder: Annotated[Path, typer.Argument(help="What run.py is given as --data_path.")],
    bodies: Annotated[int, typer.Option(min=9, help="Bodies, dealt out to nine folds.")] = 18,
    seed: Seed = 0,
) -> None:
    """Make car-like bodies of 32,186 points with a made-up flow, in the form of the library's preprocessed data."""
    from .car_data import prepare

    prepare(folder, bodies, seed)
    print(json.dumps({"folder": str(folder), "bodies": bodies}))


@app.command()
def checkout(folder: Annotated[Path, typer.Argument(help="Its top folder.")]) -> None:
    """Say whether a folder is a checkout of Neural-Solver-Library; exit code 2, and why not, where it is none."""
    from flashbias.integrations.neural_solver import find

    print(json.dumps({"checkout": str(find(folder))}))


@app.command()
def stand_ins(folder: Annotated[Path, typer.Argument(help="To be put on PYTHONPATH.")]) -> None:
    """Write empty packages for requirements of run.py that are not installed and that elasticity does not use."""
    from .stand_ins import write

    print(json.dumps({"folder": str(folder), "packages": write(folder)}))


@app.command()
def elasticity(
    data: Annotated[Path, typer.Argument(help="A folder with data, real or made by elasticity-data.")],
    variant: Annotated[list[str] | None, typer.Option(help="Names, repeated; three by default.")] = None,
    train: Annotated[int, typer.Option(min=1, help="Samples to train on.")] = 500,
    test: Annotated[int, typer.Option(min=1, help="Samples to evaluate on.")] = 100,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the samples.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Samples in an iteration.")] = 4,
    layers: Layers = 8,
    hidden: Annotated[int, typer.Option(min=8, help="Width of the model, 8 heads.")] = 128,
    seed: Seed = 0,
    checkout: Checkout = None,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Train on elasticity from one seed: exact in fp32, with the library's half-precision factors, and with flashbias.

    With --checkout also the library's own model, stock (on a GPU) and patched. Writes elasticity.csv and .png.
    Exit code 1: a variant failed.
    """
    from dataclasses import replace

    from flashbias.integrations.neural_solver import find
    from flashbias.recipes.machine import choose_device

    from . import pictures, training
    from .model import ELASTICITY
    from .rows import load

    device = choose_device(device)
    folder = _folder(out, device)
    names = variant or list(training.DEFAULT)
    if checkout is not None:
        find(checkout)
    if checkout is not None and not variant:
        names += [training.PATCHED] + ([training.STOCK] if device.startswith("cuda") else [])
    shape = replace(ELASTICITY, layers=layers, hidden=hidden)
    plan = training.Plan(data, shape, train, test, epochs, batch, seed=seed, checkout=checkout)
    failures = training.run(plan, names, device, folder, _say)
    rows = load(folder / "elasticity.csv") if (folder / "elasticity.csv").exists() else []
    if rows:
        _say(str(pictures.elasticity(folder)))
    _end({"results": training.summary(rows), "failures": failures}, bool(failures))


@app.command()
def car(
    points: Annotated[int, typer.Option(min=16, help="Of the body.")] = 32186,
    variant: Annotated[list[str] | None, typer.Option(help="Names, repeated; all by default.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="inference, training; both by default.")] = None,
    layers: Layers = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 5,
    repository: Annotated[
        Path | None, typer.Option(help="A checkout of FlashBias or Neural-Solver-Library, for the paper's kernel.")
    ] = None,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time the car model with ours, the paper's kernel, FlexAttention and cuDNN, each checked against exact fp32.

    Writes car.csv and car.png. Exit code 1: ours failed or is not accurate.
    """
    from flashbias.recipes.machine import choose_device

    from . import pictures, speed
    from .variants import OURS

    device = choose_device(device)
    folder = _folder(out, device)
    rows = speed.compare(
        points, variant or speed.PEERS, mode or speed.MODES, repository, layers, device, repeats, folder, _say
    )
    if any(row["status"] == "ok" for row in rows):
        _say(str(pictures.car(folder)))
    _end({"results": rows}, not all(row.get("accurate") for row in rows if row["variant"] == OURS))


@app.command()
def scale(
    points: Annotated[str, typer.Option(help="Numbers of points, by commas.")] = "32186,131072,524288,1048576",
    layers: Annotated[str, typer.Option(help="Numbers of layers, by commas.")] = "1,8",
    modes: Annotated[str, typer.Option(help="inference, training, by commas.")] = "inference,training",
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time, memory and share of the chip's limit at every size; rows of earlier runs stay. Writes scale.csv and .png.

    Beside each the first layer is checked on 64 rows: its outputs, in training the gradients of its weights.
    On an H200 an iteration of 8 layers takes minutes at 1,048,576 points: time grows with the square of the points.
    Exit code 1: a size failed or is not accurate.
    """
    from flashbias.recipes.machine import choose_device

    from . import pictures, speed

    device = choose_device(device)
    folder = _folder(out, device)
    sizes, depths = ([int(part) for part in text.split(",")] for text in (points, layers))
    rows = speed.scale(sizes, depths, modes.split(","), device, folder, _say)
    if any(row["status"] == "ok" for row in rows):
        _say(str(pictures.scale(folder)))
    _end({"results": rows}, not all(row.get("accurate") for row in rows))


@app.command()
def picture(
    points: Annotated[int, typer.Option(min=16, help="Of the body.")] = 8000,
    out: Annotated[Path, typer.Option(help="Folder.")] = Path(),
) -> None:
    """Draw the bias of three points of a car-like body towards all others: bias_on_car.png."""
    from . import pictures

    print(json.dumps({"picture": str(pictures.bias(out, points))}))


def _folder(out: Path | None, device: str) -> Path:
    from flashbias.recipes.machine import folder_name

    return out or Path("recipes", "results", folder_name(device))


def _say(text: str) -> None:
    import sys

    print(text, file=sys.stderr, flush=True)


def _end(result: dict[str, Any], failed: bool) -> None:
    print(json.dumps(result))
    raise typer.Exit(int(failed))
