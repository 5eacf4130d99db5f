"""GPU kernels in Triton: torch tensors in, torch tensors out. Nothing here chooses a place or moves a weight.

Weights are the bytes of the GGUF file, uint8 (rows, row_bytes). Kernels run on a CUDA device, or anywhere under
TRITON_INTERPRET=1, which must be set before `triton` is imported. `support.why_unusable` says what a machine lacks and
chooses how kernels are launched: by `cuda_driver`, which needs no C compiler, or by Triton's own driver.

No function waits for the GPU, and launches follow from shapes alone, so that CUDA graphs can hold them; results go to
`out` where one is given. Before a capture each function must have run once with the same shapes: then it is compiled,
its code book there.
"""
