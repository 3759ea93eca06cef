"""Eight simulated CPU devices and quick compilation, set before jax is imported, and float64 on request."""

import gc
import importlib
import importlib.metadata
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

# Much of the tests' time is XLA's: programs that run once are not worth its optimizations. The emitters that the last
# flag leaves out are tested with newer versions, which always have them.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_opt_preset=FAST_COMPILE",
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test has compiled the others take, in this process, in pytest's other one and in those that tests start. It
# is gone at the end, unless JAX_COMPILATION_CACHE_DIR says where to keep it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="hero_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from jax._src.interpreters import mlir
from jax.experimental.compilation_cache import compilation_cache

# jax makes an MLIR context for each program, which takes longer than lowering a small one: a thread keeps its own here.
# One that is lowered while another is has a new one.
of_thread = threading.local()


def mlir_context(make=mlir.make_ir_context):
    if not hasattr(of_thread, "context"):
        of_thread.context = make()
    return make() if mlir.ir.Context.current is of_thread.context else of_thread.context


mlir.make_ir_context = mlir_context

# Tracing makes many objects and few cycles: to look for these as often as Python does takes a twentieth of the time.
gc.set_threshold(50_000, 10, 20)

# Of the 65,530 that a process may have.
MOST_MEMORY_MAPS = 40_000


def pytest_addoption(parser):
    parser.addoption("--share", type=float, default=1.0, help="of the cases of each test, run this share, one at least")
    group = parser.getgroup("attacks", "tests/test_attacks.py")
    group.addoption("--attacks", type=int, default=100, help="files mutated; a third as many bits and calls, 1 % kills")
    group.addoption("--attack-seed", type=int, default=0, help="which; 0 is what CI makes")


def pytest_collection_modifyitems(config, items):
    """With `--share`, of the cases of each test some that are spread evenly."""
    share = config.getoption("--share")
    cases = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = set()
    for of_test in cases.values():
        count = max(1, round(share * len(of_test)))
        kept.update(of_test[int((i + 0.5) * len(of_test) / count)] for i in range(count))
    left_out = [item for item in items if item not in kept]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="module")
def attacks(request):
    return request.config.getoption("--attacks")


@pytest.fixture(scope="module")
def attack_seed(request):
    return request.config.getoption("--attack-seed")


@pytest.fixture
def x64():
    """float64 for one test: exactness is tested there."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs():
    """Drops what was compiled where it has taken many memory maps: a process that has all of them crashes."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > MOST_MEMORY_MAPS:
        jax.clear_caches()


@pytest.fixture
def called(monkeypatch, capsys):
    """Runs a command here, as `python -m NAME ARGUMENTS` does in another process; gives what `subprocess.run` does.

    What the command changes in its process is undone.
    """
    from experiments import cli

    def run(name, *arguments):
        logger = logging.getLogger("experiments")
        before, handlers = logger.level, [*logger.handlers]
        signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        cache = jax.config.jax_compilation_cache_dir
        monkeypatch.setattr(sys, "argv", [f"{name.split('.')[-1]}.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.run(importlib.import_module(name).main)
        except SystemExit as ended:
            code = ended.code
        finally:
            logger.level, logger.handlers = before, handlers
            for number, handler in signals.items():
                signal.signal(number, handler)
            jax.config.update("jax_compilation_cache_dir", cache)
            compilation_cache.reset_cache()
        return subprocess.CompletedProcess([name, *arguments], code, *capsys.readouterr())

    return run
