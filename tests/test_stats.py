"""LayerStats: the running mean is the mean, in any chunking and any input dtype, and bad inputs are named."""

import pytest
import torch

from compressor.errors import NumericError
from compressor.stats import LayerStats


def test_mean_of_outer_products_in_any_chunking() -> None:
    x = torch.randn(7, 30, 12, generator=torch.Generator().manual_seed(0))
    flat = x.view(-1, 12).double()
    truth = flat.T @ flat / flat.shape[0]
    for chunks in (1, 3, 7):
        stats = LayerStats(12)
        for part in x.chunk(chunks):
            stats.add(part)
        assert stats.tokens == 210
        assert stats.hessian is not None and stats.hessian.dtype == torch.float32
        torch.testing.assert_close(stats.hessian.double(), truth, rtol=1e-5, atol=1e-6)


def test_many_batches_do_not_drift() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * 100
    once, often, exact = LayerStats(8), LayerStats(8), LayerStats(8, dtype=torch.float64)
    once.add(x)
    exact.add(x)
    for _ in range(2000):
        often.add(x)
    assert once.hessian is not None and often.hessian is not None and exact.hessian is not None
    assert exact.hessian.dtype == torch.float64
    torch.testing.assert_close(often.hessian, once.hessian, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(once.hessian.double(), exact.hessian, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    stats = LayerStats(4)
    stats.add(torch.full((1000, 4), 300.0, dtype=dtype))  # the square overflows float16
    assert stats.hessian is not None
    torch.testing.assert_close(stats.hessian, torch.full((4, 4), float(torch.tensor(300.0, dtype=dtype)) ** 2))
    stats.check("layer")


def test_only_what_is_needed_is_kept() -> None:
    stats = LayerStats(4, needs=())
    stats.add(torch.ones(5, 4))
    assert stats.tokens == 5 and stats.hessian is None
    stats.check("layer")
    with pytest.raises(ValueError, match="fisher"):
        LayerStats(4, needs=("fisher",))


def test_no_tokens_and_wrong_width() -> None:
    stats = LayerStats(4)
    stats.add(torch.empty(0, 4))
    assert stats.tokens == 0 and stats.hessian is None
    with pytest.raises(ValueError, match="3 features"):
        stats.add(torch.ones(2, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_bad_inputs_are_named_even_when_good_ones_follow(bad: float) -> None:
    stats = LayerStats(3)
    x = torch.ones(10, 3)
    x[4, 1] = bad
    stats.add(x)
    stats.add(torch.ones(1000, 3))
    with pytest.raises(NumericError, match="blocks.2.down_proj"):
        stats.check("blocks.2.down_proj")
