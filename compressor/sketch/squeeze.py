"""SqueezeLLM's dense part: weighted k-means of every row segment, and the nearest entry for each weight.

Kim et al., 2023, arXiv 2306.07629, section 4.1: weight (i, j) weighs the diagonal of the empirical Fisher information, the sum of its squared
gradients of the end loss over the calibration windows. No error feedback and no refit: an arm to compare `sketch` with. Its sparse outliers
are left out.
"""

from typing import Any

import torch
from torch import Tensor

from compressor.packed import PackedWeight
from compressor.packing import joined, require_finite
from compressor.recipe import Quant
from compressor.sketch.learned import blind, check
from compressor.stats import LayerStats


def pack(w: Tensor, stats: LayerStats | None, options: Quant, group: int, dtype: torch.dtype) -> tuple[PackedWeight, dict[str, Any]]:
    """w float32 [n, k], segments of `group` columns -> packed weight with tables in `dtype`, and its report row {"note"}.

    Raises NumericError when w is not finite, or beyond what `dtype` holds.
    """
    require_finite(w)
    note = check(w, group, dtype)
    if stats is None or stats.fisher is None or not bool(stats.fisher.any()):
        unseen = joined("no gradient reached this layer; all weights count alike", note)
        return blind(w, torch.ones(w.shape[1], device=w.device), options, group, dtype), {"note": unseen}
    return blind(w, stats.fisher.to(w.device, torch.float32), options, group, dtype), {"note": note}
