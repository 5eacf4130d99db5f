"""A video file to resized frames, with PyAV. Runs in the process of `media.child`.

Frames are sampled evenly at the wanted rate and stand at index / frame rate. Only containers of one file are opened:
playlists name other files.
"""

from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from kimi_lite.media.image import Frame, Unreadable, require_size, resize
from kimi_lite.media.preprocess import MAX_FRAME_PATCHES, sampled_frames

_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,gif,ivf,webp,apng,h264,hevc,m4v,mjpeg,nut"
_PROGRESS_FRAMES = 30  # decoded between two reports


class TimedFrame(NamedTuple):
    seconds: float
    frame: Frame


def read_frames(
    file: BinaryIO, wanted_rate: float, max_frames: int, max_pixels: int, on_progress: Callable[[int, int], None]
) -> Iterator[TimedFrame]:
    """The sampled frames in order. on_progress: frames decoded, frames in all. Unreadable, or what PyAV raises at
    damaged files."""
    num_frames, rate = _length(file)
    wanted = sampled_frames(num_frames, rate, wanted_rate, max_frames)
    position = 0
    with _opened(file) as container:
        stream = container.streams.video[0]
        require_size(stream.codec_context.width or 1, stream.codec_context.height or 1, max_pixels)
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index % _PROGRESS_FRAMES == 0:
                on_progress(min(index, num_frames), num_frames)
            if index < wanted[position]:
                continue
            require_size(frame.width, frame.height, max_pixels)
            yield TimedFrame(index / rate, resize(_upright(frame), MAX_FRAME_PATCHES))
            position += 1
            if position == len(wanted):
                return
    if not position:
        raise Unreadable("has no frame that can be decoded")


def _opened(file: BinaryIO):
    import av

    file.seek(0)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
    container = av.open(file, options=options, metadata_errors="replace")
    if not container.streams.video:
        container.close()
        raise Unreadable("has no video in it")
    return container


def _length(file: BinaryIO) -> tuple[int, float]:
    """Frames, and frames a second. Counted packet by packet where the file's header does not say."""
    with _opened(file) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        num_frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if not num_frames or not 0 < rate < 1e6:
        raise Unreadable("does not say how many frames it has a second" if num_frames else "has no frames")
    return num_frames, rate


def _upright(frame):
    """As a Pillow image, turned as the camera was held."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image
