"""llama.cpp as the tests use it: without its AMX buffers, which abort on models with MLA (llama-cpp-python 0.3.36)."""

from pathlib import Path


def open_llama(path: str | Path, **options: object):
    """`llama_cpp.Llama` of a file. Callers ask first whether the package is there."""
    import llama_cpp.llama_cpp as api
    from llama_cpp import Llama

    defaults = api.llama_model_default_params

    def without_extra_buffers():
        params = defaults()
        params.use_extra_bufts = False
        return params

    api.llama_model_default_params = without_extra_buffers
    try:
        return Llama(str(path), verbose=False, **options)
    finally:
        api.llama_model_default_params = defaults
