"""Drop-in blocks: torchvision's modules with a fused forward, the same parameters, keys and constructors."""
