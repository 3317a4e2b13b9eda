"""The tensors of a dense folder by the names of the model, read from its mapped shards a few at a time and copied, so that no page of a file
stays once they are read.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from compressor.errors import ModelError
from compressor.export import shards
from compressor.pipelines import checkpoint


class Source:
    """A dense folder. `dtypes` and `shapes` of its tensors are known from the headers, by the names in the files.

    prefix: what the names of the model have before those of files that were saved from the body alone (`model.` in LLaMA).
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        self.where: dict[str, Path] = {}
        self.headers: dict[str, Tensor] = {}
        for path in checkpoint.weight_files(folder):
            found = shards.read_headers(folder, [path])
            self.headers |= found
            self.where |= dict.fromkeys(found, path)

    def key(self, name: str) -> str | None:
        """What the files call a tensor of the model; None if they have none of that name."""
        short = name.removeprefix(f"{self.prefix}.") if self.prefix else name
        return next((key for key in (name, short, name.replace("lm_head.", "embed_out.")) if key in self.where), None)  # the last is GPT-NeoX's

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in the stored dtype. ModelError for one that is not there."""
        keys = {name: self.key(name) for name in names}
        if lacking := sorted(name for name, key in keys.items() if key is None):
            raise ModelError(f"{self.folder} lacks weights, they would be random: {', '.join(lacking[:3])}{' …' if len(lacking) > 3 else ''}")
        places = {name: (self.where[key], key) for name, key in keys.items() if key is not None}
        reader = shards.Reader()  # goes, with its pages, when these are read
        try:
            for name, (path, key) in places.items():
                yield name, reader.get(path, key)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.folder} cannot be read: {error}") from None

    def largest(self, names: Iterable[str]) -> Iterator[tuple[str, float]]:
        """(name, its largest magnitude), tensor by tensor; infinite where a tensor holds NaN or infinity."""
        for name, tensor in self.read(names):
            if tensor.is_floating_point() and tensor.numel():
                low, high = tensor.aminmax()  # NaN comes through
                most = torch.maximum(-low, high).float()
                yield name, float(most) if bool(most.isfinite()) else float("inf")
