"""Checks that several places share. They read shapes, dtypes and devices, never values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import DeviceError, DtypeError, ShapeError, UnsupportedError

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def check_broadcast(name: str, tensor: Tensor, wanted: Sequence[int], meaning: str) -> None:
    """Raise `ShapeError` unless `tensor` broadcasts to the shape `wanted`, which `meaning` names."""
    shape = tensor.shape
    missing = len(wanted) - len(shape)
    # Not with `in`, which fails in the compiler of torch 2.7 where lengths are symbols.
    if missing < 0 or any(size != 1 and size != target for size, target in zip(shape, wanted[missing:], strict=True)):
        raise ShapeError(
            f"{name} of shape {tuple(shape)}",
            f"a shape that broadcasts to {meaning} = {tuple(wanted)}",
            f"give {name} the dimensions {meaning}; batch and head dimensions may be 1 or missing",
        )


def check_last(name: str, tensor: Tensor, sizes: Sequence[int], meaning: str) -> None:
    """Raise `ShapeError` unless the last dimensions of `tensor` have just these sizes."""
    if tensor.dim() < len(sizes) or tuple(tensor.shape[-len(sizes) :]) != tuple(sizes):
        raise ShapeError(
            f"{name} of shape {tuple(tensor.shape)}",
            f"last dimensions {meaning} = {tuple(sizes)}",
            f"bring {name} to the lengths of query and key",
        )


def check_tensor(name: str, value: object) -> None:
    """Raise `DtypeError` unless `value` is a tensor, `UnsupportedError` for a sparse or nested one."""
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name} of type {type(value).__name__}", "a torch.Tensor", f"pass torch.as_tensor({name})")
    if value.layout is not torch.strided or value.is_nested:
        raise UnsupportedError(
            f"{name} of layout {'nested' if value.is_nested else value.layout}",
            "a dense tensor",
            f"pass {name}.to_dense(), or pad what is nested and name its lengths by KeyPadding",
        )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise `DeviceError` unless `tensor` lies on the device of query."""
    if tensor.device != device:
        raise DeviceError(
            f"{name} on {tensor.device}", f"the device of query, {device}", f"move it with .to({str(device)!r})"
        )


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise `DtypeError` unless `tensor` has a real floating dtype."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise DtypeError(f"{name} of dtype {tensor.dtype}", "a floating dtype", f"pass {name}.float()")


def check_integer(name: str, tensor: Tensor) -> None:
    """Raise `DtypeError` unless `tensor` has an integer dtype."""
    check_tensor(name, tensor)
    if tensor.dtype not in INTEGERS:
        raise DtypeError(f"{name} of dtype {tensor.dtype}", "an integer dtype", f"pass {name}.int()")
