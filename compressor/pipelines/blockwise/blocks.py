"""A model of which one decoder block at a time has weights.

The model is built without weights (meta device); what lies outside its blocks is loaded for good, a large embedding or head in 16 bits on a CPU.
A block gets its weights when it is visited, dense ones from the mapped shards of the source and packed ones from the file that packing wrote, and
loses them afterwards. Whatever runs the whole model still works, each block being loaded on demand in every pass; `logits` is the fast way for
many windows: all of them go through a block before the next one is loaded, and then through what follows the blocks, once more by the model's own
code, with blocks that hand over what they are given.

Price: the model is read once for every walk. Limits: causal models whose blocks take hidden states and return them, nothing else (FAMILIES, each
tested against the model in one piece); nothing can be trained.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linear, memory
from compressor.errors import ModelError
from compressor.packed import PackedWeight
from compressor.pipelines import journal
from compressor.pipelines.blockwise.hidden import Hidden, Recomputed, Spool
from compressor.pipelines.blockwise.source import Source
from compressor.pipelines.calibrate import BATCH_TOKENS, Calibration

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt_neox", "olmo2", "granite", "starcoder2", "stablelm",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
)  # fmt: skip
HELD = 256 << 20  # bytes of hidden states that wait in memory if nothing else is asked for
KEEPING = ("auto", "memory", "disk", "recompute")


class Blocks:
    """The blocks of `model`, and where their weights are.

    scratch: a folder for hidden states; keeping: one of KEEPING. packed: the folder of packed blocks, once there is one. rounding: the dtype that
    everything but the weights of the linears named is rounded to when it is loaded, once the folder's is. turn(index, block): changes a block's
    weights when they are loaded, before they are rounded. tell(done, blocks): is called after each
    block of a walk that gives logits.
    """

    def __init__(self, model: nn.Module, source: Source, device: torch.device, compute: torch.dtype) -> None:
        self.model, self.source, self.device, self.compute = model, source, device, compute
        self.prefix, self.list = linear.find_blocks(model)
        self.scratch: Path | None = None
        self.keeping = "auto"
        self.packed: Callable[[int], Path] | None = None
        self.rounding: tuple[torch.dtype, Collection[str]] | None = None
        self.turn: Callable[[int, nn.Module], None] | None = None
        self.tell: Callable[[int, int], None] | None = None
        self._visited: set[int] = set()
        self._skipping = False
        self._walks = 0
        self._hooks = [hook for index, block in enumerate(self.list) for hook in self._on_demand(index, block)]
        for module in (model, *self.list):
            module.__dict__["blockwise"] = self

    @staticmethod
    def of(model: nn.Module) -> "Blocks | None":
        """What manages this model or block, if anything does."""
        return model.__dict__.get("blockwise")

    @staticmethod
    @contextlib.contextmanager
    def telling(model: nn.Module, advance: Callable[[int, str], None]) -> Iterator[None]:
        """Where one block of `model` at a time is in memory, a progress bar hears of each block of the walks that give logits."""
        blocks = Blocks.of(model)
        if blocks is not None:
            blocks.tell = lambda done, total: advance(0, f"block {done} of {total}")
        try:
            yield
        finally:
            if blocks is not None:
                blocks.tell = None

    @contextlib.contextmanager
    def visit(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights, for as long as it lasts."""
        block = self.list[index]
        self._load(index)
        self._visited.add(index)
        try:
            yield block
        finally:
            self._visited.discard(index)
            self._drop(block)
            memory.trim()

    def settle(self) -> None:
        """All blocks with their weights for good: an ordinary model from now on."""
        for hook in self._hooks:
            hook.remove()
        for module in (self.model, *self.list):
            del module.__dict__["blockwise"]
        for index in range(len(self.list)):
            self._load(index)

    def calibration(self, ids: Tensor, part: int | None = None) -> Calibration:
        """Windows int64 [count, seqlen] before the first block, whose hidden states are kept where `keeping` says; part: as Calibration has it."""
        batches = ids.split(max(1, min(len(ids), BATCH_TOKENS // ids.shape[1])))
        config: Any = self.model.config

        def forward(index: int, stop: type[Exception]) -> None:
            with contextlib.suppress(stop), torch.no_grad():
                self.model(input_ids=batches[index].to(self.device), use_cache=False)

        keeping = self.keeping
        if keeping == "auto":
            keeping = "disk" if ids.numel() * config.hidden_size * self.compute.itemsize > HELD and self.scratch is not None else "memory"
        hidden: Hidden | Recomputed = []
        if keeping == "disk" and self.scratch is not None:
            self._walks += 1
            hidden = Spool(self.scratch / f"walk-{self._walks}")
        elif keeping == "recompute":
            hidden = Recomputed(self.list, forward)
        with self.skipping():
            return Calibration(self.model, self.list, ids, hidden, part)

    def waiting(self, name: str) -> Hidden:
        """What tensors of a walk wait in, as its hidden states do: files below `scratch`, unless memory was asked for."""
        self._walks += 1
        return [] if self.keeping == "memory" or self.scratch is None else Spool(self.scratch / f"{name}-{self._walks}")

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Callable[[slice], Tensor]:
        """Windows int64 [count, window] through all blocks; the function returned gives the logits [.., window, vocab] of some of them."""
        if self.keeping == "recompute":  # nothing may be kept: every block once for each part
            return lambda part: self.model(input_ids=rows[part].to(self.device), use_cache=False).logits
        walk = self.calibration(rows)
        for index in range(len(self.list)):
            with self.visit(index) as block:
                walk.run(block, index, keep=True)
            if self.tell is not None:
                self.tell(index + 1, len(self.list))
        size, held = len(walk.batches[0]), dict[int, Tensor]()  # the batches that the last part needed

        def tail(part: slice) -> Tensor:
            places = range(len(rows))[part]
            needed = {at: held[at] if at in held else walk.hidden[at] for at in sorted({place // size for place in places})}
            held.clear()
            held.update(needed)
            states = torch.stack([needed[place // size][place % size] for place in places])
            with self.skipping(states.to(self.device)):
                out: Any = self.model(input_ids=rows[part].to(self.device), use_cache=False)
            return out.logits

        return tail

    @contextlib.contextmanager
    def skipping(self, last: Tensor | None = None) -> Iterator[None]:
        """Meanwhile blocks hand over the hidden states that they are given; the last one `last` in their place, if that is given."""
        for block in self.list:
            block.__dict__["forward"] = _hand_over
        if last is not None:
            self.list[-1].__dict__["forward"] = lambda *args, **kwargs: last
        self._skipping = True
        try:
            yield
        finally:
            self._skipping = False
            for block in self.list:
                del block.__dict__["forward"]

    def weights(self, dtype: torch.dtype) -> Iterator[dict[str, Tensor | PackedWeight]]:
        """What lies outside the blocks, tied tensors once, then the weights of each block, by name; floats rounded to `dtype`."""
        seen: set[int] = set()
        outside: dict[str, Tensor | PackedWeight] = {}
        for name, tensor in self.model.state_dict().items():
            if not name.startswith(self.prefix + ".") and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                outside[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        yield outside
        yield from (self.block_weights(index, dtype) for index in range(len(self.list)))

    def block_weights(self, index: int, dtype: torch.dtype) -> dict[str, Tensor | PackedWeight]:
        """Weights of one block, by name."""
        start = f"{self.prefix}.{index}."
        with self.visit(index) as block:
            packed = {name: layer.packed() for name, layer in linear.packed_linears(block).items()}
            inside = tuple(f"{name}." for name in packed)
            dense = {k: t for k, t in block.state_dict().items() if not k.startswith(inside) or k.rpartition(".")[2] == "bias"}
            found: dict[str, Tensor | PackedWeight] = {start + k: t.to(dtype) if t.is_floating_point() else t for k, t in dense.items()}
            return found | {start + name: weight for name, weight in packed.items()}

    def _on_demand(self, index: int, block: nn.Module) -> list[Any]:
        def before(_m: nn.Module, _args: Any) -> None:
            if not self._skipping and index not in self._visited:
                self._load(index)

        def after(_m: nn.Module, _args: Any, _out: Any) -> None:
            if not self._skipping and index not in self._visited:
                self._drop(block)
                memory.trim()

        return [block.register_forward_pre_hook(before), block.register_forward_hook(after)]

    @torch.no_grad()
    def _load(self, index: int) -> None:
        block, start = self.list[index], f"{self.prefix}.{index}."
        packed = linear.packed_linears(block)
        if packed:
            kept = None if self.packed is None else journal.kept(self.packed(index))
            if kept is None:
                raise ModelError(f"the packed block {index} is gone from the work folder; run the same command again")
            for leaf, layer in packed.items():
                shape = (layer.out_features, layer.in_features)
                weight = PackedWeight.from_tensors(journal.under(kept[0], leaf), layer.bits, layer.group, shape)
                for name, tensor in (("words", weight.words), ("learned", weight.learned), ("zero", weight.zero), ("columns", weight.columns)):
                    setattr(layer, name, None if tensor is None else tensor.to(self.device))
        wanted = {start + name: parameter.shape for name, parameter in block.named_parameters() if parameter.is_meta}
        for name, tensor in self.source.read(wanted):
            if tensor.shape != wanted[name]:
                shapes = f"{tuple(tensor.shape)}, and the architecture wants {tuple(wanted[name])}"
                raise ModelError(f"{self.source.folder}: tensor {name} has shape {shapes}")
            place(self.model, name, (tensor if self.turn else self.stored(name, tensor)).to(self.compute).to(self.device))
        if self.turn is not None:
            self.turn(index, block)
            for name in wanted:
                parameter = self.model.get_parameter(name)
                parameter.copy_(self.stored(name, parameter))

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A dense tensor as the folder will hold it, once it is known how."""
        if self.rounding is None or name.removesuffix(".weight") in self.rounding[1]:
            return tensor
        return tensor.to(self.rounding[0])

    def round(self, dtype: torch.dtype, packed: Collection[str]) -> None:
        """From now on whatever stays dense is rounded to `dtype`, as `write.round_to_folder` does; packed: linears that will be packed."""
        self.rounding = (dtype, packed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if not name.startswith(self.prefix + "."):
                    parameter.copy_(parameter.to(dtype))

    def _drop(self, block: nn.Module) -> None:
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
            if isinstance(module, linear.PackedLinear):
                for name, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, name, buffer.to("meta"))


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """The frozen parameter of that name, in place of the one without weights."""
    module, _, leaf = name.rpartition(".")
    model.get_submodule(module).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def _hand_over(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
