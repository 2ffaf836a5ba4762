"""What language models are given in tests: tokens, and masks of every kind; and how large what they make of them is."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 61


def make_ids(batch: int, n: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, n), device=DEVICE)


def make_mask(kind: str | None, batch: int, n: int) -> torch.Tensor | None:
    """1 at tokens: padding on the left or the right, of another length in each row but the last, or holes."""
    if kind is None:
        return None
    mask = torch.ones(batch, n, dtype=torch.long, device=DEVICE)
    for row in range(batch - 1):
        if kind == "left":
            mask[row, : 2 + 3 * row] = 0
        elif kind == "right":
            mask[row, n - 2 - 3 * row :] = 0
        elif kind == "holes":
            mask[row, 1 + row :: 4] = 0
    return mask


MASKS = (None, "left", "right", "holes")

# How `generate()` is asked, also MPT, which has no cache unless it is. Small models soon write one word for ever: where
# no pair of words may come twice, each token hangs on what was read and written, and a difference would be seen.
GREEDY = {"do_sample": False, "use_cache": True}
PAIRS_ONCE = GREEDY | {"no_repeat_ngram_size": 2}
WRITING = {
    "greedy": GREEDY | {"max_new_tokens": 200},
    "no pair twice": PAIRS_ONCE | {"max_new_tokens": 200},
    "beams": PAIRS_ONCE | {"max_new_tokens": 60, "num_beams": 2},
}


class Operations(TorchDispatchMode):
    """How often each operation is called, by its name; those that return a view are `views` together."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.views = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.is_view or func.overloadpacket.__name__ == "_unsafe_view":
            self.views += 1
        else:
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """How many entries the largest tensor has that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *made])
        return result
