"""Images and videos through every API: seen, counted, refused in words; and the files that clients upload."""

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from kimi_lite.apps.server.state import ServerSettings
from kimi_lite.engine.engine import Engine
from kimi_lite.text.tokenizer import Tokenizer
from tests.apps.server.running import running, speaking
from tests.engine.fakes import fake_vision, tiny_metadata
from tests.media.pictures import Image, encoded, write_video

TOKENIZER = Tokenizer.from_metadata(tiny_metadata())


def png(letter: str, width: int = 56, height: int = 28) -> bytes:
    """(width / 28) x (height / 28) tokens, all of which are the letter: the fake tower sees its grey."""
    return encoded(Image.new("RGB", (width, height), (TOKENIZER.encode(letter)[0],) * 3))


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def seen(prompt: str) -> tuple[None, str]:
    """The model says what it was shown: the character of the image's level, as often as it has tokens."""
    runs = [part.partition("<|media_end|>")[0] for part in prompt.split("<|media_content|>")[1:]]
    return None, "+".join(f"{run[0]}{len(run)}" for run in runs)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return speaking(seen, vision=fake_vision())


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with running(lambda: engine, ServerSettings(max_images=5, shuts_down_within_s=1.0)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def part(letter: str, *size: int) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(png(letter, *size)), "detail": "high"}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def chat(client: openai.OpenAI, *content: dict, **more: object):
    messages = [{"role": "user", "content": list(content)}]
    return client.chat.completions.create(
        model="m", messages=messages, extra_body={"thinking": {"type": "disabled"}}, **more
    )


def test_chat_completions_see_images_in_their_order_and_count_them(client: openai.OpenAI) -> None:
    done = chat(client, text("what"), part("A"), text("and"), part("B", 84, 56))
    assert done.choices[0].message.content == "A2+B6"
    without = chat(client, text("what"), text("and"))
    around = 3 + 5 + 1  # media_begin, media_content, media_end; "image" in letters; a line's end
    assert done.usage.prompt_tokens == without.usage.prompt_tokens + 2 + 6 + 2 * around
    again = chat(client, text("what"), part("A"), text("and"), part("B", 84, 56))
    assert again.usage.prompt_tokens_details.cached_tokens == done.usage.prompt_tokens - 1


def test_other_images_of_equal_size_are_not_taken_for_those_that_are_cached(client: openai.OpenAI) -> None:
    words = text("w" * 200)
    answers = [chat(client, words, part(letter)).choices[0].message.content for letter in "FGF"]
    assert answers == ["F2", "G2", "F2"]


def test_a_follow_up_is_found_in_the_cache(client: openai.OpenAI) -> None:
    first = chat(client, part("H"), text("w" * 300))
    said = first.choices[0].message.content
    messages = [
        {"role": "user", "content": [part("H"), text("w" * 300)]},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "and?"},
    ]
    body = {"thinking": {"type": "disabled"}}
    second = client.chat.completions.create(model="m", messages=messages, extra_body=body)
    known = first.usage.prompt_tokens + first.usage.completion_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= known - 1


def test_messages_see_images_also_in_results_of_tools(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png("K")).decode()}
    image = {"type": "image", "source": source}
    content = [text("what"), image, text("is it?")]
    done = client.messages.create(model="m", max_tokens=50, messages=[{"role": "user", "content": content}])
    assert done.content[0].text == "K2"
    counted = client.messages.count_tokens(model="m", messages=[{"role": "user", "content": content}])
    assert counted.input_tokens == done.usage.input_tokens + (done.usage.cache_read_input_tokens or 0)
    tool = {"name": "shoot", "input_schema": {"type": "object"}}
    messages = [
        {"role": "user", "content": "take a photo"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "functions.shoot:0", "name": "shoot", "input": {}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "functions.shoot:0", "content": [image]}]},
    ]
    done = client.messages.create(model="m", max_tokens=50, messages=messages, tools=[tool])
    assert done.content[0].text == "K2"


def test_responses_see_images(client: openai.OpenAI) -> None:
    content = [
        {"type": "input_text", "text": "what"},
        {"type": "input_image", "image_url": data_url(png("P")), "detail": "auto"},
    ]
    items = [{"role": "user", "content": content}]
    done = client.responses.create(model="m", input=items, reasoning={"effort": "none"})
    assert done.output_text == "P2"
    more = client.responses.create(model="m", input="again", previous_response_id=done.id, reasoning={"effort": "none"})
    assert more.output_text == "P2"


def test_videos_are_uploaded_once_and_named_as_kimi_cli_does(client: openai.OpenAI, url: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", 40, 10)
    file = client.files.create(file=path, purpose="video")
    assert (file.filename, file.bytes) == ("film.mp4", path.stat().st_size)
    done = chat(client, text("what"), {"type": "video_url", "video_url": {"url": f"ms://{file.id}", "id": None}})
    runs = done.choices[0].message.content.split("+")
    assert [run[1:] for run in runs] == ["6", "6"]  # two chunks of 4 frames, 84 x 56 pixels
    assert runs[0] != runs[1]  # it gets brighter
    inline = {"type": "video_url", "video_url": {"url": data_url(path.read_bytes(), "video/mp4")}}
    assert chat(client, text("what"), inline).choices[0].message.content == done.choices[0].message.content
    assert [each.id for each in client.files.list()] == [file.id]
    assert client.files.retrieve(file.id).bytes == file.bytes
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError, match="no file"):
        chat(client, {"type": "video_url", "video_url": {"url": f"ms://{file.id}"}})


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:1/a.png", "nothing is fetched"),
        ("https://example.com/a.png", "nothing is fetched"),
        ("file:///etc/passwd", "nothing is fetched"),
        ("/etc/passwd", "nothing is fetched"),
        ("FILE:///etc/passwd", "nothing is fetched"),
        ("ms://../../etc/passwd", "no file"),
        ("data:image/png;base64,AAAA", "is not a PNG"),
        ("data:image/png;base64,*", "not valid base64"),
        ("data:,", "is empty"),
        (data_url(png("A")[:40]), "cut off|not a PNG"),
        (data_url(b"<svg xmlns='x'/>"), "SVG"),
    ],
)
def test_what_is_no_image_is_a_client_s_error(address: str, words: str, client: openai.OpenAI) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=words):
        chat(client, {"type": "image_url", "image_url": {"url": address}})


def test_too_many_images_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="more than 5 images"):
        chat(client, *[part(letter) for letter in "ABCDEF"])


@pytest.mark.parametrize(
    "source",
    [{}, None, {"type": "url", "url": "http://127.0.0.1/"}, {"type": "base64"}, {"type": "file", "file_id": 3}],
)
def test_sources_of_messages_that_hold_no_image_are_refused(source: object, url: str) -> None:
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}
    answer = httpx.post(f"{url}/v1/messages", json=body)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("body", [b"", b"--x\r\n", b"--x\r\n\r\nabc", b"--x--\r\n"])
def test_uploads_that_are_no_forms_are_refused(body: bytes, url: str) -> None:
    for kind in ("multipart/form-data; boundary=x", "multipart/form-data", "application/json"):
        assert httpx.post(f"{url}/v1/files", content=body, headers={"content-type": kind}).status_code == 400


def test_others_are_answered_while_images_are_seen(engine: Engine, client: openai.OpenAI, url: str) -> None:
    """The tower stands still until the test has heard from the server."""
    has_begun, may_go_on = threading.Event(), threading.Event()
    encode = engine.vision.tower.encode

    def slow(patches, report, should_stop):
        has_begun.set()
        assert may_go_on.wait(60)
        return encode(patches, report, should_stop)

    engine.vision.tower.encode = slow
    letters = "QRSTUVWXYZ"  # more than there are threads
    with ThreadPoolExecutor(len(letters)) as pool:
        waiting = [pool.submit(chat, client, part(letter)) for letter in letters]
        try:
            assert has_begun.wait(60)
            assert httpx.get(f"{url}/health").json()["status"] == "ok"
            assert chat(client, text("hi")).choices[0].message.content == ""
        finally:
            may_go_on.set()
            answers = [each.result().choices[0].message.content for each in waiting]
            engine.vision.tower.encode = encode
    assert answers == [f"{letter}2" for letter in letters]


def test_a_server_without_a_tower_says_so(client: openai.OpenAI, url: str) -> None:
    assert client.models.list().data[0].supports_image_in
    with running(lambda: speaking(seen)) as blind:
        other = openai.OpenAI(base_url=f"{blind}/v1", api_key="none", max_retries=0)
        assert not other.models.list().data[0].supports_image_in
        with pytest.raises(openai.BadRequestError, match="no vision tower is loaded"):
            chat(other, part("A"))


def test_settings_come_from_the_options() -> None:
    from kimi_lite.apps.server.command import settings_of
    from kimi_lite.options import Options

    assert settings_of(Options(max_images=3)).max_images == 3
    assert replace(ServerSettings(), max_images=2).max_images == 2
