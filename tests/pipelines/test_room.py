"""What a run says that it will write is what then lies on the disk."""

from pathlib import Path
from typing import Any

import pytest

from compressor.errors import OutputError
from compressor.pipelines import checkpoint, output, room
from compressor.pipelines import run as pipeline
from compressor.pipelines.blockwise import blocks
from compressor.pipelines.blockwise.hidden import Spool
from compressor.pipelines.show import Show
from compressor.recipe import Recipe
from tests.pipelines.toys import make, recipe

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64, "num_hidden_layers": 2}  # whole tiles


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("wide") / "llama", "llama", **WIDE)


def needed(asked: Recipe, place: Path) -> int:
    return room.needed(pipeline.Run(asked, place, Show()))


def written(work: Path) -> int:
    """Bytes in a work folder without report, page and card, which are as large as a toy."""
    return room.lying(work) - sum((work / "folder" / name).stat().st_size for name in output.OWN_FILES if (work / "folder" / name).exists())


def watched(asked: Recipe, place: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most that lay in the work folder whenever hidden states were put down, and when the output folder was about to get its name."""
    most, put, publish = 0, Spool.__setitem__, pipeline.Run.publish

    def look() -> None:
        nonlocal most
        most = max(most, written(place.with_name(place.name + ".partial")))

    monkeypatch.setattr(Spool, "__setitem__", lambda *given: (put(*given), look())[0])
    monkeypatch.setattr(pipeline.Run, "publish", lambda *given: (look(), publish(*given))[1])
    pipeline.run(asked, place)
    return most


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"quant__bits": 8, "quant__packer": "rtn"}, 0.95),
        ({"quant__bits": 3, "quant__symmetric": False}, 0.9),
        ({"quant__bits": 3, "quant__packer": "sketch", "quant__group": 128}, 0.9),
        ({"quant__bits": 4, "tune__method": "peqa", "tune__steps": 2, "tune__batch": 2}, 0.7),  # the old checkpoint is gone by then
        ({"quant__bits": 4, "tune__method": "peqa", "tune__steps": 20, "tune__batch": 4, "tune__distill": 0.5}, 0.8),
        ({"memory": "blocks", "data__activations": "disk", "data__nsamples": 100}, 0.9),
    ],
)  # fmt: skip
def test_the_room_is_what_the_run_takes(llama: Path, tmp_path: Path, changes: dict[str, Any], least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(llama, **{"eval__max_tokens": 128} | changes)
    said, found = needed(asked, tmp_path / "out"), watched(asked, tmp_path / "out", monkeypatch)
    assert least * said <= found <= said + 40_000  # journal, lock and indices


def test_eight_bits_take_about_what_the_model_does_and_states_and_logits_count(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(llama, quant__bits=8, quant__packer="rtn", quant__group=128)
    assert needed(asked, tmp_path / "out") == pytest.approx(checkpoint.model_bytes(llama), rel=0.05)
    few, many = (needed(recipe(llama, memory="blocks", data__activations="disk", data__nsamples=count), tmp_path / "out") for count in (900, 1000))
    assert many - few == 100 * 32 * 256 * 4  # tokens, hidden numbers, bytes
    kept, again, auto = (
        needed(recipe(llama, memory="blocks", data__activations=way, data__nsamples=1000), tmp_path / "out")
        for way in ("memory", "recompute", "auto")
    )
    assert kept == again == auto < many
    whole = needed(recipe(llama, data__nsamples=1000), tmp_path / "out")
    assert kept - whole == 8 * 64 * 320 * 4  # 512 tokens of the text, vocabulary, bytes
    monkeypatch.setattr(blocks, "HELD", 1 << 20)
    assert needed(recipe(llama, memory="blocks", data__nsamples=1000), tmp_path / "out") == many


def test_a_full_disk_is_told_and_what_lies_there_already_counts(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(llama, quant__packer="rtn", eval__max_tokens=64)
    need = needed(asked, tmp_path / "out")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": need - 1000}))
    with pytest.raises(OutputError, match="the run writes up to"):
        pipeline.run(asked, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    (tmp_path / "out.partial" / "blocks-of-an-earlier-attempt").mkdir(parents=True)
    (tmp_path / "out.partial" / "lock").touch()
    (tmp_path / "out.partial" / "blocks-of-an-earlier-attempt" / "x").write_bytes(bytes(1000))
    assert pipeline.run(asked, tmp_path / "out")["packed"]
