"""Everything worth knowing of a GPU that is here for a few minutes: `python -m tools.gpu_check --minutes 8 --out DIR`.

`schedule` runs stages as processes with limits of their own and stops at no failure; `stage` is what such a process
does; `machine`, `kernels`, `tiny` and `slices` are the stages; `report` is the table and the JSON at the end;
`prepare` makes beforehand what a bare machine lacks: wheels and Triton's compiled kernels.
"""
