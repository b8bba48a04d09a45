"""Frames of a video, by PyAV."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Iterator

import numpy as np

from uscl_hub.clips.clip import MAX_PIXELS, Clip, UnreadableClip, check_pixels, must_be_a_file, reason_of

# A renamed playlist must not make the decoder open other files or the network.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,mpeg,mpegvideo,mpegts,matroska,webm,asf,gif,h264,hevc,m4v,flv,ogg"
# 8-bit formats of FFmpeg whose first plane is luma at full resolution
_LUMA_FIRST = {f"yuv{full}{cut}p" for full in ("", "j") for cut in (420, 422, 444)} | {"nv12", "gray"}


def video_frames(clip: Clip, stride: int, note) -> Iterator[tuple[np.ndarray, float | None, float | None]]:
    """Every `stride`-th frame of a file's main video stream, as it is meant to be displayed."""
    path = clip.files[0]
    must_be_a_file(path)
    # absolute, so that a name like 'http:x.mp4' is a file
    yield from stream_frames(os.path.abspath(path), path, stride, note)


def stream_frames(source, path: Path, stride: int, note):
    """Yields uint8 (H, W), frames per second, seconds since the first frame. source: a name or an open file; path:
    what errors name."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install 'uscl-hub[media]'") from error
    count, start = 0, None
    try:
        with av.open(
            source,
            metadata_errors="ignore",  # tags in any encoding
            # not options=, which are the streams', too: with these, PyAV before 18 crashes at MPEG program streams
            container_options={"protocol_whitelist": "file", "format_whitelist": _DEMUXERS},
        ) as container:
            stream = _main_stream(container, path)
            rate = stream.average_rate or stream.guessed_rate
            fps = float(rate) if rate and 0 < rate < 10_000 else None
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise UnreadableClip(path, f"damaged at frame {count}")
                start = frame.time if count == 0 else start
                if count % stride == 0:
                    check_pixels(path, frame.width, frame.height)
                    grey = video_grey(frame)
                    if frame.rotation % 360:
                        grey = np.rot90(grey, round(frame.rotation / 90))
                    timed = frame.time is not None and start is not None
                    yield np.ascontiguousarray(grey), fps, frame.time - start if timed else None
                count += 1
            if count < 0.9 * stream.frames:
                note(f"its header says {stream.frames} frames, {count} could be decoded")
    except (av.error.FFmpegError, ValueError) as error:
        where = f"damaged after frame {count}: " if count else ""
        raise UnreadableClip(path, where + reason_of(error)) from error


def _main_stream(container, path: Path):
    """The video itself where a thumbnail or a cover is a stream, too."""
    stream = container.streams.best("video")
    if stream is None:
        raise UnreadableClip(path, "no video stream")
    stream.thread_type, stream.thread_count = "NONE", 1  # processes, not threads, share the cores
    context = stream.codec_context
    if context is None:
        raise UnreadableClip(path, "no decoder for its video codec")
    # frames that grow on the way: ours is the better message, FFmpeg's limit comes before the memory is taken
    context.options = {"max_pixels": str(4 * MAX_PIXELS)}
    if context.width and context.height:
        check_pixels(path, context.width, context.height)
    return stream


def video_grey(frame) -> np.ndarray:
    """uint8 (H, W): what frame.to_ndarray(format="gray") gives, which takes longer than to decode the frame."""
    y, levels = frame.planes[0], None
    if frame.format.name in _LUMA_FIRST and y.line_size >= frame.width:
        levels = _grey_levels(frame.format.name, frame.color_range, frame.colorspace)
    if levels is None:
        return frame.to_ndarray(format="gray")
    luma = np.frombuffer(y, np.uint8).reshape(-1, y.line_size)[: frame.height, : frame.width]
    return np.take(levels, luma, mode="clip")


@lru_cache
def _grey_levels(name, color_range, colorspace) -> np.ndarray | None:
    """uint8 (256,): the grey level of each value of luma, asked of FFmpeg with a frame that holds them all; None if
    it depends on the colour, too (of BT.709, for one)."""
    import av

    levels = []
    for colour in (64, 192):
        ramp = av.VideoFrame(256, 2, name)
        ramp.color_range, ramp.colorspace = color_range, colorspace
        for i, plane in enumerate(ramp.planes):
            row = np.full(plane.line_size, colour) if i else np.arange(plane.line_size)
            plane.update(np.tile(row.astype(np.uint8), plane.buffer_size // plane.line_size).tobytes())
        levels.append(ramp.to_ndarray(format="gray")[0])
    return levels[0] if np.array_equal(*levels) else None
