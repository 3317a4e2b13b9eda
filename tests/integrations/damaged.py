"""A folder that somebody damaged must end in one sentence."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import ModelError


def refuses(load: Callable[[Path], Any], folder: Path, place: Path, damage: Callable[[dict[str, Tensor]], Any], words: str) -> None:
    """`load` of a copy of the folder, whose tensors `damage` has changed, raises one sentence that names it and matches `words`."""
    broken = Path(shutil.copytree(folder, place))
    tensors = load_file(broken / "model.safetensors")
    damage(tensors)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words) as error:
        load(broken)
    assert "\n" not in str(error.value)
    assert str(broken) in str(error.value)
