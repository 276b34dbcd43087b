"""What a fused module asks while Dynamo makes a graph of it. Importing this module imports Dynamo."""

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator

from .disabled import is_disabled


@torch.compiler.assume_constant_result
def fused() -> bool:
    """Whether fusion is enabled, at this time, and the graph is torch.compile's: exported programs are plain aten."""
    # torch.compiler.is_exporting() is True under torch.compile in some torch, and not under every export in others.
    exporting = torch.compiler._is_exporting_flag or InstructionTranslator.current_tx().export
    return not exporting and not is_disabled()
