"""Adapters of the peft library beside packed linears: a tuner for each kind that needs no dense weight, and their folders.

    y = packed(x) + gamma (x A^T) B^T          LoRA, Hu et al., 2021, arXiv 2106.09685; the other kinds are named at KINDS

A PackedLinear is an nn.Linear, so peft wraps it like any other; plain LoRA paths run in one pass with it (fused.py). What peft would write into a
weight is refused by the weight itself (compressor.view). Codes and values stay as they are: the base of an adapter is bit for bit the untuned model.

AdaLoRA takes ranks away while it trains. In peft that hangs on a model's own loss and on a call after each step; here the one training loop calls
`Ranks` at the same points as a pruner, and its averages are in the checkpoint.

Price: as said at each kind. Limits: adapters of linears only (prompts and prefixes work with peft itself, see docs/methods.md), one at a time.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import strict
from compressor.errors import ModelError
from compressor.integrations.experts import own_names
from compressor.kernels import layout
from compressor.linear import packed_linears, swap, targeted
from compressor.packed import PackedWeight
from compressor.packing import dense_rows, panels
from compressor.recipe import Tune

NAME = "default"  # peft's name of an adapter that got none
FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"  # beside a packed model; in it
TASKS = {
    "ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip
WARM, FINAL = 0.1, 0.3  # AdaLoRA: shares of the steps before ranks go, and after the last went


@dataclass(frozen=True)
class Kind:
    """A kind of adapter that `--tune` knows, callable like a class of tuners: lr by default, the keys of recipe.Tune it heeds, peft's configuration.

    `table` None: it goes beside scales and tables alike.
    """

    name: str
    rate: float
    config: Callable[[Any, Tune, dict[str, Any]], Any]  # peft, options, what all kinds share
    keys: tuple[str, ...] = ("rank", "alpha", "dropout")
    table: None = field(default=None, init=False)

    @property
    def rates(self) -> Mapping[str, float]:
        return {"relative": self.rate}

    @property
    def heeds(self) -> tuple[str, ...]:
        return (*self.keys, "targets", "adapter", "absorb_limit")

    def __call__(self, options: Tune) -> "Adapters":
        return Adapters(self, options)


def _lora(**more: Any) -> Callable[[Any, Tune, dict[str, Any]], Any]:
    return lambda peft, o, same: peft.LoraConfig(r=o.rank, lora_alpha=o.alpha, lora_dropout=o.dropout, **more, **same)


def _adalora(peft: Any, o: Tune, same: dict[str, Any]) -> Any:
    return peft.AdaLoraConfig(init_r=o.rank + o.rank // 2, target_r=o.rank, lora_alpha=o.alpha, lora_dropout=o.dropout, total_step=1 << 30, **same)


KINDS: dict[str, Kind] = {kind.name: kind for kind in (
    Kind("lora", 2e-3, _lora(), ("rank", "alpha", "dropout", "start")),
    Kind("rslora", 2e-3, _lora(use_rslora=True), ("rank", "alpha", "dropout", "start")),  # Kalajdzievski, 2023, arXiv 2312.03732
    Kind("dora", 2e-3, _lora(use_dora=True)),  # Liu et al., 2024, arXiv 2402.09353; decodes each weight once a step for its norms
    Kind("adalora", 2e-3, _adalora),  # Zhang et al., 2023, arXiv 2303.10512; starts with half as many ranks more
    # these two make their change of a weight, dense, and keep it from forward to backward; their dropout in peft is of whole layers, and not offered
    Kind("loha", 2e-3, lambda peft, o, same: peft.LoHaConfig(r=o.rank, alpha=o.alpha, **same), ("rank", "alpha")),  # arXiv 2108.06098
    Kind("lokr", 2e-3, lambda peft, o, same: peft.LoKrConfig(r=o.rank, alpha=o.alpha, **same), ("rank", "alpha")),  # arXiv 2309.14859
    Kind("ia3", 1e-2, lambda peft, o, same: peft.IA3Config(**same, feedforward_modules=[]), ()),  # Liu et al., 2022, arXiv 2205.05638
    Kind("miss", 2e-3, lambda peft, o, same: peft.MissConfig(r=o.rank, miss_dropout=o.dropout, **same), ("rank", "dropout")),  # arXiv 2409.15371
)}  # fmt: skip


class Adapters:
    """The tuner of one kind. After `attach` the adapters are part of the model; `detach` leaves them there, `strip` takes them away."""

    model: Any = None  # the PeftModel around it
    pruner: "Ranks | None" = None

    def __init__(self, kind: Kind, options: Tune, seed: int = 42):
        self.kind, self.options, self.seed = kind, options, seed

    def attach(self, model: nn.Module, starts: Mapping[str, tuple[Tensor, Tensor]] | None = None, steps: int = 0) -> dict[str, nn.Parameter]:
        """Freeze the model, put adapters beside its packed linears, and return their float32 parameters by their name in it.

        starts: A [r, k] and B [n, r] of a path's product by the linear's name, found while packing; steps: how long the run will be, for AdaLoRA.
        ModelError if there is no packed linear, or one with rows of zeros for DoRA; RecipeError for targets that name none.
        """
        names = packed_linears(model)
        if not names:
            raise ModelError(f"{type(model).__name__} has no packed linear layers: compress it before tuning adapters beside them")
        chosen = targeted(names, self.options.targets)
        if self.kind.name == "dora":
            for name in chosen:
                _check_rows(name, names[name].packed())
        parameters = self.wrap(model, chosen, steps)
        if starts:
            self._start(model, starts)
        return parameters

    def wrap(self, model: nn.Module, names: list[str], steps: int = 0) -> dict[str, nn.Parameter]:
        """Freeze the model and put adapters beside the linears of these names, of whatever kind; their parameters by their name in the model."""
        import peft

        from compressor.integrations.fused import fuse

        config = self.kind.config(peft, self.options, {"target_modules": names, "task_type": _task(model)})
        if self.kind.name == "adalora":
            config.total_step, config.tinit, config.tfinal = max(steps, 1), round(WARM * steps), round(FINAL * steps)
        with torch.random.fork_rng(), own_names(model):
            torch.manual_seed(self.seed)
            self.model = peft.get_peft_model(model, fuse(config))
        if self.kind.name == "adalora":
            self.pruner = Ranks(self.model.base_model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _start(self, model: nn.Module, starts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Give each LoRA path its start: the product of the two is gamma B A."""
        for name, (a, b) in starts.items():
            layer: Any = model.get_submodule(name)
            if hasattr(layer, "lora_A"):
                root = layer.scaling[NAME] ** 0.5 if bool(b.any()) else 1.0  # A and B stay of one size
                layer.lora_A[NAME].weight.copy_(a / root)
                layer.lora_B[NAME].weight.copy_(b / root)

    def detach(self, model: nn.Module) -> None:
        """Training is over; the adapters stay beside the base."""
        self.model.eval().requires_grad_(False)


class Ranks:
    """AdaLoRA's allocator as a pruner of the training loop: `kept` masks by triplet, averages of importance by parameter."""

    restarts: tuple[int, ...] = ()

    def __init__(self, model: Any):
        self.model, self.allocator, self.config = model.model, model.rankallocator, model.peft_config[NAME]
        self.paths = {n: p for n, p in self.model.named_parameters() if "lora_" in n and p.requires_grad}
        self.kept = {n: torch.ones(p.shape, dtype=torch.bool, device=p.device) for n, p in self.paths.items() if "lora_E" in n}
        for name, p in self.paths.items():
            for average in (self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc, self.allocator.ipt):
                average[name] = torch.zeros_like(p, requires_grad=False)

    def tensors(self) -> dict[str, Tensor]:
        out = {f"kept.{n}": mask for n, mask in self.kept.items()}
        for key, average in (("importance", self.allocator.exp_avg_ipt), ("uncertainty", self.allocator.exp_avg_unc)):
            out |= {f"{key}.{n}": average[n] for n in self.paths}
        return out

    def prune(self, step: int) -> None:
        """Ranks go by the averages after a step, see `observe`."""

    def observe(self, step: int) -> None:
        """Average the importance of this step, choose the triplets that stay, and add the gradient of what keeps A and B orthogonal."""
        self._orthogonal()
        if step > self.config.total_step - self.config.tfinal:
            return
        frozen = [p for n, p in self.model.named_parameters() if "lora_" in n and n not in self.paths]
        for p in frozen:  # the number of ranks, a parameter that nothing trains
            p.grad = torch.zeros_like(p)
        self.allocator.update_ipt(self.model)
        budget, due = self.allocator.budget_schedule(step)
        if due or step == self.config.total_step - self.config.tfinal:
            pattern = self.allocator.mask_to_budget(self.model, budget)
            for name, stays in pattern.items():
                self.kept[name].copy_(torch.tensor(stays).view(-1, 1))
        for p in frozen:
            p.grad = None

    @torch.enable_grad()
    def _orthogonal(self) -> None:
        parts = [p for n, p in self.paths.items() if "lora_E" not in n]
        grams = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in parts]
        total = sum((torch.linalg.matrix_norm(g - torch.eye(len(g), device=g.device)) for g in grams), torch.zeros(()))
        for p, grad in zip(parts, torch.autograd.grad(self.config.orth_reg_weight / len(parts) * total, parts), strict=True):
            assert p.grad is not None
            p.grad += grad

    @torch.no_grad()
    def hold(self) -> None:
        """What is gone stays zero until the next choice."""
        for name, mask in self.kept.items():
            self.paths[name].mul_(mask)


def named(targets: str | None) -> set[str] | None:
    """The last parts of the names of the linears that get an adapter; None for all."""
    return None if targets is None else {part.strip() for part in targets.split(",")}


def _check_rows(name: str, weight: PackedWeight) -> None:
    """ModelError for rows of zeros, by whose size DoRA divides: wherever the adapter is loaded its outputs would be NaN."""
    zero = sum(int((dense_rows(weight, rows) == 0).all(1).sum()) for rows in panels(*weight.shape, multiple=layout.ROWS))
    if zero:
        rest = "train another adapter, such as lora, or leave this layer out with --targets"
        raise ModelError(f"{zero} of the {weight.shape[0]} rows of {name} are zero, and dora divides by their size: {rest}")


def _task(model: nn.Module) -> str | None:
    """What peft calls the task of a model, so that it builds the right wrapper from the folder."""
    return next((task for name, task in TASKS.items() if type(model).__name__.endswith(name)), None)


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """An adapter's folder: its configuration as JSON, its tensors, in CPU memory, as safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (WEIGHTS + ".tmp")
    save_file(dict(tensors), temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors writes for the owner alone; servers run as somebody else
    temporary.replace(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", "utf-8")


def state(model: Any) -> dict[str, Tensor]:
    """The tensors of an attached adapter under the names that peft stores them by, in CPU memory."""
    import peft

    found = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: t.detach().cpu().contiguous() for key, t in found.items()}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of an adapter's folder; ModelError for anything but a whole one in safetensors."""
    try:
        config, tensors = strict.read(folder / CONFIG), load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder} holds no whole adapter ({CONFIG} and {WEIGHTS}): {' '.join(str(error).split())[:200]}") from None
    if not isinstance(config, dict) or not all(bool(torch.isfinite(t.float()).all()) for t in tensors.values() if t.is_floating_point()):
        raise ModelError(f"{folder} is damaged: its configuration is no mapping, or its numbers are not finite")
    return config, tensors


def beside(model: nn.Module, config: Callable[[Any], Any], tensors: Mapping[str, Tensor], where: str) -> Any:
    """peft's model around this one with an adapter of these tensors, frozen; the random numbers of the caller go on undisturbed.

    config: makes the configuration, of the library. ModelError, naming `where` it comes from, unless it fits, tensor by tensor.
    """
    import peft

    from compressor.integrations.fused import fuse

    try:
        with torch.random.fork_rng(), own_names(model):
            made: Any = peft.PeftModel(model, fuse(config(peft)))
        held = peft.get_peft_model_state_dict(made, save_embedding_layers=False)
    except Exception as error:  # configurations of strangers raise what they like
        raise ModelError(f"{where}: peft cannot attach this adapter to {type(model).__name__}: {' '.join(str(error).split())[:200]}") from None
    if strange := sorted(held.keys() ^ tensors.keys()):  # told before peft loads, which would write any name of the model's own
        raise ModelError(f"{where} does not fit this model: {strange[0][:200]} belongs to one of them alone")
    try:
        with own_names(model):
            peft.set_peft_model_state_dict(made, dict(tensors))
    except Exception as error:
        raise ModelError(f"{where}: peft cannot attach this adapter to {type(model).__name__}: {' '.join(str(error).split())[:200]}") from None
    return made.eval().requires_grad_(False)


def strip(model: nn.Module) -> dict[str, nn.Module]:
    """Take every wrapper of peft off the model's layers, in place; returns them by name.

    They are the modules they were, and so are the layers under them, a head that trained with the adapter before it did: nothing is copied.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not name.startswith(tuple(f"{outer}." for outer in found)):
            found[name] = module
    for name, module in found.items():
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.get_submodule("original_module")
        swap(model, name, inner)
    if "peft_config" in vars(model):  # which the next adapter would write its own into
        del model.peft_config
    return found


def put_back(model: nn.Module, wrappers: Mapping[str, nn.Module], made: Any) -> None:
    """The inverse of `strip`; made: peft's model around this one, or None if there was none."""
    for name, module in wrappers.items():
        swap(model, name, module)
    if made is not None:
        vars(model)["peft_config"] = made.peft_config


@contextmanager
def set_aside(loaded: Any) -> Iterator[None]:
    """The base alone inside, for a loaded model with an `adapter` or without; afterwards the same modules are back."""
    wrappers, made = ({} if loaded.adapter is None else strip(loaded.model)), loaded.adapter
    loaded.adapter = None
    try:
        yield
    finally:
        put_back(loaded.model, wrappers, made)
        loaded.adapter = made
