"""Structured pruning of an encoder: FFN channels, and attention heads where the folder may be one that only we load.

A stock configuration of BERT can say how wide its FFN is, but not that it has fewer heads of the same size: there a head is as wide as the model
divided by their number. So with `uniform`, the default, heads stay and the FFN alone is narrowed, which can take up to two thirds of the blocks'
weights, and any server loads the result. Without it heads go too, as many from every block, and config.json gets the key that only our loader reads.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from compressor.prune import slicing
from compressor.prune.fisher import Gradients
from compressor.prune.obert import Settings
from compressor.prune.structured_obert import StructuredObert, part_weights
from compressor.prune.unit_masks import UnitMasks
from compressor.prune.units import Family, families
from compressor.prune.widths import Widths, check_near, choose, multiple_of
from compressor.recipe import Prune


class Units:
    """The units of a model that may go, their masks while it trains, and the cut at the end. RecipeError for a ratio that no widths come near."""

    def __init__(self, model: nn.Module, options: Prune):
        self.model, self.options = model, options
        self.last = self.widths_of(options.ratio)
        check_near(self.last, options.ratio, "leave more, or set prune.uniform to false" if options.uniform else "choose another ratio")
        self.families: list[Family] = [f for f in families(model) if f.kind == "ffn" or self.last.heads < f.count]
        self.weights = part_weights(model, self.families)
        self.masks: UnitMasks | None = None

    def widths_of(self, ratio: float) -> Widths:
        multiple = self.options.multiple or multiple_of(families(self.model)[1].count)
        return choose(self.model, ratio, "group", multiple, lambda queries, keys: not self.options.uniform)

    def widths(self, ratio: float) -> Mapping[str, int]:
        """How many units of each family stay, never fewer than at the end."""
        now = self.last if ratio >= self.options.ratio else self.widths_of(ratio)
        return {f.key: max(now.kept(f), self.last.kept(f)) for f in self.families}

    def pruner(self, gradients: Gradients, schedule: tuple[tuple[int, float], ...], settings: Settings) -> StructuredObert:
        """The pruner, with masks on the model until `detach`."""
        self.masks = UnitMasks(self.model, self.families)
        return StructuredObert(self.model, self.masks, gradients, schedule, self.widths, settings)

    def detach(self) -> None:
        """Take the masks off the model."""
        if self.masks is not None:
            self.masks.remove()

    def cut(self, total: int) -> dict[str, Any]:
        """Cut out what the masks took; facts for the report. total: the weights there were."""
        assert self.masks is not None
        slicing.cut(self.model, self.families, self.masks.masks, next(self.model.parameters()).dtype)
        left = sum(w.numel() for w in part_weights(self.model, families(self.model)).values())
        config: Any = self.model.config
        own = {"widths": getattr(config, slicing.WIDTHS)} if hasattr(config, slicing.WIDTHS) else {}
        return {"ratio": 1 - left / total, "heads": self.last.heads, "ffn": self.last.ffn} | own
