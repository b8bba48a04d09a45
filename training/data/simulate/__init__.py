"""Simulated B-mode clips: point scatterers, a depth-dependent point spread function, envelope, log compression.

The classic linear model (Meunier and Bertrand 1995; Gao et al. 2009, COLE): each scatterer adds a phase-carrying
sample to a complex baseband image in acquisition coordinates (depth, beam), which is convolved with an axial pulse
and a lateral beam profile that widens away from the focus; the envelope is log compressed and scan converted.
Speckle is therefore fully developed and moves with the tissue. All kinds share the same ranges of scatterer density,
pulse, beam, gain and noise, so that they differ in anatomy and motion, not in texture.

Coordinates: z is depth (0 at the probe, 1 at the bottom), x is lateral, both in units of the imaging depth.
"""

from training.data.simulate.demo import add_interface, write_demo, write_video
from training.data.simulate.scenes import KINDS, simulate_clip

__all__ = ["KINDS", "add_interface", "simulate_clip", "write_demo", "write_video"]
