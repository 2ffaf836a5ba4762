"""Who is measured: ours and its peers, and where each of them is to be found."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flashbias.errors import FlashBiasError

from . import adapters, third_party
from .adapters import Tensors
from .problem import Problem, Ready
from .workloads import Workload

OURS = "flashbias"
BASELINES = ("cudnn-none", "flash-none", "efficient-none", "sdpa-none")  # the first that works is what taxes are of


class BenchError(FlashBiasError, ValueError):
    """The benchmark is asked for something that there is not."""


@dataclass(frozen=True)
class Peer:
    """A peer: its adapter and what is known of it.

    biased: it adds the bias; those that do not are what a tax is measured by.
    cuda: it needs a GPU. module: what has to be installed. missing: what else is not there.
    compiles: its first call in an empty cache takes seconds.
    isolated: it runs in a process of its own, since an error in a kernel takes down the process that it happens in.
    deterministic: it runs under torch's deterministic switch.
    """

    name: str
    adapter: Callable[[Problem, Tensors, bool], Ready]
    biased: bool = True
    cuda: bool = True
    module: str | None = None
    missing: str | None = None
    compiles: bool = False
    isolated: bool = False
    deterministic: bool = False

    def absent(self, device: str) -> str | None:
        """Why the peer is not there, or None."""
        if self.cuda and not device.startswith("cuda"):
            return "needs a GPU"
        if self.module is not None and not _installed(self.module):
            return f"{self.module} is not installed"
        return self.missing


def registry(repo: Path | None) -> dict[str, Peer]:
    """All peers by name. `repo` is a checkout of the paper's code.

    Raises `BenchError` where the checkout does not hold it.
    """
    if repo is not None and third_party.find(repo) is None:
        raise BenchError(
            f"no flash_bias_triton.py in {repo}", "a checkout of github.com/thuml/FlashBias", "name its top folder"
        )
    no_repo = None if repo else "no checkout is named with --flashbias-repo"
    cudnn, flash, efficient = "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"
    peers = (
        Peer(OURS, adapters.flashbias, cuda=False, compiles=True),
        Peer(f"{OURS}-deterministic", adapters.flashbias, cuda=False, compiles=True, deterministic=True),
        Peer("cudnn-none", partial(adapters.sdpa, cudnn), biased=False),
        Peer("flash-none", partial(adapters.sdpa, flash), biased=False),
        Peer("efficient-none", partial(adapters.sdpa, efficient), biased=False),
        Peer("sdpa-none", partial(adapters.sdpa, None), biased=False, cuda=False),
        Peer("cudnn-concat", partial(adapters.sdpa_concat, cudnn)),
        Peer("flash-concat", partial(adapters.sdpa_concat, flash)),
        Peer("sdpa-concat", partial(adapters.sdpa_concat, None), cuda=False),
        Peer("cudnn-dense", partial(adapters.sdpa_dense, cudnn)),
        Peer("efficient-dense", partial(adapters.sdpa_dense, efficient)),
        Peer("sdpa-dense", partial(adapters.sdpa_dense, None), cuda=False),
        Peer("flex", adapters.flex, cuda=False, compiles=True),
        Peer("compile", adapters.compiled, cuda=False, compiles=True),
        Peer("xformers", third_party.xformers, module="xformers", isolated=True),
        Peer("flash-attn-2", third_party.flash_attn_2, module="flash_attn", isolated=True),
        Peer("flash-attn-3", third_party.flash_attn_3, module="flash_attn_interface", isolated=True),
        Peer("flash-attn-4", third_party.flash_attn_4, module="flash_attn.cute", isolated=True),
        Peer("cuequivariance", third_party.cuequivariance, module="cuequivariance_torch", isolated=True),
        Peer("trifast", third_party.trifast, module="trifast", isolated=True),
        Peer("paper", partial(third_party.paper, repo), missing=no_repo, isolated=True),
    )
    return {peer.name: peer for peer in peers}


def choose(names: Sequence[str], workload: Workload, device: str, peers: dict[str, Peer]) -> list[str]:
    """Peers for a workload, from their names and those of groups, each once.

    best: ours, no bias, and on a GPU the peer that was fastest in an earlier measurement, else what needs no compiler.
    safe: all that run in one process. all: all.

    Raises `BenchError` for another name.
    """
    on_gpu = device.startswith("cuda")
    groups = {
        "best": [OURS, "cudnn-none", workload.best] if on_gpu else [OURS, "sdpa-none", "sdpa-concat", "sdpa-dense"],
        "safe": [name for name, peer in peers.items() if not peer.isolated and not peer.absent(device)],
        "all": list(peers),
    }
    chosen: list[str] = []
    for name in names:
        if name not in groups and name not in peers:
            raise BenchError(f"--peers {name}", "some of " + ", ".join((*groups, *peers)), "see flashbias bench --list")
        chosen += groups.get(name, [name])
    return list(dict.fromkeys(chosen))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of what it is a part of
        return False
