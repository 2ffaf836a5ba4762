"""What is computed from a module's weights, and is valid until they change."""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class Derived(Generic[T]):
    """One value per tensor that owns it, kept beside the tensor: in no state dict, no pickle and no copy.

    A value is made anew when one of the tensors that it was made from is another tensor, lies elsewhere, or has been
    written to (`load_state_dict`, `.to`, an optimizer's step, `copy_`). Writes through `.data` or numpy, or by a fused
    optimizer whose step is compiled, leave no trace in torch: call `forget` after them.
    """

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()
        register_optimizer_step_post_hook(self._forget_stepped)

    def get(self, owner: Tensor, tensors: Sequence[Tensor], key: Hashable, make: Callable[[], T]) -> T:
        """The value for these tensors and this key; `make()` computes it, in every call where nothing can be kept."""
        if not keepable(tensors):
            return make()
        # Nobody waits for another stream to finish making the value.
        stream = next((torch.cuda.current_stream(t.device).cuda_stream for t in tensors if t.is_cuda), None)
        entry = self._entries.get(owner)
        if entry is not None:
            state, known, value = entry
            if known == (key, stream) and _same(state, tensors):
                return value
        # A tensor made in inference mode could not take part in autograd later.
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        self._entries[owner] = ([(weakref.ref(tensor), *_traits(tensor)) for tensor in tensors], (key, stream), value)
        return value

    def kept(self, owner: Tensor, tensors: Sequence[Tensor]) -> T | None:
        """The value that was made last, whatever its key, or None if the tensors have changed since."""
        entry = self._entries.get(owner)
        return entry[2] if entry is not None and keepable(tensors) and _same(entry[0], tensors) else None

    def forget(self, owner: Tensor) -> None:
        """Drop a tensor's value."""
        self._entries.pop(owner, None)

    def _forget_stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Fused optimizers write without a trace."""
        if torch.compiler.is_compiling() or not self._entries:
            return
        stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        for owner, (state, *_) in list(self._entries.items()):
            if any(id(reference()) in stepped for reference, *_ in state):
                self.forget(owner)


def keepable(tensors: Sequence[Tensor]) -> bool:
    """Whether torch would tell of changes to these tensors, and nothing reads a kept value behind our back."""
    return all(readable(tensor) and not tensor.is_inference() for tensor in tensors)


def readable(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at: no compiler runs, no capture is on, and it is a plain one."""
    if torch.compiler.is_compiling():
        return False
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type in ("cpu", "cuda")
    return plain and not _capturing()


def _capturing() -> bool:
    """While a CUDA graph is captured: its replays would read a kept value's memory after that was given back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _traits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor._version, tensor.data_ptr(), tensor.dtype


def _same(state: Sequence[tuple[Any, ...]], tensors: Sequence[Tensor]) -> bool:
    return len(state) == len(tensors) and all(
        reference() is tensor and tuple(traits) == _traits(tensor)
        for (reference, *traits), tensor in zip(state, tensors, strict=True)
    )
