"""What is computed from a module's weights, and is valid until they change."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """One value per module, kept beside the module: not in its state dict, its pickle or its copies.

    A value is made anew when one of the tensors that it was made from is another tensor, lies elsewhere, or has been
    written to (`load_state_dict`, `.to`, an optimizer's step, `copy_`). Writes through `.data` leave no trace in torch:
    call `forget` after them.
    """

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[torch.nn.Module, tuple[Any, T]] = WeakKeyDictionary()

    def get(self, module: torch.nn.Module, tensors: Sequence[Tensor], key: Hashable, make: Callable[[], T]) -> T:
        """The value for these tensors and this key; `make()` computes it."""
        if not all(readable(tensor) and not tensor.is_inference() for tensor in tensors):
            return make()
        # The tensors themselves are held, so that no other can get the identity of one of them.
        state = [(tensor, tensor._version, tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        # Nobody waits for another stream to finish making the value.
        stream = next((torch.cuda.current_stream(t.device).cuda_stream for t in tensors if t.is_cuda), None)
        entry = self._entries.get(module)
        if entry is not None:
            known, value = entry
            if known[1:] == (key, stream) and _same(known[0], state):
                return value
        # A tensor made in inference mode could not take part in autograd later.
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        self._entries[module] = ((state, key, stream), value)
        return value

    def forget(self, module: torch.nn.Module) -> None:
        """Drop a module's value."""
        self._entries.pop(module, None)

    def __contains__(self, module: torch.nn.Module) -> bool:
        return module in self._entries


def readable(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at: it is no fake, wrapped or distributed one, and no capture is on."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type in ("cpu", "cuda")
    return plain and not _capturing()


def _capturing() -> bool:
    """While a CUDA graph is captured: its replays would read a kept value's memory after that was given back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _same(known: list[tuple[Any, ...]], state: list[tuple[Any, ...]]) -> bool:
    return len(known) == len(state) and all(
        old[0] is new[0] and old[1:] == new[1:] for old, new in zip(known, state, strict=True)
    )
