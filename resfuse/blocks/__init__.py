"""Drop-in blocks: modules with a fused forward, the same parameters, keys and constructors as their originals.

torchvision's BasicBlock, Bottleneck, ResNet, DenseLayer and Transition (imported when asked for), and our own
ConvBNReLU, Chain, BNReLU, Stem, ResidualBlock, PreActBlock and PreActBottleneck (`modules.py`).
"""

import importlib

_PLANS = {
    "BasicBlock": ("resnet", "BasicBlock"),
    "Bottleneck": ("resnet", "Bottleneck"),
    "ResNet": ("stem", "ResNet"),
    "DenseLayer": ("preactivated", "_DenseLayer"),
    "Transition": ("preactivated", "_Transition"),
    "ConvBNReLU": ("conv_bn_relu", "ConvBNReLU"),
    "Chain": ("chain", "Chain"),
    "BNReLU": ("bn_relu", "BNReLU"),
    "Stem": ("bn_relu", "Stem"),
    "ResidualBlock": ("residual_block", "ResidualBlock"),
    "PreActBlock": ("residual_block", "PreActBlock"),
    "PreActBottleneck": ("residual_block", "PreActBottleneck"),
}
__all__ = list(_PLANS)


def __getattr__(name: str):
    if name not in _PLANS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    plan, own = _PLANS[name]
    return getattr(importlib.import_module(f"{__name__}.{plan}"), own)
