"""What language models are given in tests: tokens, and masks of every kind."""

import torch

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
