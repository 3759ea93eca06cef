"""Spectra of a symmetric operator on pytrees, with an error beside every number.

power      power_iteration: the dominant eigenvalue
krylov     top_eigenpairs, lanczos: several eigenpairs
estimates  trace, diagonal, layer_traces, frobenius_norm, moments: averages over random probes
density    spectral_density: the whole spectrum as a density, with a band
"""

from hero_jax.spectrum.density import SpectralDensity, spectral_density
from hero_jax.spectrum.estimates import Estimate, Moments, diagonal, frobenius_norm, layer_traces, moments, trace
from hero_jax.spectrum.krylov import Eigenpairs, Lanczos, lanczos, top_eigenpairs
from hero_jax.spectrum.power import Eigenpair, power_iteration

__all__ = [
    "Eigenpair",
    "Eigenpairs",
    "Estimate",
    "Lanczos",
    "Moments",
    "SpectralDensity",
    "diagonal",
    "frobenius_norm",
    "lanczos",
    "layer_traces",
    "moments",
    "power_iteration",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
