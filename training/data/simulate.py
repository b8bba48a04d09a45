"""Simulated B-mode clips: point scatterers, a depth-dependent point spread function, envelope, log compression.

The classic linear model (Meunier and Bertrand 1995; Gao et al. 2009, COLE): each scatterer adds a phase-carrying
sample to a complex baseband image in acquisition coordinates (depth, beam), which is convolved with an axial pulse
and a lateral beam profile that widens away from the focus; the envelope is log compressed and scan converted.
Speckle is therefore fully developed and moves with the tissue. All kinds share the same ranges of scatterer density,
pulse, beam, gain and noise, so that they differ in anatomy and motion, not in texture.

Coordinates: z is depth (0 at the probe, 1 at the bottom), x is lateral, both in units of the imaging depth.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np

KINDS = ("vessel", "muscle", "lung", "cyst", "lesion")

_WAVENUMBER = 2 * np.pi * 120  # of the two-way phase: 120 wavelengths a unit of depth


def simulate_clip(kind: str, frames: int, size: int, seed: int, *, subject: int | None = None) -> np.ndarray:
    """uint8 (frames, size, size): one clip of a scene. Black outside the sector.

    kind: one of KINDS. seed: probe position, motion, speckle and noise. subject: anatomy, probe geometry (linear or
    sector) and scanner settings, default `seed`; clips of one subject and kind look alike but are never equal.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if frames < 1 or size < 16:
        raise ValueError(f"frames must be at least 1 and size at least 16, got {frames} and {size}")
    subject = seed if subject is None else subject
    anatomy = np.random.default_rng([subject, KINDS.index(kind), 1])
    scanner = np.random.default_rng([subject, 2])  # independent of kind
    rng = np.random.default_rng([seed, subject, KINDS.index(kind), 3])

    probe = _probe(scanner, size)
    scene = _SCENES[kind](anatomy, rng, frames)
    return _scan_convert(_acquire(scene, probe, frames, rng), probe, size)


# --------------------------------------------------------------------------------------------- the scanner


def _probe(rng: np.random.Generator, size: int) -> dict:
    """Acquisition grid and settings. Sector: beams fan out from an apex above the skin; linear: parallel beams."""
    sector = rng.random() < 0.5
    probe = dict(
        sector=sector,
        rows=round(1.5 * size),
        beams=round(0.75 * size),
        pulse=rng.uniform(0.006, 0.009),
        beam=rng.uniform(0.010, 0.014),
        focus=rng.uniform(0.35, 0.65),
        attenuation=rng.uniform(0.4, 1.2),
        dynamic=rng.uniform(48, 58),
        noise=10 ** rng.uniform(-2.6, -2.2),
    )
    if sector:
        probe.update(angle=rng.uniform(0.45, 0.7), radius=rng.uniform(0.15, 0.5))
    else:
        probe.update(half=rng.uniform(0.38, 0.5))
    return probe


def _to_beams(x, z, probe):
    """Scene coordinates -> (depth along the beam in 0..1, position over the beams in -1..1)."""
    if not probe["sector"]:
        return z, x / probe["half"]
    z = z + probe["radius"]
    return np.hypot(x, z) - probe["radius"], np.arctan2(x, z) / probe["angle"]


def _from_beams(depth, u, probe):
    if not probe["sector"]:
        return u * probe["half"], depth
    r = depth + probe["radius"]
    return r * np.sin(u * probe["angle"]), r * np.cos(u * probe["angle"]) - probe["radius"]


def _acquire(scene, probe: dict, frames: int, rng: np.random.Generator) -> np.ndarray:
    """float32 (frames, rows, beams): the log compressed envelope in 0..1, in acquisition coordinates."""
    rows, beams = probe["rows"], probe["beams"]
    half = 0.75 if probe["sector"] else probe["half"] + 0.06
    count = round(1.0 * rows * beams * (half / 0.5))  # about ten scatterers in a resolution cell
    x, z = rng.uniform(-half, half, count), rng.uniform(-0.03, 1.05, count)
    strength = rng.choice((-1.0, 1.0), count)

    depth = (np.arange(rows) + 0.5) / rows
    u = (np.arange(beams) + 0.5) / beams * 2 - 1
    grid_x, grid_z = _from_beams(depth[:, None], u[None, :], probe)

    # pulse and beam as Gaussian filters in the frequency domain; the beam's width is in scene units at each depth
    pulse = np.exp(-2 * (np.pi * np.fft.fftfreq(rows) * probe["pulse"] * rows) ** 2)
    width = probe["beam"] * np.sqrt(1 + ((depth - probe["focus"]) / 0.35) ** 2)
    spacing = 2 * (probe["angle"] * (depth + probe["radius"]) if probe["sector"] else probe["half"]) / beams
    lateral = np.exp(-2 * (np.pi * np.fft.fftfreq(beams)[None, :] * (width / spacing)[:, None]) ** 2)
    lateral *= np.sqrt(width / spacing)[:, None]  # as bright speckle everywhere: the scanner's gain compensation
    decay = np.exp(-probe["attenuation"] * 0.35 * depth)[:, None]

    out = np.empty((frames, rows, beams), np.float32)
    for t in range(frames):
        echo, moved_x, moved_z = scene.scatterers(t, x, z)
        r, v = _to_beams(moved_x, moved_z, probe)
        row, column = r * rows - 0.5, (v + 1) / 2 * beams - 0.5
        i, j = np.rint(row).astype(np.intp), np.floor(column).astype(np.intp)
        inside = (i >= 0) & (i < rows) & (j >= 0) & (j < beams - 1)
        i, j, part = i[inside], j[inside], column[inside] - j[inside]
        phasor = (strength * echo)[inside] * np.exp(-1j * _WAVENUMBER * r[inside])
        index = np.concatenate([i * beams + j, i * beams + j + 1])
        weight = np.concatenate([phasor * (1 - part), phasor * part])
        field = np.bincount(index, weight.real, rows * beams) + 1j * np.bincount(index, weight.imag, rows * beams)
        field = field.reshape(rows, beams).astype(np.complex64)
        field = np.fft.ifft(np.fft.fft(field, axis=0) * pulse[:, None].astype(np.float32), axis=0)
        field = np.fft.ifft(np.fft.fft(field, axis=1) * lateral.astype(np.float32), axis=1)
        envelope = np.abs(field) * decay * scene.gain(t, grid_x, grid_z)
        noise = rng.standard_normal((2, rows, beams), dtype=np.float32) * (
            probe["noise"] * np.exp(1.2 * depth)[:, None]
        )
        envelope = np.hypot(envelope + noise[0], noise[1])
        decibel = 20 * np.log10(envelope + 1e-6)
        out[t] = 1 + (decibel - 6) / probe["dynamic"]
    return out.clip(0, 1)


def _scan_convert(polar: np.ndarray, probe: dict, size: int) -> np.ndarray:
    """Bilinear, from acquisition coordinates to a square picture that the image area just fits."""
    _, rows, beams = polar.shape
    if probe["sector"]:
        radius, angle = probe["radius"], probe["angle"]
        half, top = (1 + radius) * np.sin(angle), radius * np.cos(angle) - radius
        scale = max(2 * half, 1 - top)
        z = top + (1 - top) / 2 + ((np.arange(size) + 0.5) / size - 0.5) * scale
    else:
        scale = 1.0
        z = (np.arange(size) + 0.5) / size
    x = ((np.arange(size) + 0.5) / size - 0.5) * scale
    depth, u = _to_beams(x[None, :], z[:, None], probe)
    row, column = np.broadcast_arrays(depth * rows - 0.5, (u + 1) / 2 * beams - 0.5)
    inside = (depth >= 0) & (depth <= 1) & (np.abs(u) <= 1)
    row, column = row[inside].clip(0, rows - 1.001), column[inside].clip(0, beams - 1.001)
    i, j = row.astype(np.intp), column.astype(np.intp)
    a, b = (row - i).astype(np.float32), (column - j).astype(np.float32)
    flat = polar.reshape(len(polar), -1)
    k = i * beams + j
    values = (
        flat[:, k] * ((1 - a) * (1 - b))
        + flat[:, k + 1] * ((1 - a) * b)
        + flat[:, k + beams] * (a * (1 - b))
        + flat[:, k + beams + 1] * (a * b)
    )
    out = np.zeros((len(polar), size, size), np.uint8)
    out[:, inside] = np.rint(values * 255).astype(np.uint8)
    return out


# ---------------------------------------------------------------------------------------------- the scenes


def _edge(distance, width=0.012):
    """0 to 1 across a boundary: smooth step of a signed distance (negative is inside)."""
    return 1 / (1 + np.exp(-np.clip(distance / width, -40, 40)))


def _ridge(distance, width):
    return np.exp(-0.5 * (distance / width) ** 2)


def _waves(rng, count, low, high):
    """A smooth random function of one variable, about 1 in size: irregular outlines and layers."""
    frequency, phase = rng.uniform(low, high, count), rng.uniform(0, 2 * np.pi, count)
    weight = rng.uniform(0.5, 1, count) / np.sqrt(count)
    return lambda s: (weight * np.sin(np.asarray(s)[..., None] * frequency + phase)).sum(-1)


class _Scene:
    """Material coordinates carry echogenicity; `displacement` moves them. Subclasses describe one anatomy."""

    def __init__(self, anatomy, rng, frames):
        self.a = anatomy
        self.phase = rng.uniform(0, 2 * np.pi)
        self.rate = rng.uniform(0.20, 0.34)  # radians a frame
        self.offset = rng.normal(0, 0.05), rng.normal(0, 0.015)  # of the probe, in this clip
        self.sway = rng.normal(0, 0.012), rng.uniform(0.03, 0.10), rng.uniform(0, 2 * np.pi)  # a hand is never still
        self.layers = _waves(anatomy, 4, 3, 9)
        self.skin = anatomy.uniform(0.03, 0.07)
        self.build(anatomy)
        self._echo = None

    def cycle(self, t):
        return np.sin(self.phase + self.rate * t)

    def probe_shift(self, t):
        size, rate, phase = self.sway
        return self.offset[0] + size * np.sin(phase + rate * t), self.offset[1]

    def scatterers(self, t, x, z):
        """Echogenicity (amplitude) and position in front of the probe at frame t of scatterers seeded at x, z."""
        if self._echo is None:
            self._echo = self.echo(x + self.offset[0], z + self.offset[1]).clip(0)
        dx, dz = self.displacement(t, x + self.offset[0], z + self.offset[1])
        shift = self.probe_shift(t)
        return self._echo, x + dx - (shift[0] - self.offset[0]), z + dz

    def tissue(self, x, z):
        """Common background: skin line, fat and soft tissue of varying brightness."""
        level = 1 + 0.18 * self.layers(4 * z + x) + 0.10 * self.layers(2 * x - 3 * z)
        return level * (1 + 1.2 * _ridge(z - self.skin, 0.010))

    def gain(self, t, x, z):
        """Shadow and enhancement, in front of the probe."""
        return 1.0

    def displacement(self, t, x, z):
        return 0.0, 0.004 * self.cycle(t) * z


class _Vessel(_Scene):
    """An artery across or along the beam: dark lumen, bright wall that pulses, flowing weak scatterers."""

    def build(self, a):
        self.centre = a.uniform(-0.12, 0.12), a.uniform(0.35, 0.62)
        self.radius, self.pulse = a.uniform(0.09, 0.15), a.uniform(0.08, 0.16)
        self.long, self.tilt = a.random() < 0.5, a.uniform(-0.25, 0.25)
        self.wall, self.blood, self.flow = a.uniform(1.6, 2.4), a.uniform(0.03, 0.07), a.uniform(0.02, 0.05)

    def _distance(self, x, z):
        across = z - self.centre[1] - self.tilt * x
        return np.abs(across) if self.long else np.hypot(x - self.centre[0], 0.95 * (z - self.centre[1]))

    def echo(self, x, z):
        r = self._distance(x, z)
        outside = _edge(r - self.radius, 0.006)
        wall = self.wall * (_ridge(r - self.radius - 0.006, 0.007) + 0.7 * _ridge(r - self.radius - 0.035, 0.007))
        return self.tissue(x, z) * outside + self.blood * (1 - outside) + wall

    def displacement(self, t, x, z):
        beat = np.maximum(0, self.cycle(t * 1.8)) ** 2
        r = self._distance(x, z)
        push = (
            self.pulse
            * beat
            * self.radius
            * np.minimum(1, self.radius / np.maximum(r, 1e-3))
            * np.minimum(1, r / self.radius)
        )
        if self.long:
            dx = np.where(r < 0.9 * self.radius, _wrap(self.flow * t * (1 - (r / self.radius) ** 2), x), 0)
            return dx, push * np.sign(z - self.centre[1] - self.tilt * x)
        safe = np.maximum(r, 1e-3)
        swirl = np.where(r < 0.9 * self.radius, 0.5 * self.flow * np.sin(2.1 * t), 0)
        return push * (x - self.centre[0]) / safe + swirl, push * (z - self.centre[1]) / safe + swirl


def _wrap(shift, x, half=0.8):
    """Flow that leaves on one side enters on the other."""
    return (x + shift + half) % (2 * half) - half - x


class _Muscle(_Scene):
    """Two muscles between bright aponeuroses: oblique fascicles that steepen and shorten when it contracts."""

    def build(self, a):
        self.top, self.middle = a.uniform(0.12, 0.20), a.uniform(0.45, 0.60)
        self.bottom = self.middle + a.uniform(0.25, 0.33)
        self.pennation, self.spacing = a.uniform(0.25, 0.55), a.uniform(0.07, 0.10)
        self.contrast, self.strength, self.slope = a.uniform(1.5, 2.2), a.uniform(0.02, 0.05), a.uniform(-0.12, 0.12)
        self.wobble = _waves(a, 5, 6, 30)

    def echo(self, x, z):
        z = z - self.slope * x
        upper, lower = z - self.pennation * x, z + 0.6 * self.pennation * x
        lines = np.where(z < self.middle, upper, lower) / self.spacing + 0.6 * self.wobble(x + 2 * z)
        fascicles = np.maximum(0, np.cos(2 * np.pi * lines)) ** 4
        inside = _edge(z - self.top, 0.008)
        body = 0.22 + self.contrast * fascicles
        fat = 0.8 * self.tissue(x, z)
        deep = _edge(z - self.bottom, 0.01)
        level = fat * (1 - inside) + body * inside * (1 - deep) + 0.12 * deep
        for where, bright in ((self.top, 3.0), (self.middle, 3.6), (self.bottom, 3.6)):
            level = level + bright * _ridge(z - where - 0.006 * self.wobble(3 * x), 0.008)
        return level

    def displacement(self, t, x, z):
        pull = self.strength * (1 + self.cycle(t))
        across = (z - self.middle) / 0.4
        return pull * np.exp(-(across**2)) * np.where(z < self.middle, 1, 0.6), 0.25 * pull * np.sin(np.pi * z) * (
            1 + x
        )


class _Lung(_Scene):
    """Chest wall, two ribs with shadows, the sliding pleural line, A-lines and, in some subjects, B-lines."""

    def build(self, a):
        self.pleura, self.slide = a.uniform(0.20, 0.32), a.uniform(0.02, 0.05)
        self.ribs = a.uniform(-0.62, -0.45), a.uniform(0.45, 0.62)
        self.rib_width, self.curve = a.uniform(0.07, 0.11), a.uniform(0.0, 0.25)
        self.a_lines = a.uniform(0.5, 1.0)
        self.b_lines = a.uniform(-0.35, 0.35, a.integers(0, 4))
        self.b_width, self.rough = a.uniform(0.012, 0.03), _waves(a, 6, 20, 80)

    def _line(self, x):
        return self.pleura + self.curve * x**2

    def echo(self, x, z):
        line = self._line(x)
        wall = self.tissue(x, z) * (0.7 + 0.35 * self.layers(40 * z + 2 * x))
        level = wall * (1 - _edge(z - line, 0.004)) + 0.16 * _edge(z - line, 0.004)
        level = level + 5.0 * _ridge(z - line - 0.002 * self.rough(x), 0.006)
        for order, loss in ((2, 0.55), (3, 0.25)):
            level = level + 4.0 * self.a_lines * loss * _ridge(z - order * line, 0.007)
        for rib in self.ribs:
            bone = self.pleura - 0.06 + 2.0 * (x - rib) ** 2
            level = level + 5.0 * _ridge(z - bone, 0.008) * (np.abs(x - rib) < self.rib_width)
        return level

    def displacement(self, t, x, z):
        below = _edge(z - self._line(x) + 0.01, 0.006)  # the lung slides under a still chest wall
        return self.slide * self.cycle(t) * below, 0.006 * self.cycle(t)

    def gain(self, t, x, z):
        x = x + self.probe_shift(t)[0]
        gain = 1.0
        for rib in self.ribs:
            shadow = _edge(self.rib_width - np.abs(x - rib), 0.01) * _edge(z - self.pleura + 0.04, 0.01)
            gain = gain * (1 - 0.93 * shadow)
        line = self._line(x)
        rays = sum(
            (_ridge(x - ray - self.slide * self.cycle(t), self.b_width * (0.6 + z)) for ray in self.b_lines), 0.0
        )
        return gain * (1 + 5.0 * rays * _edge(z - line, 0.006) * np.exp(-0.8 * (z - line)))


class _Cyst(_Scene):
    """One to three echo-free rounds with a thin wall and enhancement behind, moving up and down with breathing."""

    def build(self, a):
        count = int(a.integers(1, 4))
        x = np.linspace(-0.26, 0.26, count) if count > 1 else np.array([0.0])
        self.cysts = [
            (
                cx + a.normal(0, 0.04),
                a.uniform(0.30, 0.62),
                a.uniform(0.07, 0.17 if count == 1 else 0.11),
                a.uniform(0.8, 1.25),
            )
            for cx in x
        ]
        self.breath, self.enhance = a.uniform(0.015, 0.04), a.uniform(0.7, 1.3)

    def echo(self, x, z):
        level = self.tissue(x, z)
        for cx, cz, r, aspect in self.cysts:
            distance = np.hypot(x - cx, (z - cz) * aspect) - r
            level = level * _edge(distance, 0.004) + 0.9 * _ridge(distance, 0.006)
        return level

    def displacement(self, t, x, z):
        return 0.3 * self.breath * self.cycle(t) * np.sin(np.pi * z), self.breath * self.cycle(t) * np.minimum(1, 3 * z)

    def gain(self, t, x, z):
        x, z = x + self.probe_shift(t)[0], z - self.breath * self.cycle(t)
        gain = 1.0
        for cx, cz, r, _ in self.cysts:
            gain = gain * (1 + self.enhance * _edge(0.85 * r - np.abs(x - cx), 0.015) * _edge(z - cz - 0.8 * r, 0.02))
        return gain


class _Lesion(_Scene):
    """A dark solid mass with an irregular outline and a shadow, in layered breast tissue under pressure."""

    def build(self, a):
        self.centre = a.uniform(-0.15, 0.15), a.uniform(0.35, 0.58)
        self.radius, self.flat = a.uniform(0.10, 0.16), a.uniform(0.6, 1.1)
        self.outline, self.spikes = _waves(a, 4, 2, 7), a.uniform(0.12, 0.3)
        self.inner, self.shadow, self.press = a.uniform(0.22, 0.4), a.uniform(0.5, 0.85), a.uniform(0.02, 0.05)
        self.fat = a.uniform(0.14, 0.24)

    def _distance(self, x, z):
        dx, dz = x - self.centre[0], (z - self.centre[1]) / self.flat
        angle = np.arctan2(dz, dx)
        # periodic: a function of the direction's cosine and sine
        return np.hypot(dx, dz) - self.radius * (1 + self.spikes * self.outline(2 * np.cos(angle) + 3 * np.sin(angle)))

    def echo(self, x, z):
        gland = self.tissue(x, z) * (1.3 + 0.6 * self.layers(18 * z + 5 * x))
        border = z - self.fat - 0.02 * self.layers(9 * x)
        level = 0.45 * (1 - _edge(border, 0.01)) + gland * _edge(border, 0.01) + 1.6 * _ridge(border, 0.008)
        level = level + 2.2 * _ridge(z - 0.86 - 0.03 * self.layers(3 * x), 0.010)  # chest wall
        inside = 1 - _edge(self._distance(x, z), 0.012)
        return level * (1 - inside) + self.inner * inside * (1 + 0.5 * self.layers(30 * x + 20 * z))

    def displacement(self, t, x, z):
        press = self.press * (0.5 + 0.5 * self.cycle(t))
        return 0.8 * press * x, -press * z  # compressed towards the probe, wider aside

    def gain(self, t, x, z):
        x = x + self.probe_shift(t)[0]
        behind = _edge(0.8 * self.radius - np.abs(x - self.centre[0]), 0.02) * _edge(
            z - self.centre[1] - 0.5 * self.radius, 0.03
        )
        return 1 - self.shadow * behind


_SCENES = {"vessel": _Vessel, "muscle": _Muscle, "lung": _Lung, "cyst": _Cyst, "lesion": _Lesion}


# ------------------------------------------------------------------------------------------ the demo data set


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
    """uint8 (T, H, W) on a larger canvas, even in both sides, with the static furniture of a scanner's screen."""
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
    import av

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    height, width = (side - side % 2 for side in movie.shape[1:])  # 4:2:0 has no odd sides
    x264 = "libx264" in av.codecs_available
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264" if x264 else "mpeg4",
            rate=Fraction(fps),
            options={"crf": "16", "preset": "ultrafast"} if x264 else {"qscale": "2"},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        for grey in movie:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(grey[:height, :width]), "gray"))
            )
        container.mux(stream.encode(None))
    part.replace(path)
