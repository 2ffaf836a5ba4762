"""The command line, `flashbias`. Each subcommand imports what it needs when it runs."""

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


@app.callback()
def flashbias() -> None:
    """Keeps `demo` a subcommand while there is only one."""


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


def main() -> None:
    """Entry point: a refusal by flashbias is a message and exit code 2, not a traceback."""
    try:
        app()
    except FlashBiasError as error:
        print(f"flashbias: {error}", file=sys.stderr)
        sys.exit(2)
