"""What lies under the probe: scatterers of five kinds of anatomy and how they move."""

import numpy as np

from training.data.simulate.scanner import acquire, make_probe, scan_convert


def edge(distance, width=0.012):
    """0 to 1 across a boundary: smooth step of a signed distance (negative is inside)."""
    return 1 / (1 + np.exp(-np.clip(distance / width, -40, 40)))


def ridge(distance, width):
    return np.exp(-0.5 * (distance / width) ** 2)


def waves(rng, count, low, high):
    """A smooth random function of one variable, about 1 in size: irregular outlines and layers."""
    frequency, phase = rng.uniform(low, high, count), rng.uniform(0, 2 * np.pi, count)
    weight = rng.uniform(0.5, 1, count) / np.sqrt(count)
    return lambda s: (weight * np.sin(np.asarray(s)[..., None] * frequency + phase)).sum(-1)


class Scene:
    """Material coordinates carry echogenicity; `displacement` moves them. Subclasses describe one anatomy."""

    def __init__(self, anatomy, rng, frames):
        self.a = anatomy
        self.phase = rng.uniform(0, 2 * np.pi)
        self.rate = rng.uniform(0.20, 0.34)  # radians a frame
        self.offset = rng.normal(0, 0.05), rng.normal(0, 0.015)  # of the probe, in this clip
        self.sway = rng.normal(0, 0.012), rng.uniform(0.03, 0.10), rng.uniform(0, 2 * np.pi)  # a hand is never still
        self.layers = waves(anatomy, 4, 3, 9)
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
        return level * (1 + 1.2 * ridge(z - self.skin, 0.010))

    def gain(self, t, x, z):
        """Shadow and enhancement, in front of the probe."""
        return 1.0

    def displacement(self, t, x, z):
        return 0.0, 0.004 * self.cycle(t) * z


class Vessel(Scene):
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
        outside = edge(r - self.radius, 0.006)
        wall = self.wall * (ridge(r - self.radius - 0.006, 0.007) + 0.7 * ridge(r - self.radius - 0.035, 0.007))
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
            dx = np.where(r < 0.9 * self.radius, wrap(self.flow * t * (1 - (r / self.radius) ** 2), x), 0)
            return dx, push * np.sign(z - self.centre[1] - self.tilt * x)
        safe = np.maximum(r, 1e-3)
        swirl = np.where(r < 0.9 * self.radius, 0.5 * self.flow * np.sin(2.1 * t), 0)
        return push * (x - self.centre[0]) / safe + swirl, push * (z - self.centre[1]) / safe + swirl


def wrap(shift, x, half=0.8):
    """Flow that leaves on one side enters on the other."""
    return (x + shift + half) % (2 * half) - half - x


class Muscle(Scene):
    """Two muscles between bright aponeuroses: oblique fascicles that steepen and shorten when it contracts."""

    def build(self, a):
        self.top, self.middle = a.uniform(0.12, 0.20), a.uniform(0.45, 0.60)
        self.bottom = self.middle + a.uniform(0.25, 0.33)
        self.pennation, self.spacing = a.uniform(0.25, 0.55), a.uniform(0.07, 0.10)
        self.contrast, self.strength, self.slope = a.uniform(1.5, 2.2), a.uniform(0.02, 0.05), a.uniform(-0.12, 0.12)
        self.wobble = waves(a, 5, 6, 30)

    def echo(self, x, z):
        z = z - self.slope * x
        upper, lower = z - self.pennation * x, z + 0.6 * self.pennation * x
        lines = np.where(z < self.middle, upper, lower) / self.spacing + 0.6 * self.wobble(x + 2 * z)
        fascicles = np.maximum(0, np.cos(2 * np.pi * lines)) ** 4
        inside = edge(z - self.top, 0.008)
        body = 0.22 + self.contrast * fascicles
        fat = 0.8 * self.tissue(x, z)
        deep = edge(z - self.bottom, 0.01)
        level = fat * (1 - inside) + body * inside * (1 - deep) + 0.12 * deep
        for where, bright in ((self.top, 3.0), (self.middle, 3.6), (self.bottom, 3.6)):
            level = level + bright * ridge(z - where - 0.006 * self.wobble(3 * x), 0.008)
        return level

    def displacement(self, t, x, z):
        pull = self.strength * (1 + self.cycle(t))
        across = (z - self.middle) / 0.4
        return pull * np.exp(-(across**2)) * np.where(z < self.middle, 1, 0.6), 0.25 * pull * np.sin(np.pi * z) * (
            1 + x
        )


class Lung(Scene):
    """Chest wall, two ribs with shadows, the sliding pleural line, A-lines and, in some subjects, B-lines."""

    def build(self, a):
        self.pleura, self.slide = a.uniform(0.20, 0.32), a.uniform(0.02, 0.05)
        self.ribs = a.uniform(-0.62, -0.45), a.uniform(0.45, 0.62)
        self.rib_width, self.curve = a.uniform(0.07, 0.11), a.uniform(0.0, 0.25)
        self.a_lines = a.uniform(0.5, 1.0)
        self.b_lines = a.uniform(-0.35, 0.35, a.integers(0, 4))
        self.b_width, self.rough = a.uniform(0.012, 0.03), waves(a, 6, 20, 80)

    def _line(self, x):
        return self.pleura + self.curve * x**2

    def echo(self, x, z):
        line = self._line(x)
        wall = self.tissue(x, z) * (0.7 + 0.35 * self.layers(40 * z + 2 * x))
        level = wall * (1 - edge(z - line, 0.004)) + 0.16 * edge(z - line, 0.004)
        level = level + 5.0 * ridge(z - line - 0.002 * self.rough(x), 0.006)
        for order, loss in ((2, 0.55), (3, 0.25)):
            level = level + 4.0 * self.a_lines * loss * ridge(z - order * line, 0.007)
        for rib in self.ribs:
            bone = self.pleura - 0.06 + 2.0 * (x - rib) ** 2
            level = level + 5.0 * ridge(z - bone, 0.008) * (np.abs(x - rib) < self.rib_width)
        return level

    def displacement(self, t, x, z):
        below = edge(z - self._line(x) + 0.01, 0.006)  # the lung slides under a still chest wall
        return self.slide * self.cycle(t) * below, 0.006 * self.cycle(t)

    def gain(self, t, x, z):
        x = x + self.probe_shift(t)[0]
        gain = 1.0
        for rib in self.ribs:
            shadow = edge(self.rib_width - np.abs(x - rib), 0.01) * edge(z - self.pleura + 0.04, 0.01)
            gain = gain * (1 - 0.93 * shadow)
        line = self._line(x)
        rays = sum((ridge(x - ray - self.slide * self.cycle(t), self.b_width * (0.6 + z)) for ray in self.b_lines), 0.0)
        return gain * (1 + 5.0 * rays * edge(z - line, 0.006) * np.exp(-0.8 * (z - line)))


class Cyst(Scene):
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
            level = level * edge(distance, 0.004) + 0.9 * ridge(distance, 0.006)
        return level

    def displacement(self, t, x, z):
        return 0.3 * self.breath * self.cycle(t) * np.sin(np.pi * z), self.breath * self.cycle(t) * np.minimum(1, 3 * z)

    def gain(self, t, x, z):
        x, z = x + self.probe_shift(t)[0], z - self.breath * self.cycle(t)
        gain = 1.0
        for cx, cz, r, _ in self.cysts:
            gain = gain * (1 + self.enhance * edge(0.85 * r - np.abs(x - cx), 0.015) * edge(z - cz - 0.8 * r, 0.02))
        return gain


class Lesion(Scene):
    """A dark solid mass with an irregular outline and a shadow, in layered breast tissue under pressure."""

    def build(self, a):
        self.centre = a.uniform(-0.15, 0.15), a.uniform(0.35, 0.58)
        self.radius, self.flat = a.uniform(0.10, 0.16), a.uniform(0.6, 1.1)
        self.outline, self.spikes = waves(a, 4, 2, 7), a.uniform(0.12, 0.3)
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
        level = 0.45 * (1 - edge(border, 0.01)) + gland * edge(border, 0.01) + 1.6 * ridge(border, 0.008)
        level = level + 2.2 * ridge(z - 0.86 - 0.03 * self.layers(3 * x), 0.010)  # chest wall
        inside = 1 - edge(self._distance(x, z), 0.012)
        return level * (1 - inside) + self.inner * inside * (1 + 0.5 * self.layers(30 * x + 20 * z))

    def displacement(self, t, x, z):
        press = self.press * (0.5 + 0.5 * self.cycle(t))
        return 0.8 * press * x, -press * z  # compressed towards the probe, wider aside

    def gain(self, t, x, z):
        x = x + self.probe_shift(t)[0]
        behind = edge(0.8 * self.radius - np.abs(x - self.centre[0]), 0.02) * edge(
            z - self.centre[1] - 0.5 * self.radius, 0.03
        )
        return 1 - self.shadow * behind


SCENES = {"vessel": Vessel, "muscle": Muscle, "lung": Lung, "cyst": Cyst, "lesion": Lesion}
KINDS = tuple(SCENES)


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

    probe = make_probe(scanner, size)
    scene = SCENES[kind](anatomy, rng, frames)
    return scan_convert(acquire(scene, probe, frames, rng), probe, size)
