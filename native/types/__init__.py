"""GGUF types, a folder for each family. Each has

    layout.py     the rows of its types: names and numbers, a block's fields, how products treat it, its encoder
    reference.py  the decode formula in numpy
    cpu.py        products and unpacking in SIMD (`native.cpu.blocks`)
    gpu.py        decoding in Triton (`native.types.gpu_parts`)
    blocks.py     what makes random blocks of it valid (`native.types.random_blocks`)

`families` lists them; everything else that wants to know about types asks there. A new type is a row and a function in
each of these files, a new family a folder and a name in the list; `tests/native/types` says what is missing.
"""
