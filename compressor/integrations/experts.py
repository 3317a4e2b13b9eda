"""The experts of a mixture: transformers' fused parameters of three dimensions as one nn.Linear per expert and projection.

Since version 5 transformers loads the experts of Mixtral, Qwen-MoE, OLMoE, DeepSeek and sixty other families as two parameters a block,
[experts, n, k], which no packer of linears can take. All these classes share one description (use_experts_implementation in
transformers.integrations.moe): attributes say whether there is a gate, a bias, whether gate and up lie one behind the other or take turns, whether
matrices are transposed. `unfuse` reads it and turns each such module, in place, into an `Experts`; its linears are views of the parameters.

Names are those of checkpoints, which servers know too: transformers' own conversion is asked how it would write a fused parameter, with numbers in
it that say where each part went (`_checkpoint_names`). So Mixtral's are block_sparse_moe.experts.0.w1, Qwen's mlp.experts.0.gate_proj; families
whose checkpoints are fused themselves get gate_proj, up_proj, down_proj, as llm-compressor calls them. Where a checkpoint has another name for the
module around the experts than transformers, that module gets it, and its block still finds it by the old one: a module's name is its name on disk.

A token runs through the linears of its experts only, an expert without tokens is skipped. Limits: classes outside that description stay fused, and
`reason` says why; so do those whose linears do not give what the class itself does (`_proven`, on eight random tokens, where weights are in memory).
"""

import contextlib
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LEAVES = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "up_proj", "down_proj")  # parameters of transformers' experts; biases end in _bias
TOKENS = 8  # that prove a class
TOLERANCE = 1e-3  # of the largest output, float32 and wider; narrower dtypes round by their own width
ROUTER = re.compile(r"(^|_)(gate|router)$")


class Experts(nn.Module):
    """What a class of transformers becomes, with its other methods and attributes: children "0", "1", …, each with linears named as in `leaves`.

    leaves: names of gate, up and down; the first is "" where there is no gate.
    """

    leaves: tuple[str, str, str]
    count: int
    fused_path: str  # what transformers calls the module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, width], top_k_index int64 [tokens, k] (`count` or more: nobody), top_k_weights [tokens, k] -> [tokens, width]."""
        out = torch.zeros_like(hidden_states)
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        starts, weights, start = torch.bincount(chosen, minlength=self.count).tolist(), top_k_weights.reshape(-1, 1), 0
        for index, many in enumerate(starts[: self.count]):
            if many:
                places = order[start : start + many]
                rows = places // top_k_index.shape[-1]
                seen = self._expert(index, hidden_states[rows]) * weights[places]
                out.index_add_(0, rows, seen.to(out.dtype))
            start += many
        return out

    def _expert(self, index: int, x: Tensor) -> Tensor:
        """x [tokens, width] through one expert."""
        this: Any = self
        gate, up, down = self.leaves
        linears: Any = self._modules[str(index)]
        inner = linears[up](x)
        if gate:
            opened = linears[gate](x)
            both = (opened, inner)
            joined = torch.cat(both, -1) if this.is_concatenated else torch.stack(both, -1).flatten(-2)
            inner = this._apply_gate(joined)
        else:
            inner = this.act_fn(inner)
        inner = linears[down](inner)
        return this.post_expert_norm(inner) if this.has_post_expert_norm else inner


@dataclass(frozen=True)
class Place:
    """Where a linear of an expert lies in transformers' parameter: `parameter`[expert], of which rows `start::step` up to `stop` are its own.

    Of a transposed parameter these are columns, and the weight is their transpose.
    """

    parameter: str  # dotted name in transformers' own model
    expert: int
    start: int
    stop: int
    step: int
    transposed: bool

    def of(self, fused: Tensor) -> Tensor:
        """The linear's weight [n, k] as a view of the parameter [experts, ...], or its bias [n] of the parameter of biases [experts, n]."""
        one = fused[self.expert]
        own = slice(self.start, self.stop, self.step)
        return one[own] if one.dim() == 1 or not self.transposed else one[:, own].T


def reason(module: nn.Module) -> str:
    """Why a module with parameters of three dimensions stays as it is; empty if `unfuse` takes it apart."""
    this: Any = module
    if isinstance(module, nn.Conv1d):
        return "a convolution is no linear"
    if why := getattr(this, "unproven", ""):
        return f"the linears of {type(module).__name__}'s experts, by its own description, {why}"
    if not all(hasattr(this, key) for key in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")):
        return f"{type(module).__name__} holds fused experts without a description of their layout, which only its own code knows"
    first, down = this._parameters.get("gate_up_proj" if this.has_gate else "up_proj"), this._parameters.get("down_proj")
    if first is None or down is None or first.dim() != 3 or down.dim() != 3 or len(first) != len(down):
        return f"{type(module).__name__} does not hold its experts as {FUSED[0]} and {FUSED[2]} of three dimensions"
    wide, narrow = (2, 1) if this.is_transposed else (1, 2)
    inner = first.shape[wide] // (2 if this.has_gate else 1)
    if (down.shape[narrow], down.shape[wide]) != (inner, first.shape[narrow]):
        return f"the shapes of {type(module).__name__}, {tuple(first.shape)} and {tuple(down.shape)}, do not follow from one width"
    strange = [name for name, p in this._parameters.items() if p is not None and name.removesuffix("_bias") not in FUSED]
    return f"{type(module).__name__} holds {strange[0]} beside its experts, which nobody knows here" if strange else ""


def fused(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold matrices of several experts in one parameter, by dotted name: of three dimensions, and no convolution's."""
    return {
        name: module for name, module in model.named_modules()
        if any(p is not None and p.dim() == 3 for p in module._parameters.values()) and not isinstance(module, nn.Conv1d)
    }  # fmt: skip


def unfuse(model: nn.Module, stored: Collection[str] = (), prove: bool = True) -> nn.Module:
    """Take apart, in place, all fused experts whose layout is understood; the model itself. Works on the meta device.

    stored: names of tensors of a folder that will be loaded; experts that it holds fused stay so. prove: compare outputs with those of the class;
    false for a model whose weights are still to come, where numbers at random would prove nothing.
    """
    found = {path: m for path, m in fused(model).items() if not reason(m) and not any(f"{path}.{name}" in stored for name in FUSED)}
    config: Any = model.config
    named, apart = _checkpoint_names(model, found), separate(str(getattr(config, "model_type", "")))
    for path, module in found.items():
        this: Any = module
        parent, leaves = named.get(path, (path.rpartition(".")[0], LEAVES))
        if not this.has_gate:
            leaves = ("", *leaves[1:])
        parts = _linears(this, leaves)
        if prove and not _proven(module, parts, leaves):
            this.unproven = "do not give what it gives"
            continue
        if apart and path not in named:
            this.unproven = "have names in checkpoints that this version of transformers does not tell"
            continue
        _become(module, path, parts, leaves)
        if parent != path.rpartition(".")[0]:
            _rename(model, path.rpartition(".")[0], parent)
    return model


def sources(model: nn.Module, module: str) -> dict[str, Place]:
    """Where transformers' fused parameters hold a linear of an expert of an un-fused model: {"weight": ..., "bias": ...}; empty for others.

    For who reads checkpoints tensor by tensor: those of families with a tensor an expert call it `module`.weight, as this model does, and nothing
    has to be looked up; fused ones hold it where this says.
    """
    path, _, leaf = module.rpartition(".")
    around, _, index = path.rpartition(".")
    try:
        experts: Any = model.get_submodule(around)
    except AttributeError:
        return {}
    if not isinstance(experts, Experts) or leaf not in experts.leaves:
        return {}
    this: Any = experts
    role, inner = experts.leaves.index(leaf), this._modules[index][experts.leaves[2]].in_features
    name = FUSED[2] if role == 2 else FUSED[0] if experts.leaves[0] else FUSED[1]
    place = _place(f"{this.fused_path}.{name}", int(index), role, bool(experts.leaves[0]), inner, this)
    found = {"weight": place}
    if this.has_bias:
        found["bias"] = _place(f"{this.fused_path}.{name}_bias", int(index), role, bool(experts.leaves[0]), inner, this)
    return found


@contextlib.contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """While it lasts, peft finds no conversion for the family of an un-fused model: it would turn linears of experts into fused parameters."""
    config: Any = getattr(model, "config", None)
    if not any(isinstance(module, Experts) for module in model.modules()):
        yield
        return
    object.__setattr__(config, "model_type", "")  # of the object; its class has the real one
    try:
        yield
    finally:
        object.__delattr__(config, "model_type")


def separate(family: str) -> bool:
    """Whether checkpoints of a family (model_type) hold a tensor for each expert, which transformers merges; false for those it does not know."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return False
    steps = [step for each in get_checkpoint_conversion_mapping(family) or [] for step in getattr(each, "operations", ())]
    return any(type(step).__name__ == "MergeModulelist" for step in steps)


def routes(name: str) -> bool:
    """Whether a module of a block with experts, by its dotted name, chooses among them (gate, router, shared_expert_gate, …)."""
    return any(ROUTER.search(part) for part in name.split("."))


def routers(model: nn.Module) -> list[str]:
    """Modules that choose experts with a matrix of their own, which are no nn.Linear here but are one in servers: dotted names."""
    around = {name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, Experts)}
    return sorted(
        name for name, module in model.named_modules()
        if name.rpartition(".")[0] in around and not isinstance(module, nn.Linear) and routes(name)
    )  # fmt: skip


def _place(parameter: str, expert: int, role: int, gated: bool, inner: int, this: Any) -> Place:
    """role: 0 gate, 1 up, 2 down; inner: width between up and down, float numbers of one expert's gate."""
    if role == 2 or not gated:
        return Place(parameter, expert, 0, 1 << 62, 1, this.is_transposed)
    if this.is_concatenated:
        return Place(parameter, expert, role * inner, (role + 1) * inner, 1, this.is_transposed)
    return Place(parameter, expert, role, 1 << 62, 2, this.is_transposed)


def _linears(this: Any, leaves: tuple[str, ...]) -> list[nn.ModuleDict]:
    """An nn.ModuleDict of linears for every expert, whose weights and biases are views of the module's parameters."""
    first = this._parameters[FUSED[0] if this.has_gate else FUSED[1]]
    inner = this.down_proj.shape[1 if this.is_transposed else 2]
    out = []
    for expert in range(len(first)):
        one = nn.ModuleDict()
        for role, leaf in enumerate(leaves):
            if leaf:
                name = FUSED[2] if role == 2 else FUSED[0] if this.has_gate else FUSED[1]
                place = _place(name, expert, role, this.has_gate, inner, this)
                bias = place.of(this._parameters[f"{name}_bias"]) if this.has_bias else None
                one[leaf] = _linear(place.of(this._parameters[name]), bias, this._parameters[name].requires_grad)
        out.append(one.train(this.training))
    return out


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=trained)
    return layer


def _become(module: nn.Module, path: str, parts: list[nn.ModuleDict], leaves: tuple[str, ...]) -> None:
    """The fused parameters are gone, the parts are children; it stays the same object, with whatever else it holds."""
    this: Any = module
    for name in list(module._parameters):
        del module._parameters[name]
    this.leaves, this.count, this.fused_path = leaves, len(parts), path
    for index, part in enumerate(parts):
        module.add_module(str(index), part)
    object.__setattr__(module, "__class__", _apart(type(module)))


def _apart(kind: type[nn.Module]) -> type[Experts]:
    """A class with all that `kind` can do but building itself and running; no subclass of it, for transformers initialises those as fused ones."""
    own: dict[str, Any] = {}
    for each in reversed(kind.__mro__[: kind.__mro__.index(nn.Module)]):
        own |= {name: value for name, value in vars(each).items() if not name.startswith("__") and name != "forward"}
    return type(f"Unfused{kind.__name__}", (Experts,), own)


@torch.no_grad()
def _proven(module: nn.Module, parts: list[nn.ModuleDict], leaves: tuple[str, ...]) -> bool:
    """Whether the linears give what the class itself gives, on random tokens; true on the meta device, where nothing can be computed."""
    this: Any = module
    weight = parts[0][leaves[2]].get_parameter("weight")
    if weight.is_meta:
        return True
    generator, count, cpu = torch.Generator().manual_seed(0), len(parts), torch.device("cpu")  # whatever the default is while a model is built
    x = torch.randn(TOKENS, weight.shape[0], generator=generator, device=cpu).to(weight.device, weight.dtype)
    index = torch.stack([torch.randperm(count, generator=generator, device=cpu)[: min(2, count)] for _ in range(TOKENS)]).to(weight.device)
    share = torch.rand(index.shape, generator=generator, device=cpu).to(weight.device, weight.dtype)
    told = getattr(this.config, "_experts_implementation", None)
    try:
        this.config._experts_implementation = "eager"
        wanted = module(x, index, share)
        error = float((_twin(module, parts, leaves)(x, index, share) - wanted).abs().max())
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError):
        return False  # the forward of a class that takes other things
    finally:
        this.config._experts_implementation = told
    size, tolerance = float(wanted.abs().max()), max(TOLERANCE, 8 * torch.finfo(weight.dtype).eps)
    return not math.isfinite(size) or error <= tolerance * size  # weights that are not finite are named by whoever looks at them all


def _twin(module: nn.Module, parts: list[nn.ModuleDict], leaves: tuple[str, ...]) -> Experts:
    """An Experts like the one that the module will become, which leaves the module as it is."""
    twin: Any = Experts.__new__(_apart(type(module)))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = module._modules | {str(index): part for index, part in enumerate(parts)}
    twin.__dict__.update(leaves=leaves, count=len(parts))
    found: Experts = twin
    return found


def _checkpoint_names(model: Any, found: dict[str, nn.Module]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """(name of the module around the experts, names of gate, up, down) in a checkpoint, of the paths whose experts have tensors of their own there.

    transformers' own reverse conversion gets parameters of one input and one row a projection, whose numbers say of whom they are: 4 expert + role.
    """
    numbers, cpu = {}, torch.device("cpu")  # whatever the default is while a model is built
    for path, module in found.items():
        this: Any = module
        count = len(this.down_proj)
        for name in (FUSED[0] if this.has_gate else FUSED[1], FUSED[2]):
            roles = torch.tensor([2] if name == FUSED[2] else [0, 1] if this.has_gate else [1], device=cpu)
            number = (4 * torch.arange(count, device=cpu).unsqueeze(1) + roles).float()  # [experts, rows]
            numbers[f"{path}.{name}"] = number.unsqueeze(1 if this.is_transposed else 2)
    loaded = model.__dict__.pop("_weight_conversions", None)  # what a checkpoint needed that was loaded; wanted is what the family's checkpoints need
    try:
        from transformers.core_model_loading import revert_weight_conversion

        written = {path: revert_weight_conversion(model, {k: t for k, t in numbers.items() if k.startswith(f"{path}.")}) for path in found}
    except (ImportError, AttributeError, KeyError, RuntimeError, ValueError, IndexError, TypeError):
        return {}  # a conversion that wants more than these parameters, or a version without it
    finally:
        if loaded is not None:
            model._weight_conversions = loaded
    return {path: names for path, tensors in written.items() if (names := _names(path, tensors, found[path])) is not None}


def _names(path: str, tensors: dict[str, Tensor], module: nn.Module) -> tuple[str, tuple[str, ...]] | None:
    """As `_checkpoint_names`, if each expert's tensors are called <around>.<experts>.<i>.<leaf>.weight, else None."""
    this: Any = module
    around, _, experts = path.rpartition(".")
    leaves, parents, seen = ["", "", ""], set[str](), 0
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(.+)\.{re.escape(experts)}\.(\d+)\.([^.]+)\.weight", name)
        if match is None or tensor.numel() != 1:
            return None
        expert, role = divmod(int(tensor), 4)
        if int(match[2]) != expert or leaves[role] not in ("", match[3]):
            return None
        leaves[role], seen = match[3], seen + 1
        parents.add(match[1])
    parent = parents.pop() if len(parents) == 1 else ""
    alike = parent.rpartition(".")[0] == around.rpartition(".")[0]  # but for the name of the module around the experts
    return (parent, tuple(leaves)) if alike and seen == len(this.down_proj) * (3 if this.has_gate else 2) else None


def _rename(model: nn.Module, old: str, new: str) -> None:
    """The module `old` is called `new` from now on, in its place among its siblings; its owner's code still finds it by its old name."""
    owner: Any = model.get_submodule(old.rpartition(".")[0])
    before, after = old.rpartition(".")[2], new.rpartition(".")[2]
    module = owner._modules[before]
    owner._modules = {after if key == before else key: value for key, value in owner._modules.items()}
    object.__setattr__(owner, before, module)
