"""From a file to a word: the demo model names colours that it is shown, on the command line and by the server.

The tower's projector is fitted to the demo's own embeddings (`tools.make.seeing`), so a right name proves that pixels
come through decoding, preprocessing, the tower and the prompt into the right rows; of how well a trained tower sees it
proves nothing. The drawings are others than those it was fitted to, in places and sizes of their own. By chance all
eight would be right once in 16 million times.
"""

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import openai
import pytest

from kimi_lite.engine.loader import load
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options
from kimi_lite.tools.make.seeing import BACKGROUND, COLOURS, draw, make_seeing_tower
from tests.apps.server.running import running
from tests.media.pictures import encoded

QUESTION = "Which colour is it? Answer with one word."


@pytest.fixture(scope="module")
def demo() -> Path:
    from kimi_lite.demo.build import ensure_demo_model

    try:
        return ensure_demo_model()
    except KimiLiteError as error:
        pytest.skip(f"the demo cannot be built: {error}")


@pytest.fixture(scope="module")
def vision_file(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seeing") / "mmproj-demo.gguf"
    make_seeing_tower(path, demo)
    return path


@pytest.fixture(scope="module")
def url(demo: Path, vision_file: Path) -> Iterator[str]:
    options = Options(mmproj=vision_file, context_length=2048, num_sequences=2)
    with running(lambda: load(demo, options)) as url:
        yield url


def drawing(colour: str, form: str = "PNG", **more: object) -> bytes:
    """The first that covers about eight tokens: smaller ones the demo takes for another colour now and then."""
    drawings = (draw(np.random.default_rng(seed), colour) for seed in count(5000 + 100 * list(COLOURS).index(colour)))
    image = next(each for each in drawings if (each != BACKGROUND).any(axis=2).sum() > 8 * 28 * 28)
    return encoded(image, form, **more)


def named(answer: str) -> list[str]:
    return [colour for colour in COLOURS if colour in answer.lower()]


def part(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def ask(url: str, *content: dict) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": list(content)}]
    answer = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=12)
    return answer.choices[0].message.content


@pytest.mark.parametrize("colour", COLOURS)
def test_the_server_names_the_colour_that_it_is_shown(colour: str, url: str) -> None:
    assert named(ask(url, part(drawing(colour)), {"type": "text", "text": QUESTION})) == [colour]


def test_run_names_the_colour_of_a_photo(demo: Path, vision_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "drawing.jpeg"
    path.write_bytes(drawing("yellow", "JPEG", quality=95))
    command = [sys.executable, "-m", "kimi_lite", "run", "-m", str(demo), "--mmproj", str(vision_file)]
    command += ["--image", str(path), "--temp", "0", "-n", "12", "-q", "-c", "2K", "--no-prefix-cache", QUESTION]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert named(done.stdout) == ["yellow"]
