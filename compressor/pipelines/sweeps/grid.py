"""grid.yaml -> experiments: every combination of the axes' values on top of one base, each a checked recipe with an id of its own.

    base: {nsamples: 32, eval.max_tokens: 16384}     # the same for all
    quant: [3bit, w2g64, sketch3]                    # axes: words of `run`'s flags …
    tune.method: [none, peqa]                        # … or keys of the recipe
    points: [{quant: 4bit, tune: lora}]              # more, one by one
    exclude: [{quant.bits: 2, tune: none}]           # these not; a list of values means any of them

A combination that cannot be is an experiment with a reason in place of a recipe, so that it is shown and never run. What the base says of another
packer or tuner than a point's does not hold for that point; what an axis says does, and is refused where it means nothing. Two combinations that
make one recipe are one experiment. The id ends in a digest of the recipe, of the model's bytes, of local texts and of this program's version, but
not of the device: the same experiment has the same id on every machine. Recipes are checked whole, so that a base may say what makes sense only
with a point's keys. Limits: LIMIT combinations; texts of the hub and folders count by name; what YAML knows and JSON does not is a word (dates).
"""

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from compressor import __version__
from compressor.errors import RecipeError
from compressor.pipelines import checkpoint, yaml_text
from compressor.pipelines.choose import stage as choosing
from compressor.pipelines.cli import FLAGS, value_of
from compressor.pipelines.job import default_output
from compressor.pipelines.methods import check_methods
from compressor.pipelines.packers import PACKERS, needs
from compressor.pipelines.tuners import OWN, TUNERS, resolved
from compressor.recipe import Prune, Quant, Recipe, Tune
from compressor.specs import parse_prune, parse_quant

LIMIT = 10_000  # combinations of a grid
OTHER = ("base", "points", "exclude")  # keys of a grid that are no axes
SWITCHES = ("absolute", "finetune", "per_layer")  # flags that are there or not, and stand for a word of the recipe
Keys = dict[str, Any]  # section.key -> value


@dataclass(frozen=True)
class Experiment:
    """A recipe, or the reason why there is none; keys: what varies in the sweep. label is the id without its digest."""

    id: str
    label: str
    keys: Keys
    recipe: Recipe | None
    reason: str | None = None


class Grid:
    """The axes, points and base of one grid file for one model. RecipeError for keys that do not exist."""

    def __init__(self, model: str, grid: Any, overrides: Keys | None = None):
        grid, overrides = _words(grid), _words(overrides or {})
        if not isinstance(grid, dict):
            raise RecipeError(f"a grid is a mapping of recipe keys to lists of values, not {type(grid).__name__}")
        self.base = Recipe(model=model).to_dict()
        _put(self.base, _spelt(_section(grid, "base", dict)) | _spelt(overrides))
        axes = {str(key): value if isinstance(value, list) else [value] for key, value in _flat(_without(grid, OTHER)).items()}
        self.points: list[Any] = _section(grid, "points", list)
        self.exclude: list[Any] = _section(grid, "exclude", list)
        if empty := next((key for key, values in axes.items() if not values), None):
            raise RecipeError(f"axis {empty} of the grid has no values: give it some, or leave it out")
        if not axes and not self.points:
            raise RecipeError("the grid asks for nothing: give it an axis such as quant: [4bit, 3bit, 2bit], or points")
        asked = [{axis: value} for axis, values in axes.items() for value in values] + [self._point(point) for point in self.points]
        self.axes, self.spelt = axes, tuple(dict.fromkeys(key for choice in asked for key in _quiet(choice)))
        if both := next((key for key in _spelt(overrides) if key in self.spelt), None):
            raise RecipeError(f"{both} is what the grid varies: change it there, or leave it out of the command")
        self.fingerprint, self._texts = checkpoint.fingerprint(checkpoint.resolve(model)), dict[str, str]()
        self._patterns = [_pattern(pattern) for pattern in self.exclude]

    @property
    def seed(self) -> int:
        """For a sampler: the base's, if it is one."""
        seed = self.base["seed"]
        return seed if isinstance(seed, int) and 0 <= seed < 1 << 31 else Recipe().seed

    def choices(self) -> Iterator[Keys]:
        """Every combination of the axes, then the points, as they are written."""
        count = math.prod(len(values) for values in self.axes.values())
        if count > LIMIT:
            raise RecipeError(f"the grid has {count:,} combinations, more than {LIMIT:,}: give fewer values, or --trials N to try only N of them")
        if self.axes:
            yield from (dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values()))
        yield from (self._point(point) for point in self.points)

    def experiments(self) -> list[Experiment]:
        """Each experiment once. RecipeError if none of them can be run."""
        found = dict[str, Experiment]()
        for choice in self.choices():
            experiment = self.experiment(choice)
            if experiment is not None:
                found.setdefault(experiment.id, experiment)
        if not found:
            raise RecipeError("the grid excludes all of its experiments: take a pattern out of `exclude`")
        if all(experiment.recipe is None for experiment in found.values()):
            raise RecipeError(f"no experiment of the grid can be run; the first: {next(iter(found.values())).reason}")
        varying = [key for key in self.spelt if len({json.dumps(e.keys.get(key), default=str) for e in found.values()}) > 1] or list(self.spelt)
        return [replace(e, keys={key: e.keys.get(key) for key in varying}) for e in found.values()]

    def experiment(self, choice: Keys) -> Experiment | None:
        """What a combination asks for; None if the grid excludes it."""
        try:
            asked = _spelt(choice)
            recipe = _with(self.base, asked)
            flat = _values(recipe.to_dict())
            if self._excluded(flat):
                return None
            check_methods(recipe)
            choosing.check(recipe)
            resolved(recipe.tune)
        except RecipeError as error:
            flat = _values(self.base) | _quiet(choice)
            if self._excluded(flat):
                return None
            label = "-".join(re.sub(r"[^\w.%-]+", "_", str(value))[:24] for value in choice.values())[:80]
            name = f"{label}-{_digest(sorted((key, repr(value)) for key, value in choice.items()))}"
            return Experiment(name, label, {key: flat.get(key) for key in self.spelt}, None, str(error))
        label = _label(recipe)
        idle = _idle(recipe)
        return Experiment(f"{label}-{self._known(recipe)}", label, {key: None if key in idle else flat.get(key) for key in self.spelt}, recipe)

    def _point(self, point: Any) -> Keys:
        if not isinstance(point, dict) or not point:
            raise RecipeError(f"a point of the grid is a mapping of recipe keys to values, such as {{quant: 3bit, tune: peqa}}, not {point!r}")
        return _flat(point)

    def _excluded(self, flat: Keys) -> bool:
        return any(all(any(spelt.items() <= flat.items() for spelt in options) for options in pattern) for pattern in self._patterns)

    def _known(self, recipe: Recipe) -> str:
        """Digest of what decides the result; what no stage would read does not count."""
        if recipe.tune.method == "none":
            recipe = recipe.with_(tune=Tune())
        if recipe.prune.method == "none":
            recipe = recipe.with_(prune=Prune())
        if recipe.quant.packer in PACKERS and not needs(recipe.quant) and not recipe.choose.active:
            recipe = recipe.with_(data__nsamples=1, data__calib=None)
        values = recipe.with_(tune=resolved(recipe.tune), device="auto").to_dict() | {"model": self.fingerprint, "compressor": __version__}
        values["data"] |= {key: self._text(values["data"][key]) for key in ("data", "outside", "calib") if values["data"][key] is not None}
        values["eval"]["tasks"] = [self._text(name) for name in values["eval"]["tasks"]]
        return _digest(values)

    def _text(self, name: str) -> str:
        """A text by its content, if it is a local file."""
        if name not in self._texts:
            path = Path(name)
            try:
                self._texts[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else name
            except OSError as error:
                raise RecipeError(f"{name} cannot be read: {error.strerror}") from None
        return self._texts[name]


def parse_set(settings: list[str]) -> Keys:
    """--set KEY=VALUE, several -> keys; values are read as YAML."""
    out: Keys = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {setting!r} is not understood; write for example --set quant.group=64")
        try:
            out[key] = yaml_text.parse(text)
        except ValueError:
            out[key] = text
    return out


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _label(recipe: Recipe) -> str:
    """w3g128-gptq-peqa: the name of the run's folder without the model's."""
    bare = default_output(recipe.with_(quant=Quant(packer="none"), prune=Prune(), tune=Tune(), save="folder"))
    rest = default_output(recipe).name.removeprefix(bare.name).strip("-") or "dense"
    return re.sub(r"[^\w.%-]+", "_", rest) + ("" if recipe.quant.symmetric or recipe.quant.packer not in PACKERS else "-asym")


def _words(values: Any) -> Any:
    """What a grid says, as JSON knows it. RecipeError for what holds itself."""
    try:
        return _plain(values)
    except (RecursionError, ValueError):
        raise RecipeError("the grid holds itself, or numbers that are too large: write its values out") from None


def _plain(value: Any) -> Any:
    """Mappings, lists and words; dates and numbers that are none become words."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in (sorted(value, key=str) if isinstance(value, set) else value)]
    if value is None or isinstance(value, str | bool) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def _section(grid: dict[Any, Any], name: str, kind: type) -> Any:
    value = grid.get(name)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise RecipeError(f"{name} of the grid must be a {'mapping' if kind is dict else 'list'}, not {value!r}")
    return value


def _without(grid: dict[Any, Any], names: tuple[str, ...]) -> dict[Any, Any]:
    return {key: value for key, value in grid.items() if key not in names}


def _flat(values: dict[Any, Any]) -> Keys:
    """Keys as they are written, with sections such as `quant: {bits: 3}` written out."""
    out: Keys = {}
    for key, value in values.items():
        if isinstance(value, dict) and key in _sections():
            out |= {f"{key}.{leaf}": inner for leaf, inner in value.items()}
        else:
            out[str(key)] = value
    return out


@cache
def _sections() -> dict[str, set[str]]:
    """Sections of the recipe with their keys."""
    return {name: set(value) for name, value in asdict(Recipe()).items() if isinstance(value, dict)}


def _spelt(values: dict[Any, Any]) -> Keys:
    """Recipe keys of words that may be flags. RecipeError for what is neither, and where two of them say different things."""
    out: Keys = {}
    for word, value in _flat(values).items():
        for key, now in _spelling(word, value).items():
            if key in out and out[key] != now:
                raise RecipeError(f"{word}={value} says {key}={now}, and {key}={out[key]} is asked for too: say it once")
            out[key] = now
    return out


def _quiet(values: Keys) -> Keys:
    """As `_spelt`, where values may be wrong: what they would set. RecipeError for words that are not known."""
    out: Keys = {}
    for word, value in values.items():
        key = _key(word)
        try:
            out |= _spelling(word, value)
        except RecipeError:
            out |= {key: value}
    return out


def _key(word: str) -> str:
    """The key of the recipe that a word of a grid sets, or the first of them."""
    name = word.replace("-", "_")
    if name in ("quant", "prune"):
        return "quant.bits" if name == "quant" else "prune.method"
    if name in FLAGS:
        return FLAGS[name].replace("__", ".")
    section, _, leaf = word.partition(".")
    if leaf in _sections().get(section, ()):
        return word
    if word == "model":
        raise RecipeError("the model of a sweep is that of the command: a grid does not name one")
    known = [*OTHER, "quant", "prune", *FLAGS, *(f"{section}.{leaf}" for section, leaves in _sections().items() for leaf in leaves)]
    near = difflib.get_close_matches(word, known, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "write a key of the recipe, such as quant.bits, or a flag of `run`, such as group"
    raise RecipeError(f"unknown key {word[:60]!r} in the grid; {hint}")


def _spelling(word: str, value: Any) -> Keys:
    """Keys of the recipe for one word of a grid."""
    name, known = word.replace("-", "_"), _key(word)
    if name in ("quant", "prune"):
        parse, nothing = (parse_quant, "packer") if name == "quant" else (parse_prune, "method")
        if value in (None, "none", False):
            return {f"{name}.{nothing}": "none"}
        return {f"{name}.{key}": each for key, each in parse(str(value)).items()}
    if name in FLAGS:
        return {known: _read(name, value)}
    flag = next((flag for flag, key in FLAGS.items() if key.replace("__", ".") == known and flag not in SWITCHES), None)
    return {known: value if flag is None else _read(flag, value)}


def _read(flag: str, value: Any) -> Any:
    """What a flag's value puts into the recipe: of words what the command line would, else the value as it is."""
    if flag in SWITCHES and not isinstance(value, bool):
        raise RecipeError(f"{flag} of the grid is true or false, not {value!r}")
    if flag == "tune" and value in (None, False):
        return "none"
    if not isinstance(value, str) and flag not in SWITCHES:
        return value
    read = value_of(flag, [value] if flag in ("layer", "ignore") else value)
    return list(read) if isinstance(read, tuple) else read


def _pattern(pattern: Any) -> list[list[Keys]]:
    """Of each word of a pattern that excludes, the keys of each of its values."""
    if not isinstance(pattern, dict) or not pattern:
        raise RecipeError(f"a pattern of `exclude` is a mapping of recipe keys to values, such as {{quant.bits: 2, tune: none}}, not {pattern!r}")
    return [[_spelling(word, each) for each in (value if isinstance(value, list) else [value])] for word, value in _flat(pattern).items()]


def _values(recipe: dict[str, Any]) -> Keys:
    """section.key -> value of a recipe's dict."""
    out: Keys = {}
    for key, value in recipe.items():
        out |= {f"{key}.{leaf}": _plain(inner) for leaf, inner in value.items()} if isinstance(value, dict) else {key: value}
    return out


def _idle(recipe: Recipe) -> set[str]:
    """Keys that say nothing in this recipe."""
    values, packer = recipe.to_dict(), recipe.quant.packer
    heeds = PACKERS[packer].heeds if packer in PACKERS else {"packer"}
    out = {f"quant.{key}" for key in values["quant"] if key not in heeds}
    for section, method in (("prune", recipe.prune.method), ("tune", recipe.tune.method)):
        out |= {f"{section}.{key}" for key in values[section] if key != "method" and method == "none"}
    return out


def _with(base: dict[str, Any], keys: Keys) -> Recipe:
    """The base with these keys; of the base only what the method asked for reads. RecipeError for values that cannot work."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    _forget(values, keys)
    _put(values, keys)
    return Recipe.from_dict(values)


def _put(values: dict[str, Any], keys: Keys) -> None:
    """Set keys in a recipe's dict."""
    for key, value in keys.items():
        section, _, leaf = key.rpartition(".")
        (values[section] if section else values)[leaf] = value


def _forget(values: dict[str, Any], keys: Keys) -> None:
    """Set back what a base says of another packer, pruning or tuner than the keys ask for, and means nothing to theirs."""
    packer, tuner = (keys.get(f"{section}.{leaf}", values[section][leaf]) for section, leaf in (("quant", "packer"), ("tune", "method")))
    usual = Recipe().to_dict()
    if keys.get("prune.method", values["prune"]["method"]) != values["prune"]["method"]:
        values["prune"] = usual["prune"]
    heeds = PACKERS[packer].heeds if isinstance(packer, str) and packer in PACKERS else {"packer"}
    values["quant"] |= {key: value for key, value in usual["quant"].items() if key not in heeds}
    kept = getattr(TUNERS.get(tuner) if isinstance(tuner, str) else None, "heeds", ())
    values["tune"] |= {key: usual["tune"][key] for key in OWN if key not in kept}
