"""Tile sizes as data: which file wins, what is refused, what is written."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor.errors import UserError
from compressor.kernels import configs
from compressor.kernels.configs import Chip, Table, Tile

CHIPS = [Chip("", arch) for arch in ("sm_80", "sm_90", "gfx942")]
OPS = ("forward", "grad_input", "grad_scale", "dequantize", "table_forward", "table_grad_input", "grad_table", "table_dequantize")
ROW = [None, 16, 64, 256, 4, 3]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's own; home is empty."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    configs.use(tmp_path / "mine")
    yield tmp_path / "mine"
    configs.use(None)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("where", CHIPS, ids=str)
def test_shipped_files_are_complete(where: Chip) -> None:
    for name in configs.SETTINGS:
        assert configs.setting(name, where) > 0
    for op in OPS:
        for itemsize in (2, 4, 8):
            tried = configs.candidates(op, where, itemsize)
            assert tried == sorted(set(tried))
            for m in (1, 16, 17, 64, 65, 511, 1 << 20):
                assert configs.tile(op, where, m, itemsize, 3) in tried


def test_the_first_file_with_an_entry_wins(folder: Path, tmp_path: Path) -> None:
    where, cache = Chip("gpu_x", "sm_90"), tmp_path / "home" / ".cache" / "compressor" / "tuned"
    shipped = configs.tile("forward", where, 1, 2, 4)
    mine, cached = [None, 32, *ROW[2:]], [None, 64, *ROW[2:]]
    write(folder / "gpu_x.json", {"tiles": {"forward 16 3": [mine]}})
    write(cache / "gpu_x.json", {"panel_from": 7, "tiles": {"forward 16": [cached]}})
    configs.use(folder)
    assert configs.tile("forward", where, 1, 2, 3).bm == 32
    assert configs.tile("forward", where, 1, 2, 4).bm == 64 != shipped.bm
    assert configs.setting("panel_from", where) == 7
    assert configs.tile("forward", Chip("gpu_y", "sm_90"), 1, 2, 4) == shipped


def test_chips() -> None:
    assert configs.chip("NVIDIA H200", 9, False) == Chip("nvidia_h200", "sm_90")
    assert configs.chip("NVIDIA GeForce RTX 4090", 8, False) == Chip("nvidia_geforce_rtx_4090", "sm_80")
    assert configs.chip("AMD Instinct MI300X", 9, True).arch == "gfx942"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "JSON"),
        ([], "object"),
        ({"speed": 1}, "speed"),
        ({"panel": 0}, "panel"),
        ({"tiles": {"forward": [ROW]}}, '"forward"'),
        ({"tiles": {"forward 16": []}}, '"forward 16"'),
        ({"tiles": {"forward 16": [[8, *ROW[1:]]]}}, "null"),
        ({"tiles": {"forward 16": [[8, *ROW[1:]], [8, *ROW[1:]], ROW]}}, "growing"),
        ({"tiles": {"forward 16": [[None, 16, 60, 256, 4, 3]]}}, "powers of two"),
        ({"tiles": {"forward 16": [[None, 16, 64, 512, 4, 3]]}}, "256"),
        ({"tiles": {"forward 16": [[None, 16, 64, 32, 4, 3]]}}, "64 or 128 or 256"),
        ({"tiles": {"grad_table 16": [ROW]}}, "64 or 128$"),
        ({"tiles": {"forward 16": [[None, 4, 64, 256, 4, 3]]}}, "bm must be at least 8"),
        ({"tiles": {"grad_scale 16": [[None, 8, 64, 128, 4, 3]]}}, "bm must be at least 16"),
        ({"tiles": {"table_forward 16": [[None, 16, 256, 256, 4, 3]]}}, "bn must be at most 128"),
    ],
    ids=str,
)
def test_mistakes_are_named(folder: Path, content: object, word: str) -> None:
    path = folder / "gpu_x.json"
    write(path, content)
    if isinstance(content, str):
        path.write_text(content)
    with pytest.raises(UserError, match=word) as caught:
        configs.load(path)
    assert str(path) in str(caught.value)


def test_save_reads_back(folder: Path) -> None:
    table = Table({"panel_from": 256}, {"forward 16 4": ((8, Tile(8, 64, 256, 4, 4)), (None, Tile(128, 128, 256, 8, 2)))})
    configs.save(folder / "gpu_x.json", table)
    assert configs.load(folder / "gpu_x.json") == table
    assert [path.name for path in folder.iterdir()] == ["gpu_x.json"]


def test_splitting_leaves_no_part_out() -> None:
    where = CHIPS[1]
    wave, most = configs.setting("wave", where), configs.setting("max_split", where)
    for programs in (1, 3, 64, 200, 10_000):
        for steps in (1, 2, 7, 16, 43, 1000):
            parts = configs.split(where, programs, steps)
            assert 1 <= parts <= most
            assert parts == 1 or (programs * parts <= wave and parts * 2 <= steps)
