"""The search of `compressor tune-kernels` with an invented clock: it picks the fastest tile, and writes a file that the kernels then read."""

from pathlib import Path

import pytest

from compressor.errors import RecipeError
from compressor.kernels import configs
from compressor.kernels.configs import Chip, Tile
from compressor.pipelines import tune_kernels
from compressor.pipelines.show import Show

CHIP = Chip("invented_gpu", "sm_90")


def clock(op: str, bits: int, m: int, tile: Tile | None) -> float | None:
    """Fastest at 128 rows of the weight and 2 stages; at 3 bits no other tile than the one in force runs; panels win from 1024 rows."""
    if bits == 3:
        return None if tile else 1.0
    if op.startswith("forward "):
        return 1.0 if (op == "forward panel") == (m >= 1024) else 2.0
    return 5.0 if tile is None else 1.0 + abs(tile.bn - 128) + abs(tile.stages - 2) + tile.warps / 100


def test_the_fastest_tile_of_every_bucket_is_written_and_read(tmp_path: Path) -> None:
    table, report = tune_kernels.search(CHIP, ["forward", "grad_scale"], [4, 3], clock, Show())
    assert set(table.tiles) == {"forward 16 4", "grad_scale 16 4"}, "what does not run has no row"
    assert table.settings == {"panel_from": 1024}
    assert {row["rows"] for row in report if row["op"] == "forward"} == set(tune_kernels.BUCKETS["forward"])
    assert all(row["gain"] > 1 for row in report)
    configs.save(tmp_path / "invented_gpu.json", table)
    configs.use(tmp_path)
    try:
        for m in (1, 16, 100):
            tile = configs.tile("forward", CHIP, m, 2, 4)
            assert (tile.bn, tile.stages) == (128, 2)
            assert tile.bm <= max(16, 4 * m)
        assert configs.setting("panel_from", CHIP) == 1024
        assert configs.tile("forward", CHIP, 1, 2, 3) == configs.tile("forward", Chip("", "sm_90"), 1, 2, 3), "the shipped table stands behind"
    finally:
        configs.use(None)


def test_a_broken_gpu_is_no_result() -> None:
    with pytest.raises(RecipeError, match="does not run with the tiles in force"):
        tune_kernels.search(CHIP, ["forward"], [4], lambda *_: None, Show())


def test_a_second_search_keeps_what_the_first_found(tmp_path: Path) -> None:
    path = tmp_path / "invented_gpu.json"
    for op in ("forward", "grad_input"):
        table, _ = tune_kernels.search(CHIP, [op], [4], clock, Show())
        configs.save(path, tune_kernels.merged(path, table))
    assert set(configs.load(path).tiles) == {"forward 16 4", "grad_input 16 4"}


@pytest.mark.parametrize(("ops", "bits", "words"), [(["backward"], [4], "no operation backward"), (["forward"], [5], "5 bits are not packed")])
def test_mistakes_are_named(ops: list[str], bits: list[int], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        tune_kernels.tune(None, ops, bits, "cuda", Show())
