"""Blocks of GGUF: our decoding equals the gguf package's bit for bit, and what is called exact is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import ModelError
from compressor.export import gguf_blocks as blocks
from compressor.export import gguf_fit
from compressor.export.gguf_types import KINDS, from_bytes, to_bytes
from compressor.packed import Affine, PackedWeight, Table

K_TYPES = ("q2_k", "q3_k", "q4_k")


def dense(n: int = 70, k: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def packed(bits: int, group: int, zeros: str = "none", n: int = 70, k: int = 512, scale: torch.Tensor | None = None, seed: int = 0) -> PackedWeight:
    """A random weight: codes everywhere in their range, scales within a factor of ten."""
    generator = torch.Generator().manual_seed(seed + bits + group)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    if scale is None:
        scale = (torch.rand(n, k // group, generator=generator) * 0.09 + 0.01).half()
    zero = None
    if zeros == "integer":
        zero = torch.randint(0, 1 << bits, scale.shape, generator=generator, dtype=torch.uint8)
    elif zeros == "float":
        zero = (torch.rand(scale.shape, generator=generator) * ((1 << bits) - 1)).half()
    return PackedWeight.pack(codes, Affine(scale, zero), bits, group)


def on_grid(bits: int, group: int, limit: int, dtype: torch.dtype = torch.float16, n: int = 70, k: int = 512) -> PackedWeight:
    """Scales that are multiples 1…limit of one number with few bits per 256 columns."""
    generator = torch.Generator().manual_seed(limit)
    per = max(1, 256 // group)
    d = torch.randint(16, 32, (n, k // group // per, 1), generator=generator) * 2.0**-12
    counts = torch.randint(1, limit + 1, (n, k // group // per, per), generator=generator)
    return packed(bits, group, scale=(d * counts).flatten(1).to(dtype), n=n, k=k)


def seen(weight: PackedWeight | torch.Tensor, name: str) -> torch.Tensor:
    return blocks.decode(blocks.encode(weight, name), name, tuple(weight.shape))


def error(weight: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


@pytest.mark.parametrize("name", blocks.NAMES)
def test_random_bytes_and_encoded_weights_decode_as_in_the_gguf_package(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    data = torch.randint(0, 256, (300, blocks.row_bytes(name, 512)), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    if name not in blocks.FLOATS:  # finite scales: the exponent's top bit is cleared wherever a float16 may stand
        grid = from_bytes(data, KINDS[name])
        halves = [x for x in (grid.d, grid.dmin) if x is not None]
        keep = torch.stack([torch.isfinite(x) for x in halves]).all(0).all(-1)
        data = data[keep]
        assert len(data) > 50
    for each in (data, blocks.encode(dense(), name)):
        theirs = torch.from_numpy(gguf.quants.dequantize(each.numpy(), kind).copy())
        ours = blocks.decode(each, name, (len(each), 512))
        assert torch.equal(theirs.view(torch.int32)[~theirs.isnan()], ours.view(torch.int32)[~theirs.isnan()])


@pytest.mark.parametrize("name", KINDS)
def test_bytes_hold_every_number(name: str) -> None:
    data = torch.randint(0, 256, (9, blocks.row_bytes(name, 512)), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(to_bytes(from_bytes(data, KINDS[name]), KINDS[name]), data)


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(
        [("q4_0", 4, "none"), ("q4_0", 3, "none"), ("q4_0", 2, "none"), ("q4_0", 3, "integer"), ("q4_0", 2, "integer"), ("q5_0", 4, "integer")]
        + [("q8_0", 8, "none"), ("q8_0", 4, "integer"), ("q4_1", 4, "none"), ("q4_1", 3, "none"), ("f32", 8, "integer"), ("f32", 4, "float")]
    ),
    group=st.sampled_from([32, 64, 96, 288]),
    n=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_what_is_exact(case: tuple[str, int, str], group: int, n: int, seed: int) -> None:
    name, bits, zeros = case
    weight = packed(bits, group, zeros, n=n, k=288 if group in (96, 288) else 192, seed=seed)
    assert blocks.exact(weight, name) and torch.equal(seen(weight, name), weight.dequantize())


@pytest.mark.parametrize(("name", "bits", "limit"), [("q4_k", 4, 63), ("q4_k", 3, 63), ("q3_k", 3, 31), ("q3_k", 2, 31), ("q2_k", 2, 15)])
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_k_types_are_exact_on_their_grid(name: str, bits: int, limit: int, group: int, dtype: torch.dtype) -> None:
    weight = on_grid(bits, group, limit, dtype)
    assert blocks.exact(weight, name) and torch.equal(seen(weight, name), weight.dequantize())


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("q4_0", packed(4, 32, "integer")),  # zeros beyond the midpoint need a fifth bit
        ("q4_0", packed(4, 16)),  # groups smaller than a block
        ("q4_0", packed(8, 32)),
        ("q8_0", packed(8, 32, "integer")),
        ("q5_0", packed(3, 32, "float")),
        ("q4_1", packed(4, 32, "float")),
        ("q4_k", packed(4, 32)),
        ("q3_k", packed(3, 32)),
        ("q3_k", packed(4, 256)),
        ("q2_k", packed(2, 128)),
        ("f16", packed(4, 32)),
        ("bf16", packed(2, 32)),
    ],
)
def test_what_is_not_exact_is_near(name: str, weight: PackedWeight) -> None:
    assert not blocks.exact(weight, name)
    bits = {"q8_0": 8, "q5_0": 5, "q4_0": 4, "q4_1": 10, "q4_k": 6, "q3_k": 3 + (weight.bits == 3) * 2, "q2_k": 5, "f16": 11, "bf16": 8}[name]
    assert 0 < error(weight.dequantize(), seen(weight, name)) < 1.1 * 2.0**-bits


def test_scales_of_other_dtypes_are_rounded() -> None:
    third = torch.full((4, 2), 1 / 3)
    assert not blocks.exact(packed(4, 32, scale=third, n=4, k=64), "q4_0")
    assert blocks.exact(packed(4, 32, scale=third.bfloat16(), n=4, k=64), "q4_0")
    weight = packed(4, 32, scale=third, n=4, k=64)
    assert torch.equal(seen(weight, "q4_0"), weight.with_learned(third.half()).dequantize())


def naive(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Plain rounding: widest ranges, largest scale on the largest integer."""
    kind = KINDS[name]
    parts = weight.view(len(weight), -1, kind.block // kind.sub, kind.sub)
    if kind.minimum:
        low = -parts.amin(-1).clamp(max=0)
        scale = (parts.amax(-1).clamp(min=0) + low) / kind.top
    else:
        low, scale = torch.zeros(parts.shape[:3]), parts.abs().amax(-1) / kind.offset

    def level(x: torch.Tensor) -> torch.Tensor:
        d = (x.amax(-1, keepdim=True) / kind.limit).half().float().clamp(min=1e-12)
        return (x / d).round() * d

    scale, low = level(scale).clamp(min=1e-12).unsqueeze(-1), level(low).unsqueeze(-1)
    return (((parts + low) / scale + kind.offset).round().clamp(0, kind.top) * scale - kind.offset * scale - low).flatten(1)


@pytest.mark.parametrize("name", K_TYPES)
def test_fitting_beats_plain_rounding(name: str) -> None:
    weight = dense()
    assert error(weight, seen(weight, name)) < 0.93 * error(weight, naive(weight, name))


@pytest.mark.parametrize(("name", "bits"), [("q4_k", 4), ("q3_k", 3), ("q2_k", 2)])
def test_own_scales_are_kept_to_their_integers(name: str, bits: int) -> None:
    """Two scales in 256 columns: the best d of many leaves an error well below that of one rounded to 1/63, 1/31 or 1/15 of the larger."""
    weight = packed(bits, 128)
    assert error(weight.dequantize(), seen(weight, name)) < {"q4_k": 1e-3, "q3_k": 3e-3, "q2_k": 1e-2}[name]


@pytest.mark.parametrize("name", K_TYPES)
def test_exact_blocks_stay_exact_beside_others(name: str) -> None:
    bits, limit = int(name[1]), KINDS[name].limit
    weight = on_grid(bits, 32, limit)
    scale = weight.learned.clone()
    scale[3, 8:] = torch.linspace(0.011, 0.017, 8).half()
    mixed = weight.with_learned(scale)
    same = seen(mixed, name) == mixed.dequantize()
    assert same[:3].all() and same[4:].all() and same[3, :256].all() and not same[3, 256:].all()


@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_zeros_and_tables_and_permuted_columns(name: str) -> None:
    assert torch.equal(seen(torch.zeros(3, 256), name), torch.zeros(3, 256))
    nothing = packed(2, 32, scale=torch.zeros(3, 8).half(), n=3, k=256)
    assert torch.equal(seen(nothing, name), nothing.dequantize())
    learned = (torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(1)) * 0.1).half()
    codes = torch.randint(0, 8, (5, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    table = PackedWeight.pack(codes, Table(learned), 3, 128)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3))
    permuted = PackedWeight.pack(codes, packed(3, 32, n=5, k=256).values, 3, 32, order)
    for weight in (table, permuted):
        assert error(weight.dequantize(), seen(weight, name)) < {"2": 0.35, "3": 0.17, "4": 0.09}.get(name[1], 0.04)


def test_divisor() -> None:
    scale = torch.tensor([[3.0, 4.5, 0.0, 6.0], [0.0, 0.0, 0.0, 0.0], [1e-8, 1e8, 1.0, 1.0]])
    d, count = gguf_fit.divisor(scale)
    assert d[:2].tolist() == [1.5, 0.0] and count[:2].tolist() == [[2, 3, 0, 4], [0, 0, 0, 0]]
    assert int(count[2].max()) > 63


def test_products_that_need_more_than_float16_have_a_float16_divisor() -> None:
    """All scales are 33 times one float16 of eleven bits."""
    scale = torch.full((2, 8), 33 * 2047 * 2.0**-20)
    weight = packed(4, 32, n=2, k=256, scale=scale)
    assert not torch.equal(scale.half().float(), scale)
    assert blocks.exact(weight, "q4_k") and torch.equal(seen(weight, "q4_k"), weight.dequantize())


@pytest.mark.parametrize("name", blocks.NAMES)
@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(name: str, strange: float) -> None:
    """Also where they are few, and where no search for a scale would ever choose them."""
    matrix = dense(n=3, k=256)
    matrix[1, 7] = strange
    scaled, zeroed = packed(2, 32, n=3, k=256), packed(2, 32, "float", n=3, k=256)
    scaled.learned[2, 3] = strange
    assert zeroed.zero is not None
    zeroed.zero[0, 1] = strange
    for weight in (matrix, scaled, zeroed):
        assert not blocks.finite(weight)
        with pytest.raises(ModelError, match="NaN or infinite"):
            blocks.encode(weight, name)


@pytest.mark.parametrize("name", [name for name in blocks.NAMES if name not in ("f32", "bf16")])
def test_what_float16_cannot_hold_is_refused(name: str) -> None:
    far = packed(2, 32, scale=torch.full((3, 8), 1e9), n=3, k=256)
    for weight in (torch.full((2, 256), 1e9), far):
        with pytest.raises(ModelError, match="range of float16"):
            blocks.encode(weight, name)


@pytest.mark.parametrize("name", blocks.NAMES)
@pytest.mark.parametrize("weight", [packed(4, 32), packed(2, 128, "float"), packed(3, 16), dense()], ids=["4", "2", "3", "dense"])
def test_the_error_told_is_that_of_the_bytes(name: str, weight: PackedWeight | torch.Tensor) -> None:
    data, told = blocks.fitted(weight, name)
    whole = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
    found = blocks.decode(data, name, (70, 512))
    assert told == pytest.approx(error(whole, found), rel=1e-5) and (told == 0) == torch.equal(whole, found)
    assert torch.equal(data, blocks.encode(weight, name))
    if isinstance(weight, PackedWeight):
        exact = blocks.fitted_exactly(weight, name)
        assert torch.equal(exact, data) if exact is not None else told > 0


def test_codes_are_not_unpacked_where_scales_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(4, 32)
    monkeypatch.setattr(PackedWeight, "codes", lambda self: pytest.fail("unpacked"))
    assert not blocks.exact(weight, "q4_k")


def test_what_does_not_go() -> None:
    with pytest.raises(ModelError, match="32"):
        blocks.encode(dense(k=48), "q4_0")
    with pytest.raises(ModelError, match="q9_9"):
        blocks.encode(dense(), "q9_9")
    with pytest.raises(ModelError, match="float16"):
        blocks.encode(torch.full((2, 256), 1e9), "q4_0")
    with pytest.raises(ModelError, match="no q4_0 weight"):
        blocks.decode(torch.zeros(2, 17, dtype=torch.uint8), "q4_0", (2, 32))
