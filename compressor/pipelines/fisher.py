"""The diagonal of the empirical Fisher information: squared gradients of the end loss, summed over calibration windows.

For packers that weigh each weight by what the model's loss feels of it (SqueezeLLM, Kim et al., 2023, arXiv 2306.07629, equation 5). Price: a forward
and a backward pass of the dense model a window, and four bytes a weight while packing lasts; each gradient lives only until it is squared.
"""

import torch
from torch import Tensor, nn

from compressor import world
from compressor.errors import NumericError
from compressor.tune.loss import loss_function


@torch.enable_grad()
def squared_gradients(model: nn.Module, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """For each named linear the float32 [n, k] sum over windows ids [count, seqlen] of the squared gradient of the window's summed loss.

    The requires_grad flags of the model are as before afterwards, and no gradient is left behind. Raises NumericError, naming the layer, when a sum
    is not finite.
    """
    device = next(model.parameters()).device
    flags = [(p, p.requires_grad) for p in model.parameters()]
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    sums: dict[Tensor, Tensor] = {w: torch.zeros(w.shape, device=w.device) for w in weights.values()}  # one for layers that share a weight

    def square(p: Tensor) -> None:
        assert p.grad is not None
        sums[p].addcmul_(p.grad.float(), p.grad.float())
        p.grad = None

    hooks = []
    try:
        model.requires_grad_(False)
        hooks = [weight.requires_grad_(True).register_post_accumulate_grad_hook(square) for weight in sums]
        loss = loss_function(model, ids[:1, :8].to(device))
        for window in world.dealt(ids).to(device).split(1):
            loss(window, window).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None
    for total in sums.values():
        world.add([total])
    for name, weight in weights.items():
        if not bool(torch.isfinite(sums[weight]).all()):
            raise NumericError(f"the squared gradients of {name} are not finite; use another packer, or a device that computes in float32")
    return {name: sums[weight] for name, weight in weights.items()}
