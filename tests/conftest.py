"""Eight simulated CPU devices, set before jax is imported, float64 on request, and an end to what is compiled."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture
def x64():
    """float64 for one test: exactness is tested there."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs():
    """Drops what a module compiled: each program takes memory maps, and a process that has 65,530 of them crashes."""
    yield
    jax.clear_caches()
