"""peft's LoRA layer in one pass: y = packed(x) + (gamma x A^T) B^T, added where the packed matmul stores its outputs.

peft computes base and path apart and adds them: two more matrices of the size of y, forward and backward. In one pass a training step takes 4 to 11 %
less of the time of a linear on a CPU, a forward pass 4 to 16 % (bench/fused_lora.py); on GPUs it has not been timed. Whatever is more than one plain
path (dropout while training, several adapters, DoRA and other variants, merged or disabled paths, another base layer) goes peft's own way.

peft knows this class by the configuration's custom modules, which are no part of what is stored, so folders are those of plain LoRA.
"""

# peft is not typed for mypy: its classes are Any here, and one of them is a base
# mypy: allow-subclassing-any

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from compressor.linear import PackedLinear


class FusedLora(Linear):
    """A LoRA path beside a packed linear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        plain = name in self.lora_A and name not in self.lora_variant and not (args or kwargs or self.disable_adapters or self.merged)
        if not plain or not isinstance(self.base_layer, PackedLinear) or (self.training and not isinstance(self.lora_dropout[name], nn.Identity)):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name], self.lora_B[name]
        if b.bias is not None:
            return super().forward(x)
        out: Tensor = self.base_layer(x, low=(a(self._cast_input_dtype(x, a.weight.dtype)) * self.scaling[name], b.weight))
        return out


def fuse(config: Any) -> Any:
    """The configuration, of which LoRA layers beside packed linears are of this class; any other kind as it is."""
    if type(config) is LoraConfig:
        config._register_custom_module({PackedLinear: FusedLora})
    return config
