"""`flashbias protenix ...`. Each subcommand imports what it needs when it runs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Protenix (AlphaFold 3), stock and patched.", no_args_is_help=True)

Cycles = Annotated[int, typer.Option(min=1, help="Of the trunk.")]
Steps = Annotated[int, typer.Option(min=1, help="Of the diffusion.")]
Samples = Annotated[int, typer.Option(min=1, help="Structures from one trunk.")]
Seed = Annotated[int, typer.Option(help="Of the noise; the same for every row.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="Only the first so many, or, beyond all, further copies.")]
Features = Annotated[
    Path | None, typer.Option("--input", help="Protenix' input as .json, or features as .npz; by default PDB 7wux.")
]
Checkpoint = Annotated[Path | None, typer.Option(help="Of the base model v1.0.0; by default weights are random.")]
Blocks = Annotated[int | None, typer.Option(min=1, help="Only so many of each stack: a dry run, no measurement.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default a GPU if there is one.")]
Out = Annotated[Path, typer.Option(help="Folder for the CSV and the picture.")]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def pred(context: typer.Context) -> None:
    """Predict structures as `protenix pred` does, with its arguments, and with the patch on."""
    from .pred import predict

    predict(context.args)


@app.command()
def compare(
    cycles: Cycles = 3,
    steps: Steps = 20,
    samples: Samples = 5,
    seed: Seed = 101,
    seeds: Annotated[int, typer.Option(min=1, help="How many, each with noise and random weights of its own.")] = 1,
    tokens: Tokens = None,
    features: Features = None,
    checkpoint: Checkpoint = None,
    blocks: Blocks = None,
    device: Device = "auto",
    out: Out = Path(),
) -> None:
    """Run the model stock and patched with the same noise: seconds by stage, memory, and how far the results differ.

    All against the torch kernel in fp32. Writes protenix_compare.csv; the last line of stdout is JSON. Exit code 1: the
    patch's coordinates are further away than 2 times what other chunks of rows do to the torch kernel's in fp32, or
    than the stock kernels' in bf16; with several seeds by more than two standard errors.
    """
    from .report import Request, Size, as_table, title
    from .report import compare as run

    size = Size(cycles, steps, samples, seed)
    rows, kept = run(Request(size, tokens, features, checkpoint, blocks, device, seeds=seeds, out=out))
    _show(as_table(rows, title(rows)))
    for promise, holds in kept.items():
        print(f"{promise}: {'not measured' if holds is None else 'yes' if holds else 'NO'}")
    print(json.dumps({"rows": str(out / "protenix_compare.csv"), **kept}))
    raise typer.Exit(0 if all(kept.values()) else 1)


@app.command()
def table(
    cycles: Cycles = 3,
    steps: Steps = 20,
    samples: Samples = 5,
    seed: Seed = 101,
    tokens: Tokens = None,
    features: Features = None,
    checkpoint: Checkpoint = None,
    blocks: Blocks = None,
    dtype: Annotated[str, typer.Option(help="bf16, as Protenix by default, or fp32.")] = "bf16",
    kernels: Annotated[str, typer.Option(help="Rows, by commas; others are compared with the first.")] = "all",
    device: Device = "auto",
    out: Out = Path(),
) -> None:
    """Time whole runs by Protenix' kernels, without any bias, and with the patch, each against the torch kernel's.

    Writes protenix_table.csv, row by row, and protenix_table.png; the last line of stdout is JSON. Exit code 1: the
    patched run failed.
    """
    from .report import KERNELS, Request, Size, as_table, title
    from .report import table as run

    chosen = _named(kernels, KERNELS, "--kernels")
    if dtype not in ("bf16", "fp32"):
        raise typer.BadParameter(f"{dtype}, wanted is bf16 or fp32", param_hint="--dtype")
    size = Size(cycles, steps, samples, seed)
    rows = run(Request(size, tokens, features, checkpoint, blocks, device, out=out), dtype, chosen)
    _show(as_table(rows, title(rows)))
    done = {row["variant"]: row["total_s"] for row in rows if row["status"] == "ok"}
    print(json.dumps({"rows": str(out / "protenix_table.csv"), "seconds": done}))
    raise typer.Exit(0 if "flashbias" in done or "flashbias" not in chosen else 1)


@app.command()
def profile(
    stages: Annotated[str, typer.Option(help="Of trunk, diffusion and confidence, by commas.")] = "all",
    kernels: Annotated[str, typer.Option(help="By commas.")] = "cuequivariance,flashbias",
    cycles: Cycles = 1,
    steps: Steps = 10,
    samples: Samples = 5,
    seed: Seed = 101,
    tokens: Tokens = None,
    features: Features = None,
    checkpoint: Checkpoint = None,
    blocks: Blocks = None,
    device: Device = "auto",
    out: Out = Path(),
) -> None:
    """Say where the time of a cycle, a diffusion step and the confidence head goes, by families of kernels.

    Writes protenix_profile.csv and protenix_profile.png; the last line of stdout is JSON. Exit code 1: nothing could be
    measured.
    """
    from .profile import as_table
    from .profile import profile as run
    from .report import KERNELS, Request, Size
    from .whole import STAGES

    wanted, chosen = _named(stages, STAGES, "--stages"), _named(kernels, KERNELS, "--kernels")
    path = out / "protenix_profile.csv"
    size = Size(cycles, steps, samples, seed)
    rows = run(Request(size, tokens, features, checkpoint, blocks, device, out=out), wanted, chosen, path)
    if rows:
        _show(as_table(rows))
    spent: dict[str, float] = {}
    for row in rows:
        name = f"{row['stage']}, {row['kernel']}"
        spent[name] = round(spent.get(name, 0.0) + row["ms"], 4)
    print(json.dumps({"rows": str(path), "milliseconds": spent}))
    raise typer.Exit(0 if rows else 1)


@app.command()
def sweep(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, by commas.")] = "256,512,768,1024,1536,2048",
    parts: Annotated[str, typer.Option(help="Of triangle, block and run, by commas.")] = "triangle,block,run",
    kernels: Annotated[str, typer.Option(help="Of Protenix, by commas; runs are compared with the first.")] = "all",
    cycles: Cycles = 1,
    steps: Steps = 10,
    samples: Samples = 5,
    seed: Seed = 101,
    features: Features = None,
    checkpoint: Checkpoint = None,
    blocks: Blocks = None,
    device: Device = "auto",
    out: Out = Path(),
) -> None:
    """Time triangle attention, a block of the Pairformer and whole runs over numbers of tokens.

    Writes protenix_sweep.csv, row by row, and protenix_sweep.png; the last line of stdout is JSON.
    """
    from .report import Request, Size
    from .sweep import PARTS
    from .sweep import sweep as run
    from .whole import PACKAGES

    wanted, chosen = _named(parts, PARTS, "--parts"), _named(kernels, PACKAGES, "--kernels")
    path = out / "protenix_sweep.csv"
    request = Request(Size(cycles, steps, samples, seed), None, features, checkpoint, blocks, device, out=out)
    rows = run(request, [int(number) for number in tokens.split(",")], wanted, path, chosen)
    print(json.dumps({"rows": str(path), "measured": sum(row["status"] == "ok" for row in rows)}))


def _named(text: str, known: Iterable[str], option: str) -> list[str]:
    """The names in the text of an option, by commas; "all" are all of the known ones."""
    known = list(known)
    named = known if text == "all" else text.split(",")
    if not set(named) <= set(known):
        raise typer.BadParameter(f"{text}, wanted are {', '.join(known)}", param_hint=option)
    return named


def _show(table: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # nobody's window, where the table would be broken
        console = Console(width=130)
    console.print(table)
