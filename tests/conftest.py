"""Eight simulated CPU devices, set before jax is imported, and float64 on request."""

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
