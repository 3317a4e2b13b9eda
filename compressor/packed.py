"""A packed weight: integer codes, and the numbers that turn a code into a weight.

Quantizers choose codes and values, tuners move values, exporters write both; codes never change after packing. In memory the codes lie in the
kernels' tile64x256 layout (see kernels/layout.py); on disk every format has its own stream, reached through `codes()`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import ModelError, RecipeError
from compressor.kernels import layout, reference


@dataclass(frozen=True)
class Affine:
    """weight = scale * (code - zero).

    scale [n, G], in the dtype it is stored in; zero uint8 [n, G] with 0 <= zero < 2**bits, or None for symmetric weights, whose zero is the
    midpoint 2**(bits-1) everywhere.
    """

    scale: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True)
class PackedWeight:
    """Codes of `bits` bits for a weight of `shape` (n out features, k in features), with one scale per `group` columns of a row."""

    words: Tensor  # int32, tile64x256
    values: Affine
    bits: int
    group: int
    shape: tuple[int, int]

    @classmethod
    def pack(cls, codes: Tensor, values: Affine, bits: int) -> "PackedWeight":
        """codes uint8 [n, k], each below 2**bits; the group size follows from the shape of the scales."""
        n, k = codes.shape
        if bits not in layout.BITS:
            raise RecipeError(f"{bits} bits cannot be packed; choose one of {layout.BITS}")
        groups = values.scale.shape[1]
        if values.scale.shape[0] != n or k % groups:
            raise ModelError(f"scales of shape {tuple(values.scale.shape)} do not fit a weight of shape {(n, k)}")
        if codes.numel() and int(codes.max()) >= 1 << bits:
            raise ModelError(f"code {int(codes.max())} does not fit {bits} bits")
        return cls(layout.pack_tiles(codes, bits), values, bits, k // groups, (n, k))

    def codes(self) -> Tensor:
        """uint8 [n, k]."""
        return layout.unpack_tiles(self.words, self.bits, *self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [n, k]: the product in float32, rounded once to `dtype`."""
        return reference.dequantize(self.words, self.values.scale, self.values.zero, self.bits, self.group, *self.shape, dtype)

    def stored_bits(self) -> int:
        """Bits this weight costs on disk: codes, scales and, if asymmetric, zeros at `bits` each."""
        n, k = self.shape
        scale = self.values.scale
        zeros = 0 if self.values.zero is None else scale.numel() * self.bits
        return n * k * self.bits + scale.numel() * scale.element_size() * 8 + zeros

    def nbytes(self) -> int:
        """Bytes in memory, padding of the tiles included."""
        tensors = [self.words, self.values.scale] + ([] if self.values.zero is None else [self.values.zero])
        return sum(t.numel() * t.element_size() for t in tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Flat tensors for safetensors; `from_tensors` with the same bits, group and shape is the inverse."""
        out = {"words": self.words, "scale": self.values.scale}
        return out if self.values.zero is None else out | {"zero": self.values.zero}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], bits: int, group: int, shape: tuple[int, int]) -> "PackedWeight":
        return cls(tensors["words"], Affine(tensors["scale"], tensors.get("zero")), bits, group, shape)
