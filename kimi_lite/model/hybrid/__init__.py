"""The hybrid path of the model: everything that every token needs on the GPU, routed experts in VRAM, RAM and on disk.

`transformer.HybridTransformer` has the interface of `kimi_lite.model.cpu.transformer.Transformer`. This package imports
torch, and nothing on the CPU path imports this package.
"""
