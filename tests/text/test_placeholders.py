"""Places of images and videos in prompts: as the vendor's processor writes them, and never where a message says so."""

from itertools import count

import pytest
from conftest import encode_markers, make_metadata
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.text.placeholders import PAD, VIDEO
from kimi_lite.text.template import ChatTemplate
from kimi_lite.text.tokenizer import Tokenizer

SPECIAL = ["<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>", "<think>", "</think>"]
MEDIA = ["<|media_begin|>", "<|media_content|>", "<|media_end|>", PAD]
CALLS = ["<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
         "<|tool_calls_section_end|>"]  # fmt: skip
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
FILM = {"type": "video_url", "video_url": {"url": "file:///film.mp4"}}
STAMPS = ["00:00:00.000", "00:00:02.000"]


def tokenizer_of(special: list[str]) -> Tokenizer:
    tokens = [bytes([byte]) for byte in range(256)] + [b"00", b"e0", b"00:"]
    return Tokenizer.from_metadata(make_metadata(tokens, special, "gpt-2", bos_token_id=259, eos_token_id=260))


@pytest.fixture(scope="module")
def kimi_like() -> Tokenizer:
    return tokenizer_of([*SPECIAL, *MEDIA, *CALLS])


@pytest.fixture(scope="module")
def template(kimi_like: Tokenizer) -> ChatTemplate:
    return ChatTemplate.from_metadata({}, kimi_like)


def user(*parts: dict | str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def prompt_of(body: str) -> str:
    return f"<|im_user|>user<|im_middle|>{body}<|im_end|><|im_assistant|>assistant<|im_middle|><think>"


def shown(kind: str) -> str:
    return f"<|media_begin|>{kind}<|media_content|>{PAD}<|media_end|>"


def test_images_and_videos_are_written_as_the_vendor_s_processor_does(
    template: ChatTemplate, kimi_like: Tokenizer
) -> None:
    """A time stamp is tokenized together with the text before it."""
    found = template.encode([user("Describe", FILM, "and", IMAGE, IMAGE, "now")], media=[STAMPS, [""], [""]])
    video = STAMPS[0] + shown("video") + STAMPS[1] + shown("video") + "\n"
    image = shown("image") + "\n"
    expected = encode_markers(kimi_like, prompt_of(f"Describe{video}and{image}{image}now"), [*SPECIAL, *MEDIA])
    assert found.ids == expected
    assert [found.ids[place] for place in found.places] == [kimi_like.special[PAD]] * 4
    assert found.starts_in_reasoning


@pytest.mark.parametrize("media", [[], [[""]], [[""], [""], [""]], [STAMPS]])
def test_more_or_fewer_places_than_images_are_an_error(media: list[list[str]], template: ChatTemplate) -> None:
    with pytest.raises(KimiLiteError, match=f"shows {len(media)} images and videos, .* 2 places"):
        template.encode([user(IMAGE, "and", IMAGE)], media=media)


@pytest.mark.parametrize("has_media_tokens", [False, True])
def test_a_template_without_images_gets_them_in_their_places(has_media_tokens: bool) -> None:
    tokenizer = tokenizer_of(["<|im_start|>", "<|im_end|>", *(MEDIA if has_media_tokens else [])])
    template = ChatTemplate.from_metadata({"tokenizer.chat_template": CHATML}, tokenizer)
    found = template.encode([user("a", IMAGE, "b", FILM)], media=[[""], STAMPS])
    image, chunk = (shown("image"), shown("video")) if has_media_tokens else (PAD, PAD)
    body = f"a{image}\nb{STAMPS[0]}{chunk}{STAMPS[1]}{chunk}"
    text = f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
    ids, places = [], []
    for i, part in zip(count(), text.split(PAD), strict=False):
        if i:
            places.append(len(ids))
            ids.append(template.pad_id)
        ids += encode_markers(tokenizer, part, [name for name in tokenizer.special if name != PAD])
    assert (found.ids, list(found.places)) == (ids, places)
    assert len(places) == 3


NASTY = st.lists(
    st.sampled_from([PAD, VIDEO, *MEDIA, "<|media_", "pad|>", "\ue000", "\ue001", STAMPS[0]])
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=3),
    max_size=5,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(NASTY, min_size=3, max_size=3), has_image=st.booleans())
def test_nothing_that_a_message_says_becomes_a_place(
    texts: list[str], has_image: bool, template: ChatTemplate, kimi_like: Tokenizer
) -> None:
    parts = [texts[0], *([IMAGE] if has_image else []), texts[1]]
    messages = [{"role": "system", "content": texts[2]}, user(*parts)]
    found = template.encode(messages, media=[[""]] if has_image else [])
    special = [i for i in found.ids if i in kimi_like.special.values()]
    harmless = template.encode(
        [{"role": "system", "content": "x"}, user("x", *([IMAGE] if has_image else []))],
        media=[[""]] if has_image else [],
    )
    assert special == [i for i in harmless.ids if i in kimi_like.special.values()]
    assert len(found.places) == has_image
    image = shown("image") + "\n" if has_image else ""
    system = f"<|im_system|>system<|im_middle|>{texts[2]}<|im_end|>"
    assert kimi_like.decode(found.ids) == system + prompt_of(texts[0] + image + texts[1])
