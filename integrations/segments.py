"""The mask of a shifted window as segments: which positions belong to the same part of the image."""

import torch
from torch import Tensor

from .derived import Derived, readable

_ids: Derived[Tensor] = Derived()
_partitions: Derived[bool] = Derived()


def segment_ids(mask: Tensor, keep: bool = True) -> Tensor:
    """Ids `(windows, N)`, int32, of a mask `(windows, N, N)`, equal where it is 0: the first position of each part.

    `keep` them for the next call with this mask.
    """

    def make() -> Tensor:
        return (mask == 0).to(torch.uint8).argmax(-1).to(torch.int32)

    return make() if not keep or torch.compiler.is_compiling() else _ids.get(mask, [mask], None, make)


def is_partition(mask: Tensor) -> bool:
    """Whether a mask is 0 within the parts of a window and -100 or less between them, as those of the hosts are."""

    def look() -> bool:
        ids = segment_ids(mask)
        apart = ids[:, :, None] != ids[:, None, :]
        return bool((torch.where(apart, mask <= -100, mask == 0)).all())

    # A compiler cannot branch on values, and need not: a mask by another hand does not come through a host's model.
    return torch.compiler.is_compiling() or not readable(mask) or _partitions.get(mask, [mask], None, look)
