"""What a dry run says of adapters: counts, folder, memory and time."""

from pathlib import Path
from typing import Any

import pytest

import compressor
from compressor.integrations.peft import KINDS, Adapters
from compressor.linear import packed_linears
from compressor.pipelines import checkpoint, compress, estimate
from compressor.pipelines.run import dry_run
from compressor.pipelines.show import Show
from compressor.recipe import Quant, Recipe, Tune
from tests.pipelines.pruned import whole

TRUE = {  # numbers that a run of tiny trains at rank 8
    "lora": 77_824, "rslora": 77_824, "dora": 82_944, "adalora": 117_072, "loha": 155_648, "lokr": 9_472, "ia3": 5_120, "miss": 40_960,
}  # fmt: skip
QUICK = Recipe().with_(device="cpu", data__seqlen=32, data__nsamples=4, eval__max_tokens=128, quant__packer="gptq", tune__steps=2)


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine for all, so that times compare."""
    monkeypatch.setattr(estimate, "matmul_speed", lambda device: 1e6)


@pytest.fixture(scope="module")
def packed() -> list[compress.Target]:
    return compress.plan(estimate.shell(checkpoint.TINY), Quant()).packed()


def told(tmp_path: Path, **keys: Any) -> dict[str, Any]:
    return dry_run(QUICK.with_(**{f"tune__{key}": value for key, value in keys.items()}), tmp_path / "out", Show())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_counted_exactly(kind: str, packed: list[compress.Target]) -> None:
    assert estimate.added(Tune(method=kind), packed).numbers == TRUE[kind]
    model = compressor.load("tiny", "cpu").compress(bits=4, packer="rtn", shrink=False).model
    some = Tune(method=kind, targets="q_proj, down_proj", rank=5)
    trained = Adapters(KINDS[kind], some).attach(model, None, 10)
    assert estimate.added(some, packed).numbers == sum(p.numel() for p in trained.values()) > 0
    assert len(packed_linears(model)) == len(packed)


def test_the_dry_run_foretells_the_folder(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"quant__packer": "rtn", "quant__bits": 3, "tune__method": "lora", "tune__steps": 2}
    found = whole(tmp_path / "out", **keys)["tuned"]["folder_bytes"]
    recipe = QUICK.with_(**keys)
    assert dry_run(recipe, tmp_path / "dry", Show())["folder_bytes"] == pytest.approx(found, rel=0.02)
    some = dry_run(recipe.with_(tune__targets="q_proj"), tmp_path / "dry", Show())["folder_bytes"]
    plain = dry_run(recipe.with_(tune__method="peqa"), tmp_path / "dry", Show())["folder_bytes"]
    assert plain + 4 * 8_192 < some < found - 4 * 60_000


def test_absorbing_is_told(tmp_path: Path) -> None:
    keep, absorb = told(tmp_path, method="lora"), told(tmp_path, method="lora", adapter="absorb")
    assert not keep["notes"] and "absorb" not in keep["seconds"]
    assert absorb["folder_bytes"] == keep["folder_bytes"] and "if it is absorbed, the folder is 320,816 bytes smaller" in absorb["notes"][0]
    assert absorb["seconds"]["absorb"] > 2 * keep["seconds"]["compress"] > 0


def test_starts_take_time(tmp_path: Path) -> None:
    zero, residual, loftq, some = (
        told(tmp_path, method="lora", **keys)["seconds"]["compress"]
        for keys in ({}, {"start": "residual"}, {"start": "loftq"}, {"start": "loftq", "targets": "q_proj"})
    )
    assert zero < residual < loftq and zero < some < loftq / 4
    solves = sum(3 * t.shape[1] ** 3 for t in compress.plan(estimate.shell(checkpoint.TINY), Quant()).packed()) / (1e6 * estimate.EFFICIENCY)
    assert loftq - zero > 5 * (residual - zero) + 4 * solves


def test_dense_changes_of_weights_are_in_memory(tmp_path: Path) -> None:
    tune = {kind: told(tmp_path, method=kind)["peak_bytes"]["tune"] for kind in ("lora", "dora", "loha", "lokr")}
    weights, largest = 786_432, 384 * 128
    assert tune["dora"] - tune["lora"] == 4 * 5 * largest + 28 * (TRUE["dora"] - TRUE["lora"])
    for kind, matrices in (("loha", 4), ("lokr", 2)):
        dense = 4 * weights + 4 * matrices * largest
        assert tune[kind] - tune["lora"] == dense + 28 * (TRUE[kind] - TRUE["lora"])
        cut = told(tmp_path, method=kind, gradient_checkpointing=True)["peak_bytes"]["tune"]
        less = told(tmp_path, method="lora", gradient_checkpointing=True)["peak_bytes"]["tune"]
        assert cut - less == weights + 4 * matrices * largest + 28 * (TRUE[kind] - TRUE["lora"])


def test_float_zeros_are_counted_where_they_are_tuned(tmp_path: Path) -> None:
    found = {targets: told(tmp_path, method="qalora", targets=targets)["bits_per_weight"] for targets in (None, "q_proj,k_proj,v_proj")}
    share = 4 * (128 * 128 + 2 * 64 * 128) / 786_432
    assert found[None] == 3.25 and found["q_proj,k_proj,v_proj"] == pytest.approx(3.125 + 0.125 * share)
