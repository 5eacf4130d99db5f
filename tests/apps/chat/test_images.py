"""Images and videos in the chat: attached, shown, kept when a message is edited, exported; from the clipboard, too."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.apps.chat import thumbnail
from kimi_lite.apps.chat.attachments import attachments_of, read_image, read_video
from kimi_lite.apps.chat.clipboard import clipboard_image
from kimi_lite.errors import KimiLiteError
from kimi_lite.media.preprocess import Size, to_patches
from kimi_lite.terminal import Console
from tests.apps.talk import Talk
from tests.engine.fakes import fake_vision
from tests.media.pictures import Image, encoded, pixels, write_video


@pytest.fixture
def talk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Talk:
    talk = Talk(tmp_path / "sessions", capsys)
    talk.session.engine.vision = fake_vision()
    talk.session.set_thinking(False)
    return talk


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(pixels(56, 28)))
    return path


def shown_parts(talk: Talk) -> list[str]:
    content = talk.session.turns[-2].content
    return [] if isinstance(content, str) else [part["type"] for part in content]


def test_images_and_videos_go_with_the_next_message_in_their_order(talk: Talk, photo: Path, tmp_path: Path) -> None:
    film = write_video(tmp_path / "film.mp4", 20, 10)
    assert "photo.png (image, 2 tokens) goes with your next message" in talk.say(f"/image {photo}")
    assert "film.mp4 (video, 6 tokens) goes with your next message" in talk.say(f"/video {film}")
    assert "photo.png (image, 2 tokens), film.mp4 (video, 6 tokens)" in talk.say("/read")
    talk.say("what are they?")
    assert shown_parts(talk) == ["image_url", "video_url", "text"]
    assert talk.session.turns[0].content[1]["video_url"]["url"] == film.as_uri()
    assert "film.mp4 (video, 6 tokens) goes with this message" in talk.say(f"and {film}?")


def test_what_cannot_be_read_is_said_at_once(talk: Talk, tmp_path: Path) -> None:
    for name, data, words in (
        ("cut.png", encoded(pixels(40, 30))[:-60], "is cut off"),
        ("drawing.svg", b"<svg/>", "is not a PNG"),
        ("empty.png", b"", "is not a PNG"),
    ):
        (tmp_path / name).write_bytes(data)
        assert words in talk.say(f"/image {tmp_path / name}")
    assert "is not a video" in talk.say(f"/video {tmp_path / 'drawing.svg'}")
    assert talk.chat.attachments == []
    assert "There is no video" in talk.say("/video")


def test_an_animation_is_said_to_be_one(talk: Talk, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (28, 28), color) for color in ("red", "blue")]
    (tmp_path / "a.gif").write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert "a.gif (image, 1 token, the first frame of an animation)" in talk.say(f"/image {tmp_path / 'a.gif'}")


def test_an_edited_message_keeps_its_images(talk: Talk, photo: Path) -> None:
    talk.say(f"/image {photo}", "what is it?")
    before = talk.session.turns[0].content
    talk.say("/edit and now?")
    assert talk.session.turns[0].content == [before[0], {"type": "text", "text": "and now?"}]
    assert "image 1 stays with the message" in talk.say("/edit", "well?")
    assert talk.session.turns[0].content == [before[0], {"type": "text", "text": "well?"}]
    talk.say("/edit", None)  # Ctrl-C
    assert talk.chat.attachments == []
    talk.say("/regen")
    talk.say("/undo")
    assert talk.session.turns == []
    assert talk.session.engine.vision.num_encoded == 1


def test_a_saved_conversation_has_its_images_again(talk: Talk, photo: Path) -> None:
    talk.say(f"/image {photo}", "what is it?", "/save a", "/clear", "/load a", "and?")
    assert shown_parts(talk) == []
    assert [part["type"] for part in talk.session.turns[0].content] == ["image_url", "text"]
    assert talk.session.turns[-1].text == "you said: and?"


def test_export_writes_images_beside_the_text(talk: Talk, photo: Path, tmp_path: Path) -> None:
    film = write_video(tmp_path / "film.mp4", 4, 10)
    talk.say(f"/image {photo}", f"/image {photo}", "look", f"/video {film}", "and this")
    document = tmp_path / "talk.md"
    assert f"2 images to {tmp_path / 'talk-images'}" in talk.say(f"/export md {document}")
    text = document.read_text()
    linked = re.findall(r"!\[image \d\]\(<(.*)>\)", text)
    assert linked == ["talk-images/1.png", "talk-images/2.png"]
    assert all((tmp_path / name).read_bytes() == photo.read_bytes() for name in linked)
    assert str(film) in text


def test_without_a_tower_it_is_said_what_to_do(talk: Talk, photo: Path) -> None:
    talk.session.engine.vision = None
    for line in (f"/image {photo}", "/image", f"/video {photo}"):
        shown = talk.say(line)
        assert "a vision tower; fake has none here" in shown
        assert "--mmproj" in shown


def with_program(folder: Path, name: str, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that writes these bytes, alone in the PATH."""
    for variable in ("WAYLAND_DISPLAY", "DISPLAY", "WSL_DISTRO_NAME", "SSH_CONNECTION"):
        monkeypatch.delenv(variable, raising=False)
    (folder / "clip").write_bytes(data)
    script = folder / "bin" / name
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\nexec /bin/cat '{folder / 'clip'}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))


@pytest.mark.parametrize(("name", "variable"), [("wl-paste", "WAYLAND_DISPLAY"), ("xclip", "DISPLAY")])
def test_the_clipboard_s_image_is_attached(
    name: str, variable: str, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(pixels(28, 28))
    with_program(tmp_path, name, data, monkeypatch)
    monkeypatch.setenv(variable, "x")
    assert "clipboard (image, 1 token) goes with your next message" in talk.say("/image")
    assert clipboard_image() == data
    (tmp_path / "clip").write_bytes(b"")
    assert "There is no image in the clipboard" in talk.say("/image")
    (tmp_path / "clip").write_bytes(data)
    with pytest.raises(KimiLiteError, match="can be read"):
        clipboard_image(max_bytes=10)


def test_where_no_program_reads_the_clipboard_that_is_said(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_program(tmp_path, "true", b"", monkeypatch)
    assert "wl-paste, xclip or pngpaste is needed; none is here" in talk.say("/image")
    monkeypatch.setenv("SSH_CONNECTION", "1 2 3 4")
    assert "over ssh the clipboard is on the other machine" in talk.say("/image")


def test_for_an_endpoint_a_video_is_sent_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = write_video(tmp_path / "film.mp4", 4, 10)
    url = read_video(str(film), is_sent=True).url
    assert base64.b64decode(url.removeprefix("data:video/mp4;base64,")) == film.read_bytes()
    monkeypatch.setattr("kimi_lite.apps.chat.attachments.MAX_SENT_VIDEO_BYTES", 10)
    with pytest.raises(KimiLiteError, match="can be read"):
        read_video(str(film), is_sent=True)


def test_attachments_of_a_message_are_those_that_were_sent(photo: Path) -> None:
    one = read_image(str(photo))
    again = attachments_of([one.part, {"type": "text", "text": "x"}])
    assert [each.part for each in again] == [one.part]
    assert attachments_of("text") == []


# Thumbnails -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-sixel"}, "sixel"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, "blocks"),
        ({}, "blocks"),
    ],
)
def test_terminals_are_known_by_their_names(environment: dict[str, str], protocol: str) -> None:
    assert thumbnail.protocol_of(environment) == protocol


def patches_of(image: np.ndarray):
    return to_patches([image.tobytes()], Size(image.shape[1], image.shape[0]))


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("size", [(28, 28), (700, 300), (28, 2800), (2800, 28)])
def test_pictures_are_small_and_whole_in_every_protocol(size: tuple[int, int]) -> None:
    image = pixels(*size)
    picture = thumbnail.small_picture(patches_of(image), 32, 10)
    assert picture.shape[1] <= 32 * 8 and picture.shape[0] <= 10 * 16
    assert np.array_equal(decoded(thumbnail.png(picture)), picture)
    sent = "".join(thumbnail.kitty(picture))
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", sent)
    assert [head.endswith("m=0") for head, _ in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(len(body) <= 4096 for _, body in chunks)
    assert np.array_equal(decoded(base64.b64decode("".join(body for _, body in chunks))), picture)
    inline = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);[^:]*:(.*)\x07\n", "".join(thumbnail.iterm2(picture)))
    assert inline and len(base64.b64decode(inline[2])) == int(inline[1])
    assert np.abs(of_sixels("".join(thumbnail.sixel(picture)), picture.shape).astype(int) - picture).max() <= 28


def of_sixels(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a terminal draws."""
    body = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\\n', text)
    assert body and (int(body[2]), int(body[1])) == shape[:2]
    colours = {
        int(n): [int(p) * 255 / 100 for p in rgb.split(";")] for n, rgb in re.findall(r"#(\d+);2;([\d;]+)", body[3])
    }
    canvas = np.full((-(-shape[0] // 6) * 6, *shape[1:]), -1000.0)
    bands = re.sub(r"#\d+;2;[\d;]+", "", body[3]).split("-")
    for top, band in enumerate(bands[:-1]):
        for colour, dots in re.findall(r"#(\d+)([^#$]*)\$", band):
            for column, dot in enumerate(dots):
                for row in range(6):
                    if (ord(dot) - 63) >> row & 1:
                        canvas[6 * top + row, column] = colours[int(colour)]
    return canvas[: shape[0]]


def test_half_blocks_show_two_pixels_a_character() -> None:
    image = np.zeros((320, 256, 3), np.uint8)
    image[:160] = (250, 0, 0)
    text = thumbnail.half_blocks(thumbnail.small_picture(patches_of(image), 32, 10))
    lines = text.plain.splitlines()
    assert len(lines) == 10
    assert set("".join(lines)) == {"▀", " "}
    assert "rgb(250,0,0)" in str(text.spans[0].style) or "#fa0000" in str(text.spans[0].style)


@pytest.mark.parametrize(("is_terminal", "is_shown"), [(True, True), (False, False)])
def test_a_pipe_gets_no_picture(is_terminal: bool, is_shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-kitty")
    monkeypatch.delenv("TMUX", raising=False)
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, color_system="truecolor" if is_terminal else None)
    thumbnail.show_thumbnail(console, patches_of(pixels(28, 28)))
    assert ("\x1b_G" in out.getvalue()) == is_shown
    assert is_shown or out.getvalue() == ""
