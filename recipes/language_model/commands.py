"""`flashbias language-model`: the subcommands."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Language models: ALiBi's speed and accuracy, whole models, and T5 in training.", no_args_is_help=True
)
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default a GPU if there is one.")]
Out = Annotated[Path | None, typer.Option(help="Folder; by default recipes/results and the device's name.")]

LENGTHS = "256,1024,4096,16384,32768,65536"


@app.command()
def speed(
    lengths: Annotated[str, typer.Option(help="Lengths, by commas.")] = LENGTHS,
    peers: Annotated[list[str] | None, typer.Option(help="As of flashbias bench.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="fwd, fwdbwd; both by default.")] = None,
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which everyone is timed in turn.")] = 2,
    out: Out = None,
    flashbias_repo: Annotated[Path | None, typer.Option(help="A checkout of the paper's code.")] = None,
) -> None:
    """GPT-2-sized attention with ALiBi, causal, over the length: `flashbias bench` on that workload.

    50 heads of head dim 32, as in the paper. Writes bench_sweep_fwd.csv and bench_sweep_fwdbwd.csv with their curves.
    """
    from flashbias.recipes.bench import main as benchmark

    chosen = peers or ["flashbias", "cudnn-none", "sdpa-none", "sdpa-dense", "flex", "flash-attn-2", "paper"]
    request = benchmark.Request(
        ["gpt2-alibi"], chosen, mode or [], device, "", lengths, repeats, out=out, repo=flashbias_repo
    )
    raise typer.Exit(benchmark.run(request))


@app.command()
def accuracy(
    text: Annotated[Path | None, typer.Option(help="A text; by default Python's standard library's sources.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training; 600 on a GPU, 60 on a CPU.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Train a small GPT with ALiBi by torch's attention and by ours, and with factors in half precision.

    Perplexity is that of held-out text at 1, 2, 4 and 8 times the length of training. Writes language_model_loss.csv,
    language_model_perplexity.csv and language_model.png; the last line of stdout is JSON. Exit code 1: the losses of
    the first two differ.
    """
    from .accuracy import run

    raise typer.Exit(run(text, steps, seed, device, out))


@app.command()
def models(
    model: Annotated[list[str] | None, typer.Option(help="bloom-560m, mpt-7b, falcon-rw-1b, tiny-...; all.")] = None,
    lengths: Annotated[str, typer.Option(help="Of the prompt, by commas.")] = "2048,4096,8192,16384,32768,65536",
    decode: Annotated[int, typer.Option(help="Keys in the cache while decoding; 0: no decoding.")] = 32768,
    path: Annotated[Path | None, typer.Option(help="Weights of the one model that is named; random without.")] = None,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Prefill time and memory, and decoded tokens a second, of models in transformers, stock and patched.

    Beside them the same patched model with torch's attention without any bias, which is wrong, and the bound. Writes
    language_model_models.csv row by row; exit code 1: ours is less accurate than the host.
    """
    from .models import run

    raise typer.Exit(run(model or [], [int(word) for word in lengths.split(",")], decode, path, device, out))


@app.command()
def generate(
    model: Annotated[list[str] | None, typer.Option(help="As of models, t5-large and tiny-t5; all large ones.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="To write, for each of five prompts.")] = 200,
    layers: Annotated[int, typer.Option(min=0, help="Of random weights; 0: as many as the model has.")] = 0,
    path: Annotated[Path | None, typer.Option(help="Weights of the one model that is named; random without.")] = None,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """What models write to five prompts with padding, token for token beside the host's own code in fp32.

    In fp32 all tokens have to be the same; in half precision ours and the host's own are counted up to the first that
    differs. Writes language_model_generate.csv row by row; exit code 1: a token in fp32 differs.
    """
    from .generate import run

    raise typer.Exit(run(model or [], tokens, layers, path, device, out))


@app.command()
def t5(
    size: Annotated[str, typer.Option(help="t5-large, or tiny-t5.")] = "t5-large",
    lengths: Annotated[str, typer.Option(help="Tokens, by commas.")] = "4096",
    batch: Annotated[int, typer.Option(min=1, help="Rows of so many tokens.")] = 1,
    compiled: Annotated[bool, typer.Option(help="All of them through torch.compile.")] = False,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """A T5 encoder forward and back, the gradient of its position bias included, stock and patched.

    Beside them the same patched model with torch's attention without any bias, which is wrong, and the bound. Writes
    language_model_t5.csv row by row; exit code 1: ours is less accurate than the host.
    """
    from .t5 import run

    raise typer.Exit(run(size, [int(word) for word in lengths.split(",")], batch, compiled, device, out))
