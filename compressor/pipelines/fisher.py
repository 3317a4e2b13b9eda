"""The diagonal of the empirical Fisher information: squared gradients of the end loss, summed over calibration windows.

For packers that weigh each weight by what the model's loss feels of it (SqueezeLLM, Kim et al., 2023, arXiv 2306.07629, equation 5). Price: a forward
and a backward pass of the dense model a window, and four bytes a weight while packing lasts; each gradient lives only until it is squared.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compressor.tune.loss import loss_function


def squared_gradients(model: nn.Module, names: list[str], ids: Tensor, on_window: Callable[[int], None] | None = None) -> dict[str, Tensor]:
    """For each named linear the float32 [n, k] sum over windows ids [count, seqlen] of the squared gradient of the window's summed loss.

    The model is in eval mode; its requires_grad flags are as before afterwards, and no gradient is left behind.
    """
    device = next(model.parameters()).device
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    sums: dict[str, Tensor] = {}
    hooks = []
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight").requires_grad_(True)
        sums[name] = torch.zeros(weight.shape, device=weight.device)

        def square(p: Tensor, total: Tensor = sums[name]) -> None:
            assert p.grad is not None
            total.addcmul_(p.grad.float(), p.grad.float())
            p.grad = None

        hooks.append(weight.register_post_accumulate_grad_hook(square))
    try:
        loss = loss_function(model, ids[:1, :8].to(device))
        for done, window in enumerate(ids.split(1), 1):
            window = window.to(device)
            loss(window, window).backward()
            if on_window is not None:
                on_window(done)
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in flags:
            p.requires_grad_(flag)
    return sums
