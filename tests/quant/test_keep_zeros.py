"""What was pruned stays exactly zero: through rounding, through error feedback and refinement, and through the tuning of scales."""

from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import ModelError, RecipeError
from compressor.hessian import factorise, rounding_order
from compressor.linear import find_blocks, linears, packed_linears
from compressor.packed import PackedWeight
from compressor.pipelines.compress import compress
from compressor.quant import PACKERS, gptq, grid
from compressor.recipe import Quant, Tune
from compressor.stats import LayerStats
from compressor.tune import TUNERS
from compressor.tune.batches import CausalLM
from compressor.tune.loop import train

GRIDS = [(bits, symmetric) for bits in (2, 3, 4) for symmetric in (True, False)]


def pruned(n: int, k: int, share: float = 0.6) -> tuple[Tensor, Tensor]:
    """A masked weight with an offset, so that asymmetric grids have uneven sides, and its mask."""
    draw = torch.Generator().manual_seed(0)
    keep = torch.rand(n, k, generator=draw) > share
    keep[0], keep[1, :64] = False, False  # a row and whole groups of zeros
    return (torch.randn(n, k, generator=draw) * 0.05 + 0.02) * keep, keep


def correlated(k: int) -> LayerStats:
    draw = torch.Generator().manual_seed(1)
    stats = LayerStats(k)
    stats.add(torch.randn(2048, k, generator=draw) @ (torch.randn(k, k, generator=draw) / k**0.5 + 0.1 * torch.randn(k, 1, generator=draw)))
    return stats


def masked(stats: LayerStats, keep: Tensor | None) -> LayerStats:
    stats.keep = keep
    return stats


def pack(w: Tensor, stats: LayerStats | None, group: int, packer: str = "gptq", **options: Any) -> PackedWeight:
    return PACKERS[packer](w, stats, Quant(**options), group, torch.float16)[0]


def codes_of_zero(weight: PackedWeight) -> Tensor:
    n, k = weight.shape
    return torch.full((n, k), 1 << (weight.bits - 1)) if weight.zero is None else weight.zero.repeat_interleave(weight.group, 1)


def stays(weight: PackedWeight, keep: Tensor) -> bool:
    zeros = torch.equal(weight.codes()[~keep].long(), codes_of_zero(weight)[~keep].long())
    return zeros and not bool(weight.dequantize()[~keep].count_nonzero())


def energy(w: Tensor, packed: Tensor, stats: LayerStats) -> float:
    assert stats.hessian is not None
    e = (w - packed).double()
    return float(((e @ stats.hessian.double()) * e).sum())


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("group", [32, 192])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_rounding_keeps_zeros_by_itself(bits: int, symmetric: bool, group: int, shrink: bool) -> None:
    w, keep = pruned(40, 192)
    assert stays(pack(w, None, group, "rtn", bits=bits, symmetric=symmetric, shrink=shrink), keep)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group", [32, 192])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_gptq_keeps_zeros_where_it_is_told_to(bits: int, symmetric: bool, group: int, act_order: bool) -> None:
    (w, keep), stats = pruned(40, 192), correlated(192)
    options: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "act_order": act_order}
    assert stays(pack(w, masked(stats, keep), group, **options), keep)
    assert stays(pack(w + 0.01, masked(stats, keep), group, **options), keep)  # the mask decides, not what is under it
    assert not stays(pack(w, masked(stats, None), group, **options), keep)


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_a_mask_that_keeps_everything_changes_nothing(bits: int, symmetric: bool) -> None:
    (w, keep), stats = pruned(40, 192), correlated(192)
    plain = pack(w, stats, 32, bits=bits, symmetric=symmetric)
    again = pack(w, masked(stats, torch.ones_like(keep)), 32, bits=bits, symmetric=symmetric)
    assert torch.equal(plain.words, again.words)
    assert torch.equal(plain.learned, again.learned)


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_the_sweep_is_sparsegpts_joint_step(monkeypatch: pytest.MonkeyPatch, bits: int, symmetric: bool) -> None:
    """Against the unblocked algorithm in float64 on one column after the other: a masked column's whole remainder is its error."""
    monkeypatch.setattr(gptq, "ROUNDS", 0)
    (w, keep), stats, group = pruned(24, 352), correlated(352), 32
    packed = pack(w, masked(stats, keep), group, bits=bits, symmetric=symmetric)
    assert stats.hessian is not None
    order = rounding_order(stats.hessian, True)
    upper = factorise(stats.hessian, order, 0.01)[0]
    assert upper is not None
    rest, upper = w.double()[:, order], upper.double()
    zero, slow = codes_of_zero(packed).double(), torch.empty_like(packed.codes())
    for i, j in enumerate(order.tolist()):
        s, z = packed.learned[:, j // group].double(), zero[:, j]
        code = torch.where(keep[:, j], grid.encode(rest[:, i], s, z, bits), z)
        slow[:, j] = code.to(torch.uint8)
        rest[:, i + 1 :] -= ((rest[:, i] - s * (code - z)) / upper[i, i]).unsqueeze(1) * upper[i, i + 1 :]
    assert float((packed.codes() != slow).float().mean()) < 2e-3  # ties that float32 breaks otherwise


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_it_beats_rounding_and_zeros_put_back_afterwards(bits: int, symmetric: bool) -> None:
    (w, keep), stats = pruned(40, 192), correlated(192)
    options: dict[str, Any] = {"bits": bits, "symmetric": symmetric}
    ours = energy(w, pack(w, masked(stats, keep), 32, **options).dequantize(), stats)
    rounded = energy(w, pack(w, None, 32, "rtn", **options).dequantize(), stats)
    afterwards = energy(w, pack(w, masked(stats, None), 32, **options).dequantize() * keep, stats)
    assert ours < 0.7 * rounded
    assert ours < 0.7 * afterwards


def test_layers_without_calibration_are_rounded_under_the_mask() -> None:
    (w, keep), stats = pruned(40, 192), LayerStats(192)
    assert stays(pack(w + 0.01, masked(stats, keep), 32), keep)


def test_masks_that_do_not_fit() -> None:
    (w, keep), stats = pruned(40, 192), correlated(192)
    for wrong in (keep[:, :100], keep.float()):
        with pytest.raises(ModelError, match=r"a mask of torch.(bool|float32) and shape"):
            pack(w, masked(stats, wrong), 32)


def llama(share: float = 0.6) -> tuple[Any, dict[str, Tensor]]:
    """A random model of two blocks with masked linears, and the masks by name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, max_position_embeddings=64, initializer_range=0.1)).eval()
    prefix, blocks = find_blocks(model)
    keeps = {}
    for name, layer in linears(blocks).items():
        keeps[f"{prefix}.{name}"] = torch.rand(layer.weight.shape) > share
        layer.weight.data.mul_(keeps[f"{prefix}.{name}"])
    return model, keeps


@pytest.mark.parametrize("parametrization", ["relative", "absolute"])
@pytest.mark.parametrize(("packer", "symmetric"), [("gptq", True), ("gptq", False), ("rtn", True), ("rtn", False)])
def test_zeros_outlive_compression_and_tuning(packer: str, symmetric: bool, parametrization: str) -> None:
    model, keeps = llama()
    ids = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(3))
    compress(model, Quant(bits=3, group=32, packer=packer, symmetric=symmetric), torch.float16, ids, keep_zeros=True)
    before = {name: layer.packed() for name, layer in packed_linears(model).items()}
    assert before.keys() == keeps.keys()
    assert all(stays(weight, keeps[name]) for name, weight in before.items())
    options = Tune(method="peqa", batch=4, steps=8, lr=1e-2, warmup=0.0, eval_every=0, parametrization=parametrization)
    tuner = TUNERS["peqa"](options)
    train(model, tuner.attach(model), CausalLM(ids, ids), options, 5, None, "a")
    tuner.detach(model)
    after = {name: layer.packed() for name, layer in packed_linears(model).items()}
    assert not any(torch.equal(weight.learned, before[name].learned) for name, weight in after.items())
    assert all(stays(weight, keeps[name]) for name, weight in after.items())


def test_without_it_gptq_fills_the_zeros() -> None:
    model, keeps = llama()
    ids = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(3))
    compress(model, Quant(bits=3, group=32), torch.float16, ids)
    assert not any(stays(layer.packed(), keeps[name]) for name, layer in packed_linears(model).items())


@pytest.mark.parametrize("packer", ["sketch", "squeezellm"])
def test_sketches_are_refused(packer: str) -> None:
    with pytest.raises(RecipeError, match="no exact zero.*use --quant 3bit:gptq or 3bit:rtn") as error:
        compress(llama()[0], Quant(packer=packer), torch.float16, None, keep_zeros=True)
    assert "\n" not in str(error.value)
