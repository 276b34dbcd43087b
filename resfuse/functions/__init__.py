"""One `torch.autograd.Function` per file: the algorithm, once, over the primitives of whatever kernel set."""
