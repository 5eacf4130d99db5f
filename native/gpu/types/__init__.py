"""How a GPU thread decodes each GGUF type, one file per family; `native.gpu.formats` lists them all.

A block is cut into lanes (one byte of codes, or one code book index) and a lane into planes, its weights. Each type has

    decode(base, first, unit, mask, table, PLANE) -> float32 weights
    column(unit, PLANE) -> the place of that weight in its block

A thread takes a run of neighbouring lanes: `unit` (..., runs, RUN) says which lanes of their blocks, `first` (...,
runs, 1) the first of each run, `base` (..., runs, 1) points to the blocks. What a run has in common, as a scale, is
loaded from `first` and `base` and so once a run; codes are loaded from `unit`, RUN neighbouring bytes in one load. What
the planes of a lane have in common is loaded once too: the compiler merges equal loads. RUN is 4 where blocks and codes
lie at multiples of four bytes, 2 where they lie at even addresses, as in nearly all other types, and 1 for MXFP4's 17
bytes and for code books. Every layout in registers is then the same, [..., runs, RUN] with a thread for each run, and
nothing is exchanged between threads.
"""
