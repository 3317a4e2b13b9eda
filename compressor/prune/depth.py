"""Pruning whole blocks: those go without which the model's last hidden states change least.

    influence of a block = 1 - mean cosine of the final hidden states with and without it

Source: the macro influence of FuseGPT (Pang et al., 2024, arXiv 2411.14507). Blocks go one at a time and the rest is measured again after each, on
a few windows of text. A masked block hands its input on; the training loop heals what is left. Price: a forward pass over these windows for each
block that is left, every time one goes. Limits: whole blocks only, so a ratio is met to the nearest block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.linear import find_blocks
from compressor.prune import slicing
from compressor.prune.schedule import Ramp

WINDOWS = 32  # of text that an influence is measured on
BATCH = 8  # windows a forward pass


class DepthPruner:
    """Masks blocks of a model; ids int64 [windows, t]. `keep` says, in the end, which blocks stay."""

    restarts: tuple[int, ...] = ()

    def __init__(self, model: nn.Module, kept: int, ids: Tensor, ramp: Ramp):
        self.model, self.kept, self.ids, self.ramp = model, kept, ids[:WINDOWS], ramp
        blocks = find_blocks(model)[1]
        self.mask = torch.ones(len(blocks), device=next(model.parameters()).device)
        self.alive = [True] * len(blocks)  # the mask as the hooks read it
        self.hooks = [block.register_forward_hook(self._hook(i), with_kwargs=True) for i, block in enumerate(blocks)]

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
        def skip(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.alive[index]:
                return output
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return skip

    def tensors(self) -> dict[str, Tensor]:
        return {"blocks": self.mask}

    def prune(self, step: int) -> None:
        self.hold()
        wanted = len(self.mask) - int((len(self.mask) - self.kept) * self.ramp.share(step) + 1e-9)
        while sum(self.alive) > wanted:
            scores = self.influences()
            self.mask[min(scores, key=lambda i: scores[i])] = 0
            self.hold()

    def observe(self, step: int) -> None:
        """Influences are measured when a block goes, not from gradients."""

    def hold(self) -> None:
        self.alive = [bool(m) for m in self.mask.tolist()]

    @torch.no_grad()
    def influences(self) -> dict[int, float]:
        """The macro influence of every block that is alive, by its number."""
        was, alive, out = self.model.training, list(self.alive), {}
        self.model.eval()
        try:
            whole = self._hidden()
            for index in [i for i, on in enumerate(alive) if on]:
                self.alive = [on and i != index for i, on in enumerate(alive)]
                cosines = [nn.functional.cosine_similarity(a, b, dim=-1) for a, b in zip(whole, self._hidden(), strict=True)]
                out[index] = 1 - float(torch.cat(cosines).mean())
        finally:
            self.alive = alive
            self.model.train(was)
        return out

    def _hidden(self) -> list[Tensor]:
        """Final hidden states of the windows, float32 [batch, t, d] each."""
        body: Any = getattr(self.model, "base_model", self.model)
        return [body(input_ids=part.to(self.mask.device), use_cache=False).last_hidden_state.float() for part in self.ids.split(BATCH)]

    def keep(self) -> list[int]:
        return [i for i, on in enumerate(self.alive) if on]

    def detach(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()

    def finish(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Drop the masked blocks; low-rank paths become dense linears of this dtype."""
        slicing.drop_blocks(model, self.keep())
        slicing.dissolve(model, dtype)


def kept_blocks(count: int, ratio: float) -> int:
    """Blocks that stay of `count`; RecipeError when the ratio takes none or all."""
    kept = round(count * (1 - ratio))
    if not 0 < kept < count:
        choice = f"choose between {1 / count:.0%} and {1 - 1 / count:.0%}" if count > 1 else "a model of one block has none to spare"
        raise RecipeError(f"a depth ratio of {ratio:.0%} takes {count - kept} of {count} blocks: {choice}")
    return kept
