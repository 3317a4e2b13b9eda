"""The only place where tests keep tolerances: the largest allowed ||out - reference|| / ||reference|| by the dtype of the inputs."""

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
# where each weight is rounded to the dtype before the product, as in a dense layer; Triton's interpreter also truncates bf16 instead of rounding
ROUNDED = RELATIVE | {torch.bfloat16: 6e-3}


def error(out: Tensor, reference: Tensor) -> float:
    """Relative error in the 2-norm; NaN anywhere in `out` makes it NaN, which no comparison accepts."""
    out, reference = out.detach().double().cpu(), reference.detach().double().cpu()
    assert out.shape == reference.shape, (out.shape, reference.shape)
    size = float(reference.norm())
    return float((out - reference).norm()) / (size if size > 0 else 1.0)
