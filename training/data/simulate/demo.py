"""The demo data set: folders of simulated clips as a user would have them."""

from fractions import Fraction
from pathlib import Path

import numpy as np

from training.data.simulate.scenes import KINDS, simulate_clip
from uscl_hub.files import write_whole


def write_demo(out: Path | str, clips: int, frames: int, size: int, seed: int) -> Path:
    """Write `clips` simulated clips as video files out/<kind>/subjNN_clipNN.mp4 and return `out`.

    Kinds take turns; a subject has up to four clips of one kind. Some subjects' scanners draw a user interface and
    text around the image. Same arguments, same frames.
    """
    out = Path(out)
    per_kind = [len(range(k, clips, len(KINDS))) for k in range(len(KINDS))]
    for kind, count in zip(KINDS, per_kind):
        for i in range(count):
            subject, number = i // 4, i % 4
            person = seed * 10_000 + KINDS.index(kind) * 1000 + subject
            movie = simulate_clip(kind, frames, size, seed=number, subject=person)
            if np.random.default_rng([person, 4]).random() < 0.4:
                movie = add_interface(movie, seed=person)
            write_video(out / kind / f"subj{subject:02d}_clip{number:02d}.mp4", movie)
    return out


def add_interface(movie: np.ndarray, seed: int) -> np.ndarray:
    """uint8 (T, H, W) on a larger canvas, even in both sides, with the static parts of a scanner's screen."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng([seed, 5])
    t, height, width = movie.shape
    top, bottom, left, right = (
        int(x * height) for x in rng.uniform((0.14, 0.08, 0.10, 0.45), (0.24, 0.18, 0.25, 0.60))
    )
    canvas = Image.new("L", ((left + width + right + 1) // 2 * 2, (top + height + bottom + 1) // 2 * 2), 0)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(8, height // 11))
    draw.rectangle((0, 0, canvas.width, top - max(2, top // 4)), fill=int(rng.integers(25, 70)))
    draw.text((3, 1), f"DEMO {rng.integers(100, 999)}", fill=int(rng.integers(170, 255)), font=font)
    for i, text in enumerate(("B 12Hz", "G 54", "D 8cm")):
        draw.text((left + width + 2, top + i * height // 7), text, fill=200, font=font)
    ruler = max(1, left // 3)
    for i in range(9):  # depth marks
        y = top + i * (height - 1) // 8
        draw.line((left - ruler, y, left - ruler + 2 + 2 * (i % 4 == 0), y), fill=190)
    for i in range(height // 2):  # grey bar
        draw.line((1, top + i, 3, top + i), fill=255 - 2 * 255 * i // height)
    framed = np.repeat(np.asarray(canvas)[None], t, 0)
    framed[:, top : top + height, left : left + width] = movie
    return framed


def write_video(path: Path | str, movie: np.ndarray, fps: int = 15):
    """Grey uint8 (T, H, W) -> H.264 (MPEG-4 where PyAV has no x264) in a file that appears when it is complete."""
    write_whole(path, lambda part: _encode(part, movie, fps))


def _encode(path: Path, movie: np.ndarray, fps: int):
    import av

    height, width = (side - side % 2 for side in movie.shape[1:])  # 4:2:0 has no odd sides
    x264 = "libx264" in av.codecs_available
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264" if x264 else "mpeg4",
            rate=Fraction(fps),
            options={"crf": "16", "preset": "ultrafast"} if x264 else {"qscale": "2"},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        for grey in movie:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(grey[:height, :width]), "gray")
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
