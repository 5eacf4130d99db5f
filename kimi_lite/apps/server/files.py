"""`/v1/files`: files that a client uploads once and names in requests, as kimi-cli does with videos (`ms://id`).

They lie in a folder of the server's own and go when it ends; where they are too many, the longest unused go first.
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kimi_lite.apps.server.errors import ApiError
from kimi_lite.units import MIB

MAX_FILE_BYTES = 512 * MIB
MAX_TOTAL_BYTES = 4 * 1024 * MIB
MAX_FILES = 256
UPLOAD_WITHIN_S = 1800.0


@dataclass(frozen=True, slots=True)
class UploadedFile:
    id: str
    name: str  # as the client calls it
    purpose: str
    num_bytes: int
    created_s: int
    path: Path

    def document(self) -> dict[str, Any]:
        """As OpenAI has it."""
        head = {"id": self.id, "object": "file", "bytes": self.num_bytes, "created_at": self.created_s}
        return {**head, "filename": self.name, "purpose": self.purpose, "status": "processed"}


class UploadedFiles:
    """By id. The folder is made with the first of them."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, UploadedFile] = OrderedDict()  # least recently used first
        self._folder: Path | None = None

    def add(self, upload: UploadFile, purpose: str) -> UploadedFile:
        """Keep a file."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="kimi-lite-files-"))
        name = f"file-{uuid4().hex}"
        path = self._folder / name
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            shutil.copyfileobj(upload.file, file, 1 << 20)
        shown = (upload.filename or name)[:200]
        kept = UploadedFile(name, shown, purpose[:40], path.stat().st_size, int(time.time()), path)
        self._files[name] = kept
        while len(self._files) > MAX_FILES or sum(each.num_bytes for each in self._files.values()) > MAX_TOTAL_BYTES:
            self._files.popitem(last=False)[1].path.unlink(missing_ok=True)
        return kept

    def get(self, file_id: str, param: str | None = None) -> UploadedFile:
        """ApiError 404 where it is not kept, or no longer."""
        if file_id not in self._files:
            problem = f"There is no file {file_id[:80]!r}: it was never uploaded, or is forgotten. Upload it again."
            raise ApiError(404, problem, "file_not_found", param)
        self._files.move_to_end(file_id)
        return self._files[file_id]

    def path(self, file_id: str, param: str) -> Path:
        return self.get(file_id, param).path

    def remove(self, file_id: str) -> None:
        """ApiError 404 where it is not kept."""
        self.get(file_id)
        self._files.pop(file_id).path.unlink(missing_ok=True)

    def list(self) -> list[UploadedFile]:
        return list(self._files.values())

    def close(self) -> None:
        """Delete them all."""
        self._files.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _files(http: HttpRequest) -> UploadedFiles:
    return http.app.state.server.files


async def upload(http: HttpRequest) -> Response:
    """POST /v1/files: keep a file, multipart/form-data with `file` and `purpose`."""
    if "multipart/form-data" not in http.headers.get("content-type", ""):
        raise ApiError(400, "The body must be multipart/form-data with a file.", "invalid_value", "file")
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_FILE_BYTES + MIB:
        raise _too_large()
    try:
        parser = MultiPartParser(http.headers, _limited(http), max_files=1, max_fields=10)
        form = await asyncio.wait_for(parser.parse(), UPLOAD_WITHIN_S)
    except MultiPartException as error:
        raise ApiError(400, f"The body is no form: {error.message}", "invalid_value", "file") from None
    except (KeyError, ClientDisconnect):
        raise ApiError(400, "The body is no form with a boundary, or is cut off.", "invalid_value", "file") from None
    except TimeoutError:
        raise ApiError(408, "The file came too slowly.", "timeout") from None
    try:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "The form has no file.", "invalid_value", "file")
        kept = await asyncio.to_thread(_files(http).add, file, purpose if isinstance(purpose, str) else "")
    finally:
        await form.close()
    return JSONResponse(kept.document())


async def list_files(http: HttpRequest) -> Response:
    """GET /v1/files: those that are kept."""
    data = [each.document() for each in _files(http).list()]
    return JSONResponse({"object": "list", "data": data, "has_more": False})


async def retrieve(http: HttpRequest) -> Response:
    """GET /v1/files/ID: what is known of a file."""
    return JSONResponse(_files(http).get(http.path_params["name"]).document())


async def delete(http: HttpRequest) -> Response:
    """DELETE /v1/files/ID: forget a file."""
    _files(http).remove(http.path_params["name"])
    return JSONResponse({"id": http.path_params["name"], "object": "file", "deleted": True})


async def _limited(http: HttpRequest) -> AsyncIterator[bytes]:
    num_bytes = 0
    async for chunk in http.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_FILE_BYTES + MIB:
            raise _too_large()
        yield chunk


def _too_large() -> ApiError:
    return ApiError(413, f"A file may have {MAX_FILE_BYTES // MIB} MiB.", "body_too_large")
