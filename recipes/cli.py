"""The command line, `flashbias`. Each subcommand imports what it needs when it runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flashbias.errors import FlashBiasError

from .language_model import commands as language_model
from .neural_solver.cli import app as neural_solver
from .protenix.commands import app as protenix

app = typer.Typer(
    help="Attention with an additive bias, and models that use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(neural_solver, name="neural-solver")
app.add_typer(protenix, name="protenix")


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the weights, and of the order of the images.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default a GPU if there is one.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the CSV and the pictures.")] = Path(),
    base: Annotated[
        bool | None, typer.Option("--base/--no-base", help="Measure SwinV2-B beside its peers; by default on a GPU.")
    ] = None,
) -> None:
    """Train a small SwinV2 on handwritten digits with timm's code, then evaluate it with timm's code and patched.

    A minute on two CPU cores. Writes demo.csv and demo.png; the last line of stdout is JSON. Exit code 1: the two
    evaluations differ.
    """
    from .demo import run

    raise typer.Exit(run(epochs, seed, device, out, base))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Say what is here: GPU, driver, torch, triton, whether the kernels run, and which hosts can be patched.

    Hosts are not imported. On a GPU a small kernel is compiled and run, the first time in a few seconds.
    """
    from .doctor import run

    run(as_json)


@app.command()
def bench(
    workload: Annotated[list[str] | None, typer.Option(help="Names, by commas or repeated; all by default.")] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(help="Names, or best (default: ours, no bias, the fastest known), safe (of one process), all."),
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help="fwd, fwdbwd; both by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default a GPU if there is one.")] = "auto",
    sizes: Annotated[str, typer.Option(help="full, which is for a GPU, or small; by the device by default.")] = "",
    lengths: Annotated[str, typer.Option(help="Lengths, by commas, at which to measure instead, for curves.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which everyone is timed in turn.")] = 3,
    warm: Annotated[
        int | None, typer.Option(min=0, help="Processes that measure first calls beforehand; 0: none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; by default recipes/results and the device's name.")] = None,
    flashbias_repo: Annotated[Path | None, typer.Option(help="A checkout of the paper's code.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random data.")] = 0,
    show: Annotated[bool, typer.Option("--list", help="Only list workloads and peers.")] = False,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Only draw the figures anew, from the results in --out.")
    ] = False,
) -> None:
    """Time attention with a bias beside its peers and beside attention without one, each result checked for accuracy.

    Some minutes on a GPU, one on a CPU, where sizes are small. Writes CSV and PNG; the last line of stdout is JSON.
    Exit code 1: a result of flashbias is wrong or missing.
    """
    from .bench import main as benchmark

    request = benchmark.Request(
        workload or [], peers or [], mode or [], device, sizes, lengths, repeats, seed, warm, out, flashbias_repo
    )
    if show:
        benchmark.listing(request)
    elif redraw:
        print(*benchmark.redraw(request), sep="\n")
    else:
        raise typer.Exit(benchmark.run(request))


app.add_typer(language_model.app, name="language-model")


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="A Python file; with -m, a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS...", help="Left to the script.")] = None,
    patch: Annotated[list[str] | None, typer.Option(metavar="NAME[,NAME...]", help="Integrations to apply.")] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as for `python -m`.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare each layer's first call with the host's.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print the time in each patched layer at the end.")
    ] = False,
) -> None:
    """Run a script, unmodified, with patches on: flashbias run --patch swin_v2 -- main.py --eval ...

    Exit code, arguments and tracebacks are those of the script.
    """
    from .run import Launch, Program, switch_on

    if script == "-m" and arguments:  # behind --
        module, script = True, arguments.pop(0)
    program = Program(script, tuple(arguments or ()), module).check()
    # In the environment, so that processes that the script starts see it too.
    if verify:
        os.environ["FLASHBIAS_VERIFY"] = "first"
    if profile:
        os.environ["FLASHBIAS_PROFILE"] = "1"
    switch_on([name.strip() for name in ",".join(patch or []).split(",") if name.strip()])
    raise Launch(program)


def main() -> None:
    """Entry point: a refusal by flashbias is a message and exit code 2, not a traceback."""
    from .run import Launch

    excepthook = sys.excepthook
    try:
        app()
        return
    except FlashBiasError as error:
        print(f"flashbias: {error}", file=sys.stderr)
        sys.exit(2)
    except Launch as launch:
        program = launch.program
    sys.excepthook = excepthook  # typer puts its own there
    program.start()
