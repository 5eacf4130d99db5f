"""llama.cpp as the tests use it: without its AMX buffers, which abort on models with MLA (llama-cpp-python 0.3.36)."""

from pathlib import Path


def open_llama(path: str | Path, **options: object):
    """`llama_cpp.Llama` of a file. Skips nothing: callers ask first whether the package is there."""
    import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def without_extra_buffers():
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = without_extra_buffers
    try:
        return llama_cpp.Llama(str(path), verbose=False, **options)
    finally:
        llama_cpp.llama_model_default_params = defaults
