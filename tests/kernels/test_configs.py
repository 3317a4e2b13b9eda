"""What the Triton kernels stand on: tile sizes as data (which file wins, what is refused, what is written), devices, buffers that outlive a call."""

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compressor.errors import UserError
from compressor.kernels import configs, workspace
from compressor.kernels.configs import Chip, Table, Tile

CHIPS = [Chip("", arch) for arch in ("sm_80", "sm_90", "gfx942")]
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
    for op in configs.OPS:
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
    assert [configs.chip("NVIDIA X", major, False).arch for major in (8, 10, 12)] == ["sm_80"] * 3  # no wgmma
    assert configs.chip("AMD Instinct MI300X", 9, True).arch == "gfx942"


def test_no_home_means_no_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    configs.use(None)
    assert configs.tile("forward", Chip("gpu_x", "sm_90"), 1, 2, 4).bm == 8
    with pytest.raises(UserError, match="HOME"):
        configs.cache()


def test_shipped_rows_differ_from_their_neighbours() -> None:
    for path in configs.SHIPPED.glob("*.json"):
        for key, rows in configs.load(path).tiles.items():
            tiles = [tile for _, tile in rows]
            assert all(a != b for a, b in itertools.pairwise(tiles)), (path.name, key)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "JSON"),
        ([], "object"),
        ({"speed": 1}, "speed"),
        ({"panel": 0}, "panel"),
        ({"tiles": {"forward": [ROW]}}, '"forward"'),
        ({"tiles": {"forward 16": []}}, '"forward 16"'),
        ({"tiles": {"fowrard 16": [ROW]}}, "must begin with one of forward, "),
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


CUDA = torch.device("cuda", 0)


class FakeGpu:
    """What launch.supported asks a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hip: bool, capability: tuple[int, int], name: str) -> None:
        monkeypatch.setattr(torch.version, "hip", "6.2" if hip else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=name))


@pytest.mark.parametrize(
    ("hip", "capability", "name", "expected"),
    [
        (False, (7, 5), "", False),
        (False, (8, 0), "", True),
        (False, (9, 0), "", True),
        (False, (12, 0), "", True),
        (True, (9, 4), "gfx942:sramecc+:xnack-", True),
        (True, (9, 5), "gfx950:sramecc+:xnack-", True),
        (True, (9, 0), "gfx90a:sramecc+:xnack-", False),
        (True, (11, 0), "gfx1100", False),
    ],
)
def test_supported(monkeypatch: pytest.MonkeyPatch, hip: bool, capability: tuple[int, int], name: str, expected: bool) -> None:
    launch = pytest.importorskip("compressor.kernels.launch", exc_type=ImportError)
    FakeGpu(monkeypatch, hip, capability, name)
    assert launch.supported.__wrapped__(CUDA) is expected
    assert launch.supported(torch.device("cpu"))


def test_padded_copies_only_what_it_must() -> None:
    launch = pytest.importorskip("compressor.kernels.launch", exc_type=ImportError)
    u, b = torch.randn(3, 32), torch.randn(5, 32)
    same = launch.padded((u, b), torch.float32)
    assert [t.data_ptr() for t in same] == [u.data_ptr(), b.data_ptr()]
    wide = launch.padded((u[:, :20], b[:, :20]), torch.float16)
    for t, part in zip(wide, (u[:, :20], b[:, :20]), strict=True):
        assert t.shape[1] == 32
        assert t.is_contiguous()
        assert torch.equal(t[:, :20], part.half())
        assert not t[:, 20:].any()
    assert launch.padded(None, torch.float32) == launch.padded((u[:, :0], b[:, :0]), torch.float32) == (None, None)


class Device:
    """A device without one: what workspace.py asks of CUDA, answered by the test; tensors lie on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures, self.stream, self.cpu = False, 0, torch.device("cpu")
        self.made: list[int] = []  # by which thread
        for name in ("_arenas", "_streams", "_constants"):
            monkeypatch.setattr(workspace, name, {})
        monkeypatch.setattr(workspace, "ARENA", 4096)
        monkeypatch.setattr(workspace, "capturing", lambda _: self.captures)
        monkeypatch.setattr(workspace, "_stream", lambda _: self.stream)
        for name in ("zeros", "full"):
            real = getattr(torch, name)
            monkeypatch.setattr(torch, name, lambda *a, real=real, **k: (self.made.append(threading.get_ident()), real(*a, **k))[1])

    def take(self, count: int, captures: bool = False, stream: int = 0) -> torch.Tensor:
        self.captures, self.stream = captures, stream
        out = workspace.counters(self.cpu, count)
        assert out.dtype == torch.int32
        assert out.numel() >= count
        assert not out.any()
        return out


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def places(t: torch.Tensor) -> set[int]:
    return set(range(t.data_ptr(), t.data_ptr() + 4 * t.numel(), 4))


def test_counters_of_streams_and_graphs_are_distinct(device: Device) -> None:
    first, second = device.take(8), device.take(8, stream=1)
    graphs = [device.take(300, captures=True) for _ in range(3)]
    slices = [first, second, *graphs]
    assert len(set.union(*map(places, slices))) == sum(t.numel() for t in slices)
    assert {t.untyped_storage().data_ptr() for t in slices} == {first.untyped_storage().data_ptr()}, "one arena"
    assert device.take(workspace.COUNTERS) is first
    assert device.take(8, stream=1) is second


def test_a_stream_that_needs_more_counters_gets_a_longer_slice(device: Device) -> None:
    short = device.take(8)
    long = device.take(workspace.COUNTERS + 1)
    assert not places(short) & places(long)
    assert device.take(8) is long


def test_exhausted_counters_are_zeros_for_one_launch(device: Device) -> None:
    inside = device.take(8)
    held = [device.take(1000, captures=True) for _ in range(3)]
    for captures, stream in ((True, 0), (False, 1)):
        extra, again = (device.take(1000, captures, stream) for _ in range(2))
        assert not places(extra) & (places(inside) | places(again)).union(*map(places, held))
        assert extra.untyped_storage().data_ptr() != inside.untyped_storage().data_ptr()
    assert list(workspace._streams) == [(device.cpu, 0)]
    assert device.take(8) is inside


def test_forget_graphs_takes_back_their_counters_only(device: Device) -> None:
    stream = device.take(8)
    before = device.take(3000, captures=True)
    workspace.forget_graphs()
    assert places(device.take(3000, captures=True)) == places(before)
    assert device.take(8) is stream


def test_nothing_persists_that_was_made_while_capturing(device: Device) -> None:
    device.take(8, captures=True)
    workspace.constant(7, device.cpu)
    assert not workspace._arenas
    assert not workspace._constants
    assert set(device.made) == {threading.get_ident()}


def test_what_persists_is_made_in_a_thread_of_its_own(device: Device) -> None:
    """Where no graph's pool, no inference mode and no default device of the caller reaches it."""
    with torch.inference_mode(), torch.device("meta"):
        counters, constant = device.take(8), workspace.constant(7, device.cpu)
    assert threading.get_ident() not in device.made
    assert len(device.made) == 2
    assert not counters.is_inference()
    assert constant.tolist() == [7]
    assert workspace.constant(7, device.cpu) is constant
    device.captures = True
    assert workspace.constant(7, device.cpu) is constant


def test_errors_of_the_thread_reach_the_caller(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "ARENA", -1)
    with pytest.raises(RuntimeError):
        device.take(8)
    assert not workspace._arenas
