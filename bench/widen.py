"""A copy of a model folder whose FFN is as wide as groups need, with channels of zeros: the same function, so that every library can pack it.

stories260K's 172 channels divide by no group size that the peers of bench/quality.py take; 192 do. All arms pack and are charged for the wide copy.

    python bench/widen.py ../shared/models/stories260K DIR/stories260K --multiple 64
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad


def widen(source: Path, folder: Path, multiple: int) -> tuple[int, int]:
    """Copies a LLaMA-like folder (model.safetensors with gate, up and down projections); the FFN's width before and after."""
    config = json.loads((source / "config.json").read_text("utf-8"))
    width = config["intermediate_size"]
    more = -width % multiple
    shutil.copytree(source, folder, dirs_exist_ok=True)

    def wide(name: str, t: Tensor) -> Tensor:
        if name.endswith(("gate_proj.weight", "up_proj.weight")):  # [channels, hidden]
            return pad(t, (0, 0, 0, more))
        return pad(t, (0, more)) if name.endswith("down_proj.weight") else t

    tensors = {name: wide(name, t) for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": width + more}, indent=2), "utf-8")
    return width, width + more


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("source", type=Path)
    ap.add_argument("folder", type=Path)
    ap.add_argument("--multiple", type=int, default=64)
    a = ap.parse_args()
    before, after = widen(a.source, a.folder, a.multiple)
    print(f"{a.folder}: {before} channels of each FFN became {after}")


if __name__ == "__main__":
    main()
