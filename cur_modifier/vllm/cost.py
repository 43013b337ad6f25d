"""What the products of a Linear cost: the numbers that they read, and how many products there are.

For few tokens at a time a product takes as long as reading its weight, and an additional product
takes as long as reading :data:`CHEAP_BYTES`. Two decisions follow, both from shapes alone:

- :func:`blocks` joins neighbouring products into one product with a block-diagonal matrix, where
  its zeros cost less than a product. The products that are served are joined by it, and
  :func:`cost` counts what it would join.
- :func:`save_too_little` says where one dense product is faster than the products of all factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["CHEAP_BYTES", "Chain", "Cost", "Factors", "blocks", "cost", "save_too_little"]

# Reading these costs no more than another product: one takes 12 µs on two cores, which read 400 KB
# in that time, and a GPU more.
CHEAP_BYTES = 400_000


class Factors(Protocol):
    """The factors that share one first factor, as far as their cost goes."""

    @property
    def rows(self) -> int:
        """Rows of the first factor."""

    def shapes(self) -> Sequence[Sequence[tuple[int, int]]]:
        """``(outputs, inputs)`` of the products after the first factor, chain by chain."""


@dataclass(frozen=True)
class Chain:
    """Products one after another, of which the first reads the entries ``start:stop`` of the first
    product's outputs.

    Attributes:
        shapes: ``(outputs, inputs)`` of each; empty where one is quantized, so that the chain
            cannot be joined with others.
    """

    start: int
    stop: int
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cost:
    """Numbers that products read, and how many products there are."""

    numbers: int
    products: int


def blocks(chains: Sequence[Chain], itemsize: int) -> list[slice]:
    """Plan which chains become one product with a block-diagonal matrix, as slices of ``chains``.

    Chains are joined where each is a single product, where they read adjacent entries, and where
    reading the block matrix's zeros costs less than a product.

    Args:
        itemsize: bytes of a number.
    """
    found: list[slice] = []
    above = (0, 0)  # the shape of the last block
    for index, chain in enumerate(chains):
        rows, columns = chain.shapes[0] if len(chain.shapes) == 1 else (0, 0)
        zeros = above[0] * columns + rows * above[1]
        if (
            all(above)
            and rows
            and chains[index - 1].stop == chain.start
            and zeros * itemsize <= CHEAP_BYTES
        ):
            found[-1] = slice(found[-1].start, index + 1)
            above = (above[0] + rows, above[1] + columns)
        else:
            found.append(slice(index, index + 1))
            above = (rows, columns)
    return found


def cost(stacks: Iterable[Sequence[Factors]], inputs: int, itemsize: int) -> Cost:
    """Count what all products of a Linear read where nothing is quantized.

    Args:
        stacks: its factors, grouped by the product that their first factors are stacked in.
        inputs: of the Linear on this rank.
        itemsize: bytes of a number.
    """
    numbers, products = 0, 0
    for stack in stacks:
        chains, start = [], 0
        for factors in stack:
            stop = start + factors.rows
            chains += [Chain(start, stop, tuple(shapes)) for shapes in factors.shapes()]
            start = stop
        numbers, products = numbers + start * inputs, products + 1
        for block in blocks(chains, itemsize):
            joined = chains[block]
            if len(joined) == 1:
                numbers += sum(rows * columns for rows, columns in joined[0].shapes)
                products += len(joined[0].shapes)
            else:
                rows, columns = (sum(chain.shapes[0][axis] for chain in joined) for axis in (0, 1))
                numbers, products = numbers + rows * columns, products + 1
    return Cost(numbers, products)


def save_too_little(
    stacks: Iterable[Sequence[Factors]], outputs: int, inputs: int, itemsize: int
) -> bool:
    """Whether one dense product would be faster than those of the factors, none of them quantized.

    Args:
        outputs, inputs: of the Linear on this rank.
        stacks, itemsize: as for :func:`cost`.
    """
    kept = cost(stacks, inputs, itemsize)
    saved = (outputs * inputs - kept.numbers) * itemsize
    return saved < (kept.products - 1) * CHEAP_BYTES
