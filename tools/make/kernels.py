"""Compiles kernels for common kinds of CPUs, on whatever CPU this is, for a wheel to carry (`native.cpu.prebuilt`).

    python -m tools.make.kernels                                  # all types, four targets, as many processes as cores
    python -m tools.make.kernels --targets native --types q8_0,f16,f32 --caches f16    # what the demo needs here

Each target is compiled by processes that Numba was told so (NUMBA_CPU_NAME). With a wheel made afterwards a first start
compiles nothing on x86-64 CPUs with Linux's C library: AVX2 of Haswell and Zen 1 on, AVX-VNNI of Alder Lake, AVX-512
with VNNI, VBMI and GFNI of Ice Lake and Zen 4 on, with matrix tiles (AMX) or without. Others compile, as a checkout
does where this was not run.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import whole_file
from kimi_lite.native.amx import has_amx
from kimi_lite.native.cpu.prebuilt import AMX
from kimi_lite.native.isa import AVX2, AVX512_VNNI, AVX_VNNI, isa

if TYPE_CHECKING:
    from kimi_lite.native.cpu.compiler import Function, Kernel


class Target(NamedTuple):
    """A kind of CPU, in LLVM's names. Code uses no feature but these. `isa`: its path."""

    isa: str
    cpu: str
    features: tuple[str, ...]


_HASWELL = (
    *("cx8", "fxsr", "mmx", "sse", "sse2", "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt"),
    *("avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"),
)
_ICE_LAKE = (
    *("avx512f", "avx512cd", "avx512dq", "avx512bw", "avx512vl", "avx512vbmi", "avx512vbmi2", "avx512vnni"),
    *("avx512bitalg", "gfni"),
)
TARGETS = {
    AVX2: Target(AVX2, "haswell", _HASWELL),
    AVX_VNNI: Target(AVX_VNNI, "haswell", (*_HASWELL, "avxvnni")),
    AVX512_VNNI: Target(AVX512_VNNI, "x86-64-v4", (*_HASWELL, *_ICE_LAKE)),
    AMX: Target(AVX512_VNNI, "x86-64-v4", (*_HASWELL, *_ICE_LAKE, "amx-tile", "amx-int8")),
}
HEADS = (9, 64)  # of the demo, of Kimi K2: attention is compiled for the number of heads that share a reading

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    targets: Annotated[str, typer.Option(help="Comma-separated; native: this CPU's.")] = ",".join(TARGETS),
    types: Annotated[str, typer.Option(help="Comma-separated, e.g. q8_0,f32. Default: all that have kernels.")] = "",
    caches: Annotated[str, typer.Option(help="Forms of the KV cache: f32, f16, bf16, q8. Default: all.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder. Default: where the wheel takes them from.")] = None,
    is_worker: Annotated[bool, typer.Option("--worker", hidden=True, help="This process has the target.")] = False,
) -> None:
    """Compile kernels for CPUs that need not be here."""
    from kimi_lite.native.cpu import prebuilt
    from kimi_lite.native.latent_rows import ROW_FORMS

    folder, forms = out or prebuilt.FOLDER, caches.split(",") if caches else [*ROW_FORMS]
    native = [isa().name, *[AMX] * has_amx()]
    wanted = [known for name in targets.split(",") for known in (native if name == "native" else [name])]
    if set(forms) - ROW_FORMS.keys():
        raise KimiLiteError(f"There is no KV cache in {', '.join(forms)}.", f"Known are {', '.join(ROW_FORMS)}.")
    unknown = set(wanted) - TARGETS.keys()
    if unknown:
        raise KimiLiteError(f"There is no target {sorted(unknown)[0]}.", f"Known are {', '.join(TARGETS)}.")
    if is_worker:
        [name], known = wanted, type_names(types)
        kernels = tile_kernels(known) if name == AMX else kernels_of(known, forms)
        path = write_archive(folder / f"{name}.zip", TARGETS[name].features, kernels)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        return
    command = [sys.executable, "-m", "kimi_lite.tools.make.kernels", "--worker", "--out", str(folder), "--types", types]
    command += ["--caches", caches]
    running = [subprocess.Popen([*command, "--targets", name], env=environment_of(name)) for name in wanted]
    codes = [process.wait() for process in running]
    if any(codes):
        raise KimiLiteError("Compiling failed: what was printed above says where.", "Repeat it with one of --targets.")


def environment_of(name: str) -> dict[str, str]:
    """Of a process that compiles for the target, and runs nothing of it."""
    target = TARGETS[name]
    features = ",".join(f"+{feature}" for feature in target.features)
    numba = {"NUMBA_CPU_NAME": target.cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_DISABLE_INTEL_SVML": "1"}
    return os.environ | numba | {"KIMI_LITE_AMX": "compile" if name == AMX else "0"}


def type_names(types: str) -> list[str]:
    """The GGUF types asked for, or all that the CPU multiplies. Raises KimiLiteError."""
    from kimi_lite.native.cpu.blocks import is_implemented
    from kimi_lite.native.layouts import BY_NAME

    known = [name for name in BY_NAME if is_implemented(name)]
    asked = [name.upper() for name in types.split(",")] if types else known
    for name in asked:
        if name not in known:
            raise KimiLiteError(f"The CPU has no kernels for type {name}.", f"It has them for {', '.join(known)}.")
    return asked


def kernels_of(types: Sequence[str], caches: Sequence[str]) -> "Iterator[Kernel | Function]":
    """All kernels that a model of these types may need on the CPU with a KV cache of these forms, and those that
    measure the machine; one may come twice."""
    import kimi_lite.native.cpu as folder
    from kimi_lite.hardware import bandwidth
    from kimi_lite.native.cpu.attention import compiled_attention, heads_per_group
    from kimi_lite.native.cpu.attention_prefill import compiled_prefill
    from kimi_lite.native.cpu.compiler import Function, Kernel
    from kimi_lite.native.cpu.latent import compiled_write
    from kimi_lite.native.cpu.matrix import matrix_kernels

    modules = [
        importlib.import_module(each.name) for each in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}.")
    ]
    for module in (*modules, bandwidth):
        yield from (each for each in vars(module).values() if isinstance(each, (Kernel, Function)))
    for name in types:
        yield from matrix_kernels(name)
    for dtype in caches:
        yield compiled_write(dtype)
        yield compiled_prefill(dtype)
        yield from (compiled_attention(group, dtype) for group in sorted({heads_per_group(heads) for heads in HEADS}))


def tile_kernels(types: Sequence[str]) -> "Iterator[Kernel]":
    """What a model of these types takes instead of other kernels where there are matrix tiles."""
    from kimi_lite.native.cpu.tile_panel import tile_gemm_kernel, tile_panel_kernel, uses_tiles

    for name in filter(uses_tiles, types):
        yield from (tile_panel_kernel(name), tile_gemm_kernel(name))


def write_archive(path: Path, features: Sequence[str], kernels: "Iterable[Kernel | Function]") -> Path:
    """The archive of the target that this process compiles for, which has these features and no others."""
    import llvmlite
    import numba
    from llvmlite import binding as llvm

    from kimi_lite.native.cache import state_of_sources
    from kimi_lite.native.cpu import prebuilt
    from kimi_lite.native.cpu.compiler import Kernel
    from kimi_lite.native.isa import target_features

    assert target_features() == set(features), target_features() ^ set(features)
    objects: dict[str, bytes] = {}
    for kernel in kernels:
        identity = prebuilt.identity(kernel.function, kernel.signature)
        if identity and identity not in objects and (isinstance(kernel, Kernel) or kernel.num_integers is not None):
            objects[identity] = object_of(kernel)
    names = {identity: f"{number}.o" for number, identity in enumerate(objects)}
    made_by = f"numba {numba.__version__}, llvmlite {llvmlite.__version__}"
    index = prebuilt.Index(state_of_sources(), llvm.get_process_triple(), tuple(features), made_by, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(prebuilt.INDEX, json.dumps(index._asdict(), indent=1))
        for identity, code in objects.items():
            archive.writestr(names[identity], code)
    return path


def object_of(kernel: "Kernel | Function") -> bytes:
    """An object file with one function for the linker, "kernel", that calls what Numba compiled. Wrappers for
    Python are left out: nothing of Numba and of Python is needed to load it. An exception in a kernel, which none may
    raise, ends the process."""
    from llvmlite import binding as llvm
    from numba.core.sigutils import normalize_signature

    from kimi_lite.native.cpu import prebuilt
    from kimi_lite.native.cpu.compiler import Kernel

    arguments, result = normalize_signature(kernel.signature)
    if isinstance(kernel, Kernel):
        library = kernel.compiled._library
        name = kernel.compiled.native_name.removeprefix("cfunc.")
    else:
        [compiled] = kernel.compiled.overloads.values()
        library, name = compiled.library, compiled.fndesc.llvm_func_name
    module = library._get_module_for_linking().clone()
    places = ", ".join(f"i64 %a{i}" for i in range(len(arguments)))
    is_void = str(result) == "none"
    module.link_in(
        llvm.parse_assembly(f"""
            target triple = "{module.triple}"
            target datalayout = "{module.data_layout}"
            declare i32 @"{name}"(ptr, ptr{", i64" * len(arguments)})
            declare void @llvm.trap()
            define {"void" if is_void else "i64"} @{prebuilt.SYMBOL}({places}) {{
              %result = alloca i64
              %exception = alloca ptr
              store i64 0, ptr %result
              %status = call i32 @"{name}"(ptr %result, ptr %exception, {places})
              %is_raised = icmp sgt i32 %status, 0
              %is_error = icmp eq i32 %status, -1
              %is_bad = or i1 %is_raised, %is_error
              br i1 %is_bad, label %bad, label %good
            bad:
              call void @llvm.trap()
              unreachable
            good:
              {"ret void" if is_void else "%value = load i64, ptr %result"}
              {"" if is_void else "ret i64 %value"}
            }}
        """)
    )
    for function in module.functions:
        if not function.is_declaration and function.name != prebuilt.SYMBOL:
            function.linkage = "internal"
    machine = library.codegen._tm
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_strip_dead_prototype_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(0)))
    module.verify()
    return machine.emit_object(module)


if __name__ == "__main__":
    try:
        app()
    except KimiLiteError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
