"""The cubic ramp of gradual pruning: fast while much can go, slow near the target (Zhu and Gupta, 2017, arXiv 1710.01878, equation 1)."""

from dataclasses import dataclass

from compressor.errors import RecipeError
from compressor.recipe import Prune


def cubic(progress: float, first: float, last: float) -> float:
    """The ratio at `progress` of the way: `first` at 0 and before, exactly `last` at 1 and after."""
    if progress >= 1:
        return last
    return last + (first - last) * (1 - max(progress, 0.0)) ** 3


def events(start: int, end: int, count: int) -> tuple[int, ...]:
    """`count` steps spread evenly from `start` to `end`, both included, ascending and without repetition."""
    if count < 2 or end <= start:
        return (end,)
    return tuple(sorted({round(start + (end - start) * i / (count - 1)) for i in range(count)}))


def shares(options: Prune, begin: float, end: float) -> tuple[float, float]:
    """First and last prune as shares of the steps: what is given, else `begin` and `end`. RecipeError if the first would come after the last."""
    first, last = begin if options.begin is None else options.begin, end if options.end is None else options.end
    if first > last:
        raise RecipeError(f"prune.begin={first:g} comes after the end of the ramp, {last:g} of the steps: give prune.end too")
    return first, last


@dataclass(frozen=True)
class Ramp:
    """When how much is gone: prunes at every `every`-th step from `begin`, the last one at step `end`."""

    begin: int
    end: int
    every: int

    def share(self, step: int) -> float:
        """Of what is to be removed, how much is to be gone at `step`, 0 to 1."""
        if step >= self.end:
            return 1.0
        if step < self.begin or step % self.every:
            return 0.0
        return cubic((step - self.begin) / (self.end - self.begin), 0.0, 1.0)
