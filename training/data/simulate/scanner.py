"""The simulated scanner: probe, acquisition of the scatterers' echoes in beams, scan conversion to an image."""

import numpy as np

WAVENUMBER = 2 * np.pi * 120  # of the two-way phase: 120 wavelengths a unit of depth


def make_probe(rng: np.random.Generator, size: int) -> dict:
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


def to_beams(x, z, probe):
    """Scene coordinates -> (depth along the beam in 0..1, position over the beams in -1..1)."""
    if not probe["sector"]:
        return z, x / probe["half"]
    z = z + probe["radius"]
    return np.hypot(x, z) - probe["radius"], np.arctan2(x, z) / probe["angle"]


def from_beams(depth, u, probe):
    if not probe["sector"]:
        return u * probe["half"], depth
    r = depth + probe["radius"]
    return r * np.sin(u * probe["angle"]), r * np.cos(u * probe["angle"]) - probe["radius"]


def acquire(scene, probe: dict, frames: int, rng: np.random.Generator) -> np.ndarray:
    """float32 (frames, rows, beams): the log compressed envelope in 0..1, in acquisition coordinates."""
    rows, beams = probe["rows"], probe["beams"]
    half = 0.75 if probe["sector"] else probe["half"] + 0.06
    count = round(1.0 * rows * beams * (half / 0.5))  # about ten scatterers in a resolution cell
    x, z = rng.uniform(-half, half, count), rng.uniform(-0.03, 1.05, count)
    strength = rng.choice((-1.0, 1.0), count)

    depth = (np.arange(rows) + 0.5) / rows
    u = (np.arange(beams) + 0.5) / beams * 2 - 1
    grid_x, grid_z = from_beams(depth[:, None], u[None, :], probe)

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
        r, v = to_beams(moved_x, moved_z, probe)
        row, column = r * rows - 0.5, (v + 1) / 2 * beams - 0.5
        i, j = np.rint(row).astype(np.intp), np.floor(column).astype(np.intp)
        inside = (i >= 0) & (i < rows) & (j >= 0) & (j < beams - 1)
        i, j, part = i[inside], j[inside], column[inside] - j[inside]
        phasor = (strength * echo)[inside] * np.exp(-1j * WAVENUMBER * r[inside])
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


def scan_convert(polar: np.ndarray, probe: dict, size: int) -> np.ndarray:
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
    depth, u = to_beams(x[None, :], z[:, None], probe)
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
