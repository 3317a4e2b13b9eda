"""The choice of bits, group size and method for every linear: candidates, what each costs (sensitivity.py), and the best mix for a size or a loss.

    choice = Choice(...); quant = choice.quant()          # recipe.Quant with `layers` filled in
    choice.learn(reached)                                 # after packing: what was lost, so that the next mix comes nearer to the target of loss

A target of bits or bytes asks for the least damage that it allows; a target of loss, to begin with, for the fewest bits whose predicted damage stays
within ln(1 + max_loss) nats. Predictions add up the damages of single units. What is really reached is measured on the packed model; `learn` moves
the allowance by as much as the prediction was wrong. `facts` tells all of it to the report.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from compressor.errors import RecipeError
from compressor.export.shards import SHARD_BYTES
from compressor.pipelines.choose.sensitivity import Unit
from compressor.pipelines.choose.solver import Answer, solve
from compressor.pipelines.methods import check_spec
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Choose, Quant

BITS = (2, 3, 4)
SMALLEST, LARGEST, HALVINGS = 32, 128, 2  # groups that are tried: the recipe's, halved and doubled so often, within these columns
NEAR, TRIES = 0.8, 5  # share of a target of loss that is near enough; packings at most until it is
LINE, SUFFIX, PARTS = 62, 14, 3  # bytes at most: of a place in a header without name and offsets, of what is added to a name; tensors a linear
QUOTED, SCHEME, CONFIG = 20, 460, 520  # of a name in config.json, a scheme, and what all schemes share


def ways(quant: Quant, options: Choose) -> dict[str, Quant]:
    """The candidates by name, each with all its options. RecipeError for one that cannot be tried, or cannot be mixed with the others."""
    table = quant.packer in PACKERS and PACKERS[quant.packer].table
    specs = options.candidates or (tuple(f"{bits}bit" for bits in BITS) if table or quant.gpr is not None else _grids(quant))
    found = {spec: quant.but(spec) for spec in dict.fromkeys(specs)}
    for spec, way in found.items():
        if way.packer not in PACKERS:
            raise RecipeError(f"choose.candidates: packer {way.packer!r} of {spec} is unknown; choose {' or '.join(PACKERS)}")
        check_spec(spec, way)
        if PACKERS[way.packer].fisher:
            raise RecipeError(f"choose.candidates: {way.packer} wants gradients of the whole model for every layer; leave {spec} out")
        if PACKERS[way.packer].table and way.bits == 8:
            raise RecipeError(f"choose.candidates: tables have 2, 3 or 4 bits; leave {spec} out")
    if len({PACKERS[way.packer].table for way in found.values()}) > 1:
        raise RecipeError("choose.candidates mixes grids with tables, which no format holds in one folder: give one kind")
    return found


def _grids(quant: Quant) -> tuple[str, ...]:
    """Widths and group sizes to try, beginning with the recipe's; rows of one scale mix with no groups (readers know one strategy a folder)."""
    if quant.group == -1:
        return (*(f"w{bits}g-1" for bits in BITS), "w8g-1")
    smaller = [quant.group >> i for i in range(1, HALVINGS + 1) if quant.group >> i >= SMALLEST]
    sizes = [quant.group, *smaller, *(quant.group << i for i in range(1, HALVINGS + 1) if quant.group << i <= LARGEST)]
    return (*(f"w{bits}g{size}" for bits in BITS for size in sizes), f"w8g{quant.group}")


@dataclass
class Choice:
    """A target, the units to choose for, and the answer. fixed: bytes of the folder beside what the packed linears store, with `schemes` schemes."""

    options: Choose
    base: Quant
    units: list[Unit]
    fixed: int
    schemes: int = 0
    allowed: float = math.inf  # nats, for a target of loss
    answer: Answer | None = None
    tried: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.options.max_loss is not None:
            self.allowed = math.log1p(self.options.max_loss)

    @property
    def weights(self) -> int:
        return sum(unit.weights for unit in self.units)

    def quant(self) -> Quant:
        """The recipe's options with those of every linear. RecipeError where no mix of the candidates meets a target of size."""
        damage, bits = [[o.damage for o in u.options] for u in self.units], [[o.bits for o in u.options] for u in self.units]
        if self.options.max_loss is not None:
            self.answer = solve(bits, damage, self.allowed) or self._least_damage()  # whether that is too much, measuring will tell
        else:
            self.answer = solve(damage, bits, self.budget())
        if self.answer is None:
            raise RecipeError(self._unreachable())
        spare = self.schemes - self._used(self.answer)
        if self.options.target_size is not None and spare > 0:  # schemes that nobody uses leave room
            better = solve(damage, bits, self.budget() + 8 * spare * SCHEME)
            if better is not None and self._used(better) <= self.schemes - spare:
                self.answer, self.fixed, self.schemes = better, self.fixed - spare * SCHEME, self.schemes - spare
        return self._mixed()

    def _mixed(self) -> Quant:
        chosen = {name: unit.options[pick].specs[0] for unit, pick in self._picked() for name in unit.layers}
        return replace(self.base, layers=chosen)

    def state(self) -> dict[str, Any]:
        """What was found, as JSON, for `settle`."""
        assert self.answer is not None
        return {"answer": asdict(self.answer), "fixed": self.fixed, "schemes": self.schemes, "allowed": self.allowed, "tried": self.tried}

    def settle(self, state: Mapping[str, Any]) -> Quant:
        """The mix that an earlier process ended with, instead of a new one."""
        self.answer, self.fixed, self.schemes = Answer(**state["answer"]), state["fixed"], state["schemes"]
        self.allowed, self.tried = state["allowed"], state["tried"]
        return self._mixed()

    def _least_damage(self) -> Answer:
        picks = [u.options.index(min(u.options, key=lambda o: (o.damage, o.bits))) for u in self.units]
        return Answer(picks, sum(float(u.options[i].bits) for u, i in zip(self.units, picks, strict=True)), 0.0, 0.0)

    def _used(self, answer: Answer) -> int:
        """How many ways to pack an answer mixes."""
        return len({unit.options[pick].specs[0] for unit, pick in zip(self.units, answer.picks, strict=True)})

    def budget(self) -> float:
        """Bits that the packed linears may store."""
        if self.options.target_bits is not None:
            return self.options.target_bits * self.weights
        assert self.options.target_size is not None
        return 8.0 * (self.options.target_size - self.fixed)

    def predicted(self) -> dict[str, Any]:
        """What the answer comes to: bits a weight, bytes of the folder, and the sum of damages (of kl: nats a token)."""
        return self._point([pick for _, pick in self._picked()])

    def learn(self, reached: float) -> bool:
        """Packing raised the loss by `reached` nats: set the allowance of the next try, or that of the best try so far. True: pack again.

        A try is good from NEAR of the loss that was asked for up to all of it. Others move the allowance in proportion, inside what is known
        to be too little and too much; after TRIES the best that kept to the target stands, or the last if none did.
        """
        wanted, mix = math.log1p(self.options.max_loss or 0.0), self.predicted()
        seen = any(row["bits_per_weight"] == mix["bits_per_weight"] and row["reached_loss"] == reached for row in self.tried)
        self.tried.append(mix | {"allowed": self.allowed, "reached_loss": reached})
        good = [row["allowed"] for row in self.tried if row["reached_loss"] <= wanted]
        best_of_all = reached > wanted and self.answer is not None and self.answer.picks == self._least_damage().picks
        if NEAR * wanted <= reached <= wanted or (best_of_all and not good):
            return False
        if len(self.tried) >= TRIES or seen:
            best = max(good, default=self.allowed)
            again, self.allowed = best != self.allowed, best
            return again and len(self.tried) <= TRIES
        low, high = max(good, default=0.0), min((row["allowed"] for row in self.tried if row["reached_loss"] > wanted), default=math.inf)
        guess = self.allowed * (0.5 + 0.5 * NEAR) * wanted / max(reached, 0.1 * wanted)
        self.allowed = guess if low < guess < high else (low + high) / 2 if math.isfinite(high) else guess
        return True

    def facts(self) -> dict[str, Any]:
        """For the report: target, prediction, what uniform packing would come to, every unit's options and the one chosen, and the solver's word."""
        assert self.answer is not None
        targets = {key: value for key in ("target_bits", "target_size", "max_loss") if (value := getattr(self.options, key)) is not None}
        specs = dict.fromkeys(spec for unit in self.units for option in unit.options for spec in option.specs)
        alike = {spec: [_index(unit, spec) for unit in self.units] for spec in specs}
        whole = {spec: picks for spec, found in alike.items() if len(picks := [i for i in found if i is not None]) == len(found)}
        uniform = [{"spec": spec} | self._point(picks) for spec, picks in whole.items()]
        units = [
            {
                "layers": list(unit.layers), "chosen": unit.options[pick].specs[0],
                "options": [{"spec": o.specs[0], "bits": o.bits / unit.weights, "damage": o.damage} for o in unit.options],
            }
            for unit, pick in self._picked()
        ]  # fmt: skip
        solver = {"gap": self.answer.gap if math.isfinite(self.answer.gap) else None, "seconds": round(self.answer.seconds, 3)}
        out = {"target": targets, "measure": self.options.measure, "predicted": self.predicted(), "uniform": uniform, "units": units}
        return out | {"solver": solver} | ({"tried": self.tried} if self.tried else {})

    def _picked(self) -> list[tuple[Unit, int]]:
        assert self.answer is not None
        return list(zip(self.units, self.answer.picks, strict=True))

    def _point(self, picks: list[int]) -> dict[str, Any]:
        bits = sum(unit.options[pick].bits for unit, pick in zip(self.units, picks, strict=True))
        loss = math.fsum(unit.options[pick].damage for unit, pick in zip(self.units, picks, strict=True))
        return {"bits_per_weight": bits / self.weights, "folder_bytes": self.fixed + -(-bits // 8), "loss": loss}

    def _unreachable(self) -> str:
        lightest = [u.options.index(min(u.options, key=lambda o: o.bits)) for u in self.units]
        point = self._point(lightest)
        if self.options.target_bits is not None:
            least = f"{point['bits_per_weight']:.3f} bits a weight that the smallest candidates take"
            return f"target_bits={self.options.target_bits:g} is below the {least}: ask for more"
        least = f"{point['folder_bytes']:,} that the smallest candidates come to"
        return f"target_size={self.options.target_size:,} bytes is below the {least}: ask for more"


def _index(unit: Unit, spec: str) -> int | None:
    return next((i for i, option in enumerate(unit.options) if spec in option.specs), None)


def overhead(packed: Iterable[str], dense: Iterable[str], total: int, schemes: int, parts: int = PARTS) -> int:
    """Bytes at most of a folder's headers, index and schemes: a line a tensor of these linears and of those that stay dense, and their names.

    total: bytes of the folder, about; schemes: how many different ways to pack there may be; parts: tensors of a packed linear.
    """
    line = LINE + 2 * len(str(total))
    names, rest = list(packed), list(dense)
    entries = sum(parts * (len(name) + SUFFIX + line) for name in names) + sum(len(name) + line for name in rest)
    index = entries if total > SHARD_BYTES else 0
    return entries + index + sum(len(name) + QUOTED for name in names) + CONFIG + SCHEME * schemes


def vocabulary(model: nn.Module) -> int:
    """Logits a token."""
    config: Any = model.config
    return int(getattr(config, "vocab_size", 0) or 1)
