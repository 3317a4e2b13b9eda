"""The cubic ramp of gradual pruning: fast while much can go, slow near the target (Zhu and Gupta, 2017, arXiv 1710.01878, equation 1)."""


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
