"""Packed layers in checkpoints: quantised while weights are read, saved, and read again, by a transformers quantizer.

A saved model needs this package: its config.json names the method "falcon-kit". Plain transformers only warns about
that, and stops at the shapes of the weights.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from falcon_kit.loading.packed import GROUP, PackedLinear, check_shape, frozen, quantised4, quantised8
from falcon_kit.planning.devices import places

METHOD = "falcon-kit"
"""The `quant_method` in config.json."""

SPILLED = "dispatched on the CPU or the disk"
"""In the error of bitsandbytes' quantizers, and of this one, for a device map of transformers that has no room for all
layers on the GPUs."""


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The quantisation of a model with packed layers, as in its config.json."""

    def __init__(self, dtype: str, group: int = GROUP, quant_method: str = METHOD) -> None:
        if dtype not in ("int8", "int4") or group != GROUP:
            raise ValueError(
                f"the checkpoint has dtype={dtype!r} and group={group!r}; this version of the kit reads int8, and int4 "
                f"in groups of {GROUP}: load the original weights with dtype='int4'"
            )
        self.quant_method: Any = quant_method
        self.dtype, self.group = dtype, group


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Makes the linear layers of the blocks packed layers, and quantises their weights as they are read."""

    @property
    def _dtype(self) -> str:
        return cast(PackedConfig, self.quantization_config).dtype

    @property
    def quantized_element_size(self) -> float:
        return 0.5 if self._dtype == "int4" else 1.0

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for int4 on a GPU that has no kernel for it, and for layers beside those on GPUs."""
        on = places(device_map)
        if isinstance(device_map, Mapping) and on & {"cpu", "disk"} and on != {"cpu"}:
            raise ValueError(f"some modules are {SPILLED}")
        if self._dtype == "int4" and torch.cuda.is_available() and on != {"cpu"}:
            check_gpu()

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module), PackedLinear)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, module in list(model.named_modules()):
            if ".h." in name and isinstance(module, nn.Linear):
                out, into = module.out_features, module.in_features
                if self._dtype == "int4":
                    check_shape(out, into, name)
                packed = PackedLinear(out, into, self._dtype, module.bias, module.weight.device)
                model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.pack()
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self._dtype)

    def is_serializable(self) -> bool:
        """The packed weights are saved as they are in a state dict."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are trained on packed layers, which hand gradients back."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile traces the kernels."""
        return True


class _Quantise(ConversionOps):
    """A weight that was read becomes the two tensors of a packed layer."""

    def __init__(self, dtype: str) -> None:
        self.quantise = quantised4 if dtype == "int4" else quantised8

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The weight and the scales by their full names."""
        converted: dict[str, Any] = {}
        for name, read in input_dict.items():
            weight, scales = self.quantise(read[0] if isinstance(read, list) else read)
            converted |= {name: frozen(weight), f"{name.removesuffix('weight')}scales": frozen(scales)}
        return converted


def check_gpu() -> None:
    """Raises ValueError for a GPU older than int4's kernel, which multiplies bfloat16: Ampere (2020) has it."""
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise ValueError(
            f"dtype='int4' needs a GPU of compute capability 8.0, such as an A100; {torch.cuda.get_device_name()} has "
            f"{major}.{minor}: use dtype='nf4'"
        )
