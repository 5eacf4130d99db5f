"""A text and a small model of its own; one thread, as models this small cannot use more."""

from dataclasses import replace
from pathlib import Path

import pytest

from kimi_lite.engine.scoring import TEXT
from tests.tools.train.small import SMALL


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT.read_text()[:30_000])
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory, text) -> Path:
    from kimi_lite.tools.train.data import write_tokenizer
    from kimi_lite.tools.train.model import Model, save_checkpoint

    folder = tmp_path_factory.mktemp("model") / "small"
    write_tokenizer(folder, [text], 600)
    save_checkpoint(Model(replace(SMALL, vocab_size=600)).initialize(0), folder)
    return folder
