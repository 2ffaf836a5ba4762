"""What every bias is: a matrix for the oracle, and terms for the kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from flashbias.terms import Problem, Term


class Bias(ABC):
    """An additive bias of the attention scores. Add biases with `+`.

    A new kind is a subclass with the two methods below; nothing else needs to know of it.
    """

    @abstractmethod
    def dense(
        self, n_q: int, n_k: int, *, offset: int | Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The bias as a matrix that broadcasts to `(*batch, H, n_q, n_k)`, computed in `dtype`.

        `offset` is that of the causal diagonal (see `Causal`), `n_k - n_q` by default. For tests and pictures:
        attention itself never calls it.
        """

    @abstractmethod
    def terms(self, problem: Problem) -> Iterable[Term]:
        """The bias in terms of the kernels, whose sum is `dense(problem.n_q, problem.n_k)`.

        Raises a `FlashBiasError` where the bias does not fit the problem.
        """

    def parts(self) -> Iterator[Bias]:
        """The biases of which this one is the sum."""
        yield self

    def __add__(self, other: Bias) -> Bias:
        return Sum(self, other) if isinstance(other, Bias) else NotImplemented

    def __radd__(self, other: object) -> Bias:
        """As `sum` begins: with 0."""
        return self if other == 0 else NotImplemented


class Sum(Bias):
    """The sum of biases, as `a + b` makes it."""

    def __init__(self, *biases: Bias) -> None:
        self.biases = tuple(part for bias in biases for part in bias.parts())

    def parts(self) -> Iterator[Bias]:
        yield from self.biases

    def dense(
        self, n_q: int, n_k: int, *, offset: int | Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        matrices = [bias.dense(n_q, n_k, offset=offset, dtype=dtype) for bias in self.biases]
        total = matrices[0]
        for matrix in matrices[1:]:
            total = total + matrix
        return total

    def terms(self, problem: Problem) -> Iterable[Term]:
        return [term for bias in self.biases for term in bias.terms(problem)]
