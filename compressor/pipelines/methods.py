"""Which methods a recipe may name, and which of them fit together."""

from dataclasses import asdict

from compressor.errors import RecipeError
from compressor.kernels import layout
from compressor.pipelines.packers import PACKERS
from compressor.pipelines.tuners import TUNERS
from compressor.recipe import KEPT, Prune, Quant, Recipe
from compressor.specs import parse_quant
from compressor.tune.kgrid import GRIDS


def check_names(recipe: Recipe) -> None:
    """RecipeError for a packer or tuner that does not exist, and for an option that the packer would ignore."""
    if recipe.quant.packer not in (*PACKERS, "none", KEPT):
        raise RecipeError(f"packer {recipe.quant.packer!r} is unknown; choose {' or '.join(PACKERS)}, or none with --prune")
    if recipe.tune.method not in ("none", *TUNERS):
        raise RecipeError(f"tuner {recipe.tune.method!r} is unknown; choose none, {', '.join(TUNERS)}")
    if recipe.quant.packer in ("none", KEPT):
        if idle := [key for key, value in asdict(Quant()).items() if key != "packer" and getattr(recipe.quant, key) != value]:
            raise RecipeError(f"{idle[0]}={getattr(recipe.quant, idle[0])} says how to pack, and nothing is packed: add --quant, for example 3bit")
        return
    if recipe.quant.bits == 8 and PACKERS[recipe.quant.packer].table:
        raise RecipeError(f"packer {recipe.quant.packer} makes tables of 4, 8 or 16 entries: choose 2, 3 or 4 bits")
    check_kinds(recipe.quant)
    given, usual = asdict(recipe.quant), asdict(Quant())
    heeded = PACKERS[recipe.quant.packer].heeds
    idle = [key for key in given if key not in heeded and given[key] != usual[key]]
    if "group" in heeded and given["gpr"] is not None and given["group"] != usual["group"]:
        raise RecipeError(f"group={given['group']} and gpr={given['gpr']} both say how long groups are: give one of them")
    if idle:
        hint = "; tables go by --gpr" if idle[0] == "group" else ""
        raise RecipeError(f"{idle[0]}={given[idle[0]]} means nothing to packer {recipe.quant.packer}: leave it out{hint}")


def check_spec(spec: str, kind: Quant) -> None:
    """RecipeError for a way to pack, such as w3g64, that says what its packer does not heed."""
    idle = sorted(parse_quant(spec).keys() - PACKERS[kind.packer].heeds)
    if idle:
        raise RecipeError(f"{spec} says {idle[0]}, which means nothing to packer {kind.packer}: leave it out")


def check_kinds(quant: Quant) -> None:
    """RecipeError for a linear's own packer that does not exist, or that makes tables where others make grids: no format holds both."""
    for spec in dict.fromkeys(quant.layers.values()):
        kind = quant.but(spec)
        if kind.packer not in PACKERS:
            raise RecipeError(f"quant.layers: packer {kind.packer!r} is unknown; choose {' or '.join(PACKERS)}")
        check_spec(spec, kind)
        if PACKERS[kind.packer].table != PACKERS[quant.packer].table:
            raise RecipeError(f"quant.layers: {kind.packer} and {quant.packer} make tables and grids, which no format holds in one folder")
        if PACKERS[kind.packer].table and kind.bits == 8:
            raise RecipeError("quant.layers: tables have 2, 3 or 4 bits")


def check_heeded(options: Prune, heeded: set[str]) -> None:
    """RecipeError for a key of the pruning section that was changed and says nothing to the method."""
    idle = [key for key, value in asdict(Prune()).items() if key not in {"method", "ratio", "pattern", *heeded} and getattr(options, key) != value]
    if idle:
        raise RecipeError(f"prune.{idle[0]}={getattr(options, idle[0])} means nothing to {options.method} here: leave it out")


def check_zeros_stay(method: str) -> None:
    """RecipeError for a tuner that cannot keep a pruned weight at exactly zero."""
    if method == "qalora":
        raise RecipeError(f"tuner {method} moves the zeros of whole groups, and would bring pruned weights back: use --tune peqa")


def check_methods(recipe: Recipe) -> None:
    """RecipeError for a packer or tuner that does not exist, and for a tuner of values that the packer does not make."""
    check_names(recipe)
    packer, tuner = recipe.quant.packer, recipe.tune.method
    if packer == "none" and recipe.prune.method == "none":
        raise RecipeError("nothing is asked for: give --quant, for example 3bit, or --prune, for example loraprune:30%")
    if packer == "none" and tuner != "none":
        raise RecipeError(f"tuner {tuner} trains what a packer makes, and nothing is packed: add --quant, for example 3bit")
    if packer == KEPT and (tuner == "none" or recipe.prune.method != "none"):
        raise RecipeError("a packed model that keeps its weights is tuned and not pruned: give --tune, for example peqa, and no --prune")
    if recipe.tune.distill and (tuner == "none" or packer == KEPT):
        told = "nothing is tuned: add --tune" if tuner == "none" else "that is not at hand where a packed model is tuned: start from the dense one"
        raise RecipeError(f"tune.distill={recipe.tune.distill} learns from the dense model, and {told}")
    if packer in ("none", KEPT):
        return
    if (grid := recipe.tune.grid) != "none" and (not recipe.quant.symmetric or recipe.quant.bits > GRIDS[grid][2]):
        raise RecipeError(f"grid={grid} holds symmetric weights of at most {GRIDS[grid][2]} bits: give fewer bits and --sym, or another grid")
    if tuner == "qalora" and any(kind.bits not in layout.BITS for kind in recipe.quant.kinds()):
        raise RecipeError("tuner qalora leaves zeros that are no integers, which are stored beside codes of 2, 3 or 4 bits: give fewer bits")
    if tuner == "none" or TUNERS[tuner].table in (None, PACKERS[packer].table):
        return
    made, tuned = ("tables", "scales") if PACKERS[packer].table else ("scales", "tables")
    tuners = " or ".join(name for name, kind in TUNERS.items() if kind.table in (None, PACKERS[packer].table))
    packers = " or ".join(name for name, kind in PACKERS.items() if kind.table == TUNERS[tuner].table)
    raise RecipeError(f"tuner {tuner} trains {tuned}, but packer {packer} makes {made}: use --tune {tuners}, or the packer {packers}")
