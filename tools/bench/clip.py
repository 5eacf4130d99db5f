"""llama.cpp's vision code (llama-cpp-python's mtmd) on a vision file, for `tools.bench.vision` and tests."""

import ctypes
from pathlib import Path

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.bench.llama import import_llama_cpp, no_log

_IMAGE = 1  # mtmd_input_chunk_type


class Clip:
    """A loaded vision file with a text model of its width, which llama.cpp wants to have too."""

    def __init__(self, path: Path, text_model: Path, num_threads: int) -> None:
        api = import_llama_cpp()
        from llama_cpp import mtmd_cpp

        self._api, self._mtmd = api, mtmd_cpp
        api.llama_log_set(no_log(), ctypes.c_void_p())
        for log_set in (mtmd_cpp.mtmd_log_set, mtmd_cpp.mtmd_helper_log_set):
            log_set(no_log(), ctypes.c_void_p())
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.use_extra_bufts = False  # AMX buffers, which MLA models trip over
        self._model = api.llama_model_load_from_file(str(text_model).encode(), model_params)
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.warmup, params.print_timings = False, num_threads, False, False
        self._context = mtmd_cpp.mtmd_init_from_file(str(path).encode(), self._model, params)
        if not self._model or not self._context:
            raise KimiLiteError(f"llama.cpp cannot load {path} with {text_model}.", "Leave out --compare.")
        self._width = api.llama_model_n_embd(self._model)
        self._chunks = None

    def show(self, image: np.ndarray) -> int:
        """Prepares uint8 (height, width, 3) as llama.cpp does; tokens that it will be."""
        mtmd, height, width = self._mtmd, *image.shape[:2]
        pixels = (ctypes.c_ubyte * image.size).from_buffer_copy(np.ascontiguousarray(image).tobytes())
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels)
        prompt, chunks = mtmd.mtmd_input_text(), mtmd.mtmd_input_chunks_init()
        prompt.text, prompt.add_special, prompt.parse_special = mtmd.mtmd_get_marker(self._context), False, True
        prompt.text_len = len(prompt.text)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        failed = mtmd.mtmd_tokenize(self._context, chunks, ctypes.byref(prompt), bitmaps, 1)
        mtmd.mtmd_bitmap_free(bitmap)
        assert failed == 0, failed
        self._forget()
        self._chunks = chunks
        return mtmd.mtmd_input_chunk_get_n_tokens(self._picture())

    def encode(self) -> np.ndarray:
        """float32 (tokens, D) of the image that was shown."""
        picture = self._picture()
        failed = self._mtmd.mtmd_encode_chunk(self._context, picture)
        assert failed == 0, failed
        shape = self._mtmd.mtmd_input_chunk_get_n_tokens(picture), self._width
        return np.ctypeslib.as_array(self._mtmd.mtmd_get_output_embd(self._context), shape).copy()

    def close(self) -> None:
        self._forget()
        self._mtmd.mtmd_free(self._context)
        self._api.llama_model_free(self._model)

    def _picture(self):
        mtmd = self._mtmd
        chunks = (mtmd.mtmd_input_chunks_get(self._chunks, i) for i in range(mtmd.mtmd_input_chunks_size(self._chunks)))
        return next(chunk for chunk in chunks if mtmd.mtmd_input_chunk_get_type(chunk) == _IMAGE)

    def _forget(self) -> None:
        if self._chunks is not None:
            self._mtmd.mtmd_input_chunks_free(self._chunks)
            self._chunks = None
