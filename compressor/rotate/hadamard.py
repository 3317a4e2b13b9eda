"""Orthogonal matrices that spread a vector over all its coordinates, as products that are cheap to apply.

A Hadamard matrix has entries +1 and -1 and orthogonal rows. Those of order 2^a follow from Sylvester's doubling; of order q + 1 (q a prime, 3 modulo
4) and 2 (q + 1) (q a prime, 1 modulo 4) from Paley's construction with the quadratic residues modulo q; products of orders from Kronecker products. A
width w = 2^a m, m odd, gets the smallest order m 2^b that one of them makes, times Sylvester's of the rest. Where there is none (as for m = 43), an
orthogonal matrix of m drawn at random takes its place: still all coordinates are mixed, only not evenly.

Signs drawn at random come first: x -> (x * signs) Q. So no fixed direction, such as the mean, ends up in one coordinate (QuaRot, arXiv 2404.00456,
section 3.1). A matrix of width w is kept as factors of at most SIDE, so that applying it costs far less than w products a number.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 64  # of a factor of Sylvester's; a square of it covers 4096 in two products
ROWS = 1 << 22  # numbers that are float64 at a time


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix Q = diag(signs) (F1 x F2 x ...), x the Kronecker product, of factors float64 [m, m]; signs float64 [width]."""

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def width(self) -> int:
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """x float64 [rows, width] -> x Q."""
        out = (x * self.signs.to(x.device)).reshape(len(x), *(len(factor) for factor in self.factors))
        for factor in self.factors:
            out = torch.tensordot(out, factor.to(x.device), dims=([1], [0]))  # the axis in front goes, and comes back behind
        return out.reshape(len(x), self.width)

    def matrix(self) -> Tensor:
        """Q, float64 [width, width]."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))


@torch.no_grad()
def turn(weight: Tensor, rotation: Rotation | None, gain: Tensor | None = None, out: Tensor | None = None) -> None:
    """weight [n, k] <- (weight * gain) Q, gain [k], in place or into `out`; computed in float64 and rounded once, to float32 or narrower.

    A transposed view turns the rows: turn(w.T, Q) is w <- Q^T w.
    """
    target = weight if out is None else out
    for rows in _panels(*weight.shape):
        part = weight[rows].double()
        part = part if gain is None else part * gain.double()
        target[rows] = (part if rotation is None else rotation.apply(part)).float().to(target.dtype)


def _panels(n: int, k: int) -> Iterator[slice]:
    step = max(1, ROWS // k)
    return (slice(start, start + step) for start in range(0, n, step))


def randomised(width: int, generator: torch.Generator) -> Rotation:
    """Signs and, where a factor has to be drawn, its numbers come from the generator."""
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    odd, twos = width, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    factors = []
    if odd > 1:
        used = next((b for b in range(2, twos + 1) if order(odd << b)), 0)
        factors.append(paley(odd << used) / math.sqrt(odd << used) if used else orthogonal(odd, generator))
        twos -= used
    side = SIDE.bit_length() - 1
    factors += [sylvester(1 << min(side, twos - done)) / math.sqrt(1 << min(side, twos - done)) for done in range(0, twos, side)]
    return Rotation(signs, tuple(factors) or (torch.ones(1, 1, dtype=torch.float64),))


def exact(width: int) -> bool:
    """Whether `randomised` of this width is a Hadamard matrix."""
    odd = width // (width & -width)
    return odd == 1 or any(order(odd << b) for b in range(2, (width & -width).bit_length()))


def orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix float64 [width, width], uniformly at random: Q of a QR decomposition with a positive diagonal of R."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def sylvester(width: int) -> Tensor:
    """The Hadamard matrix of a power of two, entries +1 and -1."""
    out = torch.ones(1, 1, dtype=torch.float64)
    while len(out) < width:
        out = torch.cat((torch.cat((out, out), 1), torch.cat((out, -out), 1)))
    return out


def order(width: int) -> int:
    """The prime of Paley's construction of this width: width - 1 by the first, width / 2 - 1 by the second, or 0 if there is none."""
    if width % 4 == 0 and _prime(width - 1):
        return width - 1
    return width // 2 - 1 if width % 4 == 0 and (width // 2 - 1) % 4 == 1 and _prime(width // 2 - 1) else 0


def paley(width: int) -> Tensor:
    """A Hadamard matrix, entries +1 and -1, of a width that has an `order`."""
    q = order(width)
    places = torch.arange(q)
    residue = torch.full((q,), -1.0, dtype=torch.float64)
    residue[(places * places) % q] = 1.0
    residue[0] = 0.0
    core = residue[(places.unsqueeze(1) - places) % q]  # [q, q], Jacobsthal's
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[1:, 1:], bordered[0, 1:] = core, 1.0
    if q == width - 1:  # antisymmetric
        bordered[1:, 0] = -1.0
        return bordered + torch.eye(q + 1, dtype=torch.float64)
    bordered[1:, 0] = 1.0
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(bordered, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)


def _prime(number: int) -> bool:
    return number > 1 and all(number % each for each in range(2, math.isqrt(number) + 1))
