"""The command line, `flashbias`. Each subcommand imports what it needs when it runs."""

import os
import sys
from typing import Annotated

import typer

from flashbias.errors import FlashBiasError

app = typer.Typer(
    help="Attention with an additive bias, and models that use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the weights, and of the order of the images.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default a GPU if there is one.")] = "auto",
) -> None:
    """Train a small SwinV2 on handwritten digits with timm's code, then evaluate it with timm's code and patched.

    A minute on two CPU cores. The last line of stdout is JSON. Exit code 1: the two evaluations differ.
    """
    from .demo import run

    raise typer.Exit(run(epochs, seed, device))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Say what is here: GPU, driver, torch, triton, whether the kernels run, and which hosts can be patched.

    Hosts are not imported. On a GPU a small kernel is compiled and run, the first time in a few seconds.
    """
    from .doctor import run

    run(as_json)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="A Python file; with -m, a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS...", help="Left to the script.")] = None,
    patch: Annotated[str, typer.Option(metavar="NAME[,NAME...]", help="Integrations to apply.")] = "",
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as for `python -m`.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare each patched layer with the host's code.")] = False,
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
    for wanted, variable in ((verify, "FLASHBIAS_VERIFY"), (profile, "FLASHBIAS_PROFILE")):
        if wanted:
            os.environ[variable] = "1"  # processes that the script starts see it too
    switch_on([name.strip() for name in patch.split(",") if name.strip()])
    raise Launch(program)


def main() -> None:
    """Entry point: a refusal by flashbias is a message and exit code 2, not a traceback."""
    from .run import Launch

    program, excepthook = None, sys.excepthook
    try:
        app()
    except FlashBiasError as error:
        print(f"flashbias: {error}", file=sys.stderr)
        sys.exit(2)
    except Launch as launch:
        program = launch.program
    sys.excepthook = excepthook  # typer puts its own there
    program.start()
