"""Videos: which frames, in which chunks, at which times; and files that are none."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.media.medium import Medium, Source
from kimi_lite.media.preprocess import sampled_frames, time_stamp
from kimi_lite.media.reader import MediaLimits, MediaReader
from tests.media.pictures import encoded, pixels, write_video

pytest.importorskip("av", reason="PyAV is not installed")


def read(path: Path, limits: MediaLimits | None = None, on_frames=None) -> Medium:
    return MediaReader(limits).read(Source("video", path.name, path=path), on_frames)


def greys(medium: Medium) -> list[float]:
    """The brightness of every frame."""
    levels = []
    for item in medium.items:
        frames = item.patches.pixels.reshape(item.patches.grid.t, -1, 3, 14, 14)
        levels += [float(frame[0].mean()) for frame in frames]  # the first patch has no padding
    return levels


@pytest.fixture(scope="module")
def ten_seconds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "ten.mp4", 100, 10)


@pytest.mark.parametrize(
    ("limits", "num_frames"),
    [
        (MediaLimits(), 20),
        (MediaLimits(fps=1.0), 10),
        (MediaLimits(max_frames=6), 6),
        (MediaLimits(max_frames=1), 1),
        (MediaLimits(fps=50.0), 100),
    ],
)
def test_frames_are_sampled_evenly_and_chunks_say_when_they_begin(
    limits: MediaLimits, num_frames: int, ten_seconds: Path
) -> None:
    indices = sampled_frames(100, 10.0, limits.fps, limits.max_frames)
    assert len(indices) == num_frames
    medium = read(ten_seconds, limits)
    assert [item.patches.grid.t for item in medium.items] == [
        min(4, num_frames - first) for first in range(0, num_frames, 4)
    ]
    assert [item.stamp for item in medium.items] == [time_stamp(indices[i] / 10) for i in range(0, num_frames, 4)]
    assert np.allclose(greys(medium), [min(2 * i, 255) for i in indices], atol=6)
    assert {item.patches.grid[1:] for item in medium.items} == {(4, 6)}  # 64 x 48, padded to 84 x 56


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "mpeg4"), ("a.avi", "mpeg4"), ("a.webm", "libvpx")])
def test_every_container_gives_the_same_frames(name: str, codec: str, tmp_path: Path) -> None:
    """Matroska does not say how many frames it has: they are counted."""
    medium = read(write_video(tmp_path / name, 30, 10, codec=codec))
    assert [item.stamp for item in medium.items] == ["00:00:00.000", time_stamp(23 / 10)]
    assert np.allclose(greys(medium), [2 * i for i in sampled_frames(30, 10.0, 2.0, 128)], atol=8)


def test_an_animated_image_is_a_video_too(tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.new("RGB", (32, 32), (20 * i,) * 3) for i in range(8)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)
    medium = read(path)
    assert np.allclose(greys(medium), [20 * i for i in range(8)], atol=4)


def test_progress_is_told_while_frames_are_decoded(ten_seconds: Path) -> None:
    told = []
    read(ten_seconds, on_frames=lambda done, total: told.append((done, total)))
    assert told == [(0, 100), (30, 100), (60, 100), (90, 100)]


def test_equal_chunks_have_equal_digests_and_others_do_not(ten_seconds: Path, tmp_path: Path) -> None:
    first, second = (read(ten_seconds) for _ in range(2))
    assert [item.digest for item in first.items] == [item.digest for item in second.items]
    assert len({item.digest for item in first.items}) == len(first.items)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    concat = b"ffconcat version 1.0\nfile /etc/passwd\n"
    hostile = {"a.m3u8": playlist, "b.mp4": playlist, "c.mp4": concat, "d.mp4": b"", "e.mp4": bytes(5000)}
    for name, data in hostile.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(KimiLiteError, match=f"{name} "):
            read(tmp_path / name)
    with pytest.raises(KimiLiteError, match="64 x 48 pixels"):
        read(write_video(tmp_path / "large.mp4", 3, 10), MediaLimits(max_pixels=1000))


@settings(max_examples=60, deadline=None)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20), end=st.floats(0.2, 1))
def test_damaged_videos_are_refused_or_read_and_nothing_else(
    places: list[tuple[float, int]], end: float, ten_seconds: Path
) -> None:
    file = bytearray(ten_seconds.read_bytes())
    for place, value in places:
        file[int(place * (len(file) - 1))] = value
    source = Source("video", "a.mp4", data=bytes(file[: int(end * len(file))]))
    try:
        medium = MediaReader(MediaLimits(max_pixels=1_000_000)).read(source)
    except KimiLiteError as error:
        is_one_sentence = error.message.startswith("a.mp4 ") and "\n" not in error.message
        assert is_one_sentence, error.message  # noqa: PT017
    else:
        assert 1 <= len(medium.items) <= 32


def test_an_image_is_no_bomb_as_a_video(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pixels(40, 30)))
    with pytest.raises(KimiLiteError):
        read(path)
