"""How a GPU thread decodes each GGUF type, one file per family; `native.gpu.formats` lists them all.

A block is cut into lanes (one byte of codes, or one code book index) and a lane into planes, its weights. Each type has

    decode(base, unit, mask, table, PLANE) -> float32 weights; base: pointers to blocks, unit: lanes in their blocks
    column(unit, PLANE) -> the place of that weight in its block

`base`, `unit` and `mask` are tiles of any shape; neighbouring threads take neighbouring lanes, so that bytes and activations are
read side by side. What the planes of a lane have in common is loaded once: the compiler merges equal loads, which the tests
count in PTX. Blocks of nearly all types have an even number of bytes and begin at even addresses: two bytes are one load, and
a float16 scale is read whole; a uint32 is two such loads.
"""
