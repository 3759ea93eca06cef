"""The PyTorch side of the benchmarks: the same network, the same training steps, the same top eigenvalues.

The network is that of `hero_jax.models.resnet` written in PyTorch, and takes the Flax variables.

For `benchmarks.step_cost`: a step of SGD and one of HERO with the penalty "detached", by double backward as the
authors' code has it, eager, on the device of the network, BatchNorm in training mode.

For `benchmarks.curvature`: the k eigenvalues of largest magnitude of the Hessian of the mean cross entropy over the
same images, at the same weights, in float32 on the CPU, BatchNorm in evaluation mode, by PyHessian and
hessian-eigenthings. How it is fair: a peer runs with the cheapest setting of its own parameters whose k pairs all reach
the asked residual. Looking for that setting is neither timed nor counted; the run with it is: an oracle, which its user
does not have. hessian-eigenthings has no way to stop by itself, so it is also run as its user has to, its limit doubled
until its flags say that it converged. Residuals are computed here, by a product that is not the peer's, for each pair
as the peer returns it. A peer that misses the residual at every setting is returned with the residuals it did reach.
Start vectors are the peers' own random ones: counts depend on the seed.

torch, pyhessian and hessian-eigenthings are optional: this module can be imported without them, and `missing` says
which is absent.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

PyTree = Any
# torch may be absent where types are checked: a `torch.nn.Module`, and tensors (images, labels).
Module = Any
Batch = tuple[Any, Any]

PACKAGES = {"torch": "torch", "pyhessian": "pyhessian", "hessian_eigenthings": "hessian-eigenthings"}

# (tol, maxIter) for `pyhessian_top`: its default tolerance, then ten times tighter each time. In float32 a quotient
# that moves by less than 1e-8 of itself does not move at all; after that tol=0 leaves the stop to maxIter alone.
PYHESSIAN_SETTINGS = (*((10.0**-n, 1000) for n in range(3, 9)), (0.0, 400))


class PeerResult(NamedTuple):
    """What a peer found, and at what cost.

    name: the package and its version.
    setting: the parameters it was given.
    eigenvalues: (k,), as it reported them, largest magnitude first.
    residuals: (k,), ||H v - lambda v|| / |lambda| of each pair it returned, v scaled to length 1.
    num_products: Hessian-vector products over all the data, from start to end.
    seconds: wall time of the same run.
    """

    name: str
    setting: str
    eigenvalues: np.ndarray
    residuals: np.ndarray
    num_products: int
    seconds: float


def missing(modules: Sequence[str] = tuple(PACKAGES)) -> str | None:
    """Says in one line which package is absent; None where all of `modules`, keys of `PACKAGES`, can be imported."""
    for module in modules:
        package = PACKAGES[module]
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{package} cannot be imported: {error}"
    return None


# (H, W, I, O) -> (O, I, H, W), (I, O) -> (O, I): the axes of a Flax leaf in the order of PyTorch, by their number.
_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def resnet(variables: PyTree, device: str = "cpu") -> Module:
    """Builds `hero_jax.models.resnet20`, 32 or 56 in PyTorch from its variables, {"params": ..., "batch_stats": ...}.

    The same function of images (N, C, H, W), parameters in the type of the Flax ones; the depth is read off their
    names. The 3x3 convolutions pad by 1 on every side, as the Flax model asks ("SAME" would pad a stride of 2
    unevenly), the 1x1 shortcuts pad nothing, and epsilon is 1e-5. It comes in evaluation mode, BatchNorm with the
    running statistics; after `.train()` with those of the batch, which move the running ones by `momentum` (an
    attribute, 0.1; PyTorch takes the unbiased variance there, Flax the biased one).
    """
    torch: Any = importlib.import_module("torch")
    nn = torch.nn

    def tensors(tree: PyTree) -> dict[str, Any]:
        named = {}
        for path, leaf in jax.tree.leaves_with_path(tree):
            array = np.ascontiguousarray(np.array(leaf).transpose(_AXES[leaf.ndim]))
            named[_name(path)] = torch.from_numpy(array).to(device)
        return named

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.params = nn.ParameterDict(tensors(variables["params"]))
            self.stats = tensors(variables["batch_stats"])
            self.blocks = sum(name.startswith("stage1_") for name in variables["params"])
            self.momentum = 0.1

        def conv(self, name: str, x: Any, stride: int = 1) -> Any:
            kernel = self.params[f"{name}/kernel"]
            return nn.functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

        def norm(self, name: str, x: Any) -> Any:
            stats = self.stats[f"{name}/mean"], self.stats[f"{name}/var"]
            scale, bias = self.params[f"{name}/scale"], self.params[f"{name}/bias"]
            return nn.functional.batch_norm(x, *stats, scale, bias, training=self.training, momentum=self.momentum)

        def forward(self, x: Any) -> Any:
            x = self.norm("bn", self.conv("conv", x)).relu()
            for stage, block in itertools.product((1, 2, 3), range(1, self.blocks + 1)):
                name, stride = f"stage{stage}_block{block}", 2 if stage > 1 and block == 1 else 1
                y = self.norm(f"{name}/bn1", self.conv(f"{name}/conv1", x, stride)).relu()
                y = self.norm(f"{name}/bn2", self.conv(f"{name}/conv2", y))
                if stride == 2:
                    x = self.norm(f"{name}/shortcut_bn", self.conv(f"{name}/shortcut_conv", x, stride))
                x = (x + y).relu()
            return nn.functional.linear(x.mean(dim=(2, 3)), self.params["head/kernel"], self.params["head/bias"])

    return ResNet().eval()


def to_flax(model: Module, tensors: Sequence[Any], like: PyTree) -> PyTree:
    """Tensors in the order of `model.parameters()` as NumPy arrays in the tree and axes of `like`, the Flax params."""
    names = [name.removeprefix("params.") for name, _ in model.named_parameters()]
    named = dict(zip(names, tensors, strict=True))

    def array(path: Any, leaf: Any) -> np.ndarray:
        return named[_name(path)].detach().cpu().numpy().transpose(np.argsort(_AXES[leaf.ndim]))

    return jax.tree.map_with_path(array, like)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def gradient(model: Module, batch: Batch, dtype: str = "float32", *, create_graph: bool = False) -> tuple[Any, ...]:
    """The gradient of the mean cross entropy of a batch; with dtype "bfloat16" under autocast."""
    torch: Any = importlib.import_module("torch")
    images, labels = batch
    # A context for each pass: within one, autocast would reuse the casts of weights that have moved since.
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(images)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph)


def hero_direction(
    model: Module, batch: Batch, dtype: str = "float32", *, rho: float, gamma: float, eps: float = 1e-12
) -> list[Any]:
    """The direction of `hero_jax.hero(rho, gamma, eps=eps)`, penalty "detached", in PyTorch by double backward.

        g* + gamma grad_w* sum_R mean((g* - g)^2) at w* = w + e, e = rho w^2 g / (|| |w| g || + eps), g and e constant

    R are the parameters of two or more axes. The weights are moved in place and back again; the perturbed pass leaves
    the running statistics alone.
    """
    torch: Any = importlib.import_module("torch")
    params, momentum = list(model.parameters()), model.momentum
    grads = gradient(model, batch, dtype)
    with torch.no_grad():
        length = torch.stack([(w * g).norm() for w, g in zip(params, grads, strict=True)]).norm() + eps
        perturbation = [rho / length * w**2 * g for w, g in zip(params, grads, strict=True)]
        for w, e in zip(params, perturbation, strict=True):
            w.add_(e)
    model.momentum = 0.0
    perturbed_grads = gradient(model, batch, dtype, create_graph=True)
    pairs = zip(perturbed_grads, grads, strict=True)
    penalty = sum(((p - g) ** 2).mean() for p, g in pairs if p.ndim >= 2)
    penalty_grads = torch.autograd.grad(penalty, params)
    model.momentum = momentum
    with torch.no_grad():
        for w, e in zip(params, perturbation, strict=True):
            w.sub_(e)
        return [p + gamma * h for p, h in zip(perturbed_grads, penalty_grads, strict=True)]


def training_step(
    model: Module, batch: Batch, direction: Callable[[Module, Batch, str], Sequence[Any]], dtype: str
) -> Callable[[], float]:
    """A step: `direction`, weight decay 5e-4, SGD of rate 1e-3 with momentum 0.9. Called, it returns its seconds."""
    torch: Any = importlib.import_module("torch")
    if batch[0].is_cuda:
        # As XLA does: TF32 in products of float32, and a search for the fastest convolutions.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    params = list(model.train().parameters())
    optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    wait = torch.cuda.synchronize if batch[0].is_cuda else lambda: None

    def step() -> float:
        wait()
        started = time.perf_counter()
        for w, update in zip(params, direction(model, batch, dtype), strict=True):
            w.grad = update
        optimizer.step()
        wait()
        return time.perf_counter() - started

    return step


def split_batches(images: np.ndarray, labels: np.ndarray, batch_size: int, device: str = "cpu") -> list[Batch]:
    """Cuts images (N, H, W, C), normalised floats, and integer labels (N,) into PyTorch batches; keeps the last one."""
    torch: Any = importlib.import_module("torch")
    x = torch.from_numpy(np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2)))
    y = torch.from_numpy(np.array(labels, np.int64))
    x, y = x.to(device), y.to(device)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def hvp(model: Module, batches: Sequence[Batch], vector: Any) -> Any:
    """Multiplies the Hessian of the mean cross entropy over all images by a flat vector, by double backward."""
    torch: Any = importlib.import_module("torch")
    params = list(model.parameters())
    parts = torch.split(vector, [p.numel() for p in params])
    direction = [part.view_as(p) for part, p in zip(parts, params, strict=True)]
    total = torch.zeros_like(vector)
    for images, labels in batches:
        loss = torch.nn.functional.cross_entropy(model(images), labels, reduction="sum")
        grads = torch.autograd.grad(loss, params, create_graph=True)
        product = torch.autograd.grad(grads, params, grad_outputs=direction)
        total += torch.cat([p.reshape(-1) for p in product])
    return total / sum(len(labels) for _, labels in batches)


def pyhessian_top(
    model: Module,
    batches: Sequence[Batch],
    k: int,
    rtol: float = 1e-3,
    *,
    settings: Sequence[tuple[float, int]] = PYHESSIAN_SETTINGS,
    seed: int = 0,
) -> PeerResult:
    """Runs PyHessian: `hessian(...).eigenvalues(maxIter, tol, top_n=k)`.

    Power iteration, one pair after the other, each iterate made orthogonal to the vectors found before. It stops when
    the Rayleigh quotient moves by less than `tol` of itself in a step, or silently after `maxIter`; it has no residual.
    Batches weigh as much as they have images. Several batches are its `dataloader` mode, whose product is a forward, a
    backward and a second backward through each; one batch is its `data` mode, which keeps the graph of the gradient and
    repeats the second backward only: cheaper, where memory holds that graph.

    Chosen: the first of `settings`, (tol, maxIter), that gives all k residuals; cheaper ones belong first. The search
    costs several times the run that is reported.
    """
    torch: Any = importlib.import_module("torch")
    pyhessian: Any = importlib.import_module("pyhessian")
    data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}

    def run(tol: float, max_iter: int, top_n: int) -> PeerResult:
        def solve() -> tuple[Any, Any]:
            torch.manual_seed(seed)  # PyHessian draws its start vectors from the global generator
            operator = pyhessian.hessian(model, torch.nn.CrossEntropyLoss(), **data, cuda=False)
            return operator.eigenvalues(maxIter=max_iter, tol=tol, top_n=top_n)

        result = _measure("pyhessian", f"tol={tol:g}, maxIter={max_iter}, by an oracle", model, batches, solve)
        model.zero_grad()  # PyHessian leaves gradients that hold their graph
        return result

    best = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
        for tol, max_iter in settings:
            # The run for one pair is how the run for k begins: where it misses the residual, the rest is spared.
            if k > 1 and run(tol, max_iter, 1).residuals[0] > rtol:
                continue
            result = run(tol, max_iter, k)
            if best is None or result.residuals.max() < best.residuals.max():
                best = result
            if best.residuals.max() <= rtol:
                return best
        return best or run(*settings[-1], k)


def eigenthings_top(
    model: Module, batches: Sequence[Batch], k: int, rtol: float = 1e-3, *, max_iter: int = 200, seed: int = 0
) -> list[PeerResult]:
    """Runs hessian-eigenthings twice: `lanczos(HessianOperator(...), k, max_iter, tol, reorthogonalize, which="LM")`.

    Lanczos from one random vector, without restarts: `max_iter` products, however soon the pairs converge; `tol` only
    says which are then called converged, by the Ritz estimate of their residual. Much cheaper than the deflated power
    iteration of the same package. `HessianOperator` gives every batch the same weight, so the loss that it gets here
    carries the size of the batch; its product is a forward, a backward and a second backward through each.

    Two runs: `max_iter` 2k (its default), then doubled until all flags say converged, everything spent counted; and
    with the smallest `max_iter` that gives all k residuals, at most that of the argument, found by one Lanczos run made
    longer step by step, its earlier products remembered. Both with full reorthogonalization (its default up to 50
    steps; without it copies of an eigenvalue appear) and exact products (its default: by finite differences of float32
    gradients no residual was below 0.1).
    """
    torch: Any = importlib.import_module("torch")
    eigenthings: Any = importlib.import_module("hessian_eigenthings")
    mean_size = sum(len(labels) for _, labels in batches) / len(batches)

    def loss_fn(model: Module, batch: Batch) -> Any:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum") / mean_size

    operator = eigenthings.HessianOperator(model, batches, loss_fn)
    known: dict[bytes, Any] = {}

    def remembered(vector: Any) -> Any:
        key = vector.numpy().tobytes()
        if key not in known:
            known[key] = operator.matvec(vector)
        return known[key]

    search = eigenthings.LambdaOperator(remembered, size=operator.size, dtype=operator.dtype)

    def lanczos(operator: Any, steps: int) -> Any:
        return eigenthings.lanczos(operator, k=k, max_iter=steps, tol=rtol, reorthogonalize=True, which="LM", seed=seed)

    def doubled() -> tuple[Any, Any]:
        steps = 2 * k
        while not (found := lanczos(operator, steps)).converged.all() and 2 * steps <= max_iter:
            steps *= 2
        return found.eigenvalues.tolist(), found.eigenvectors

    def once() -> tuple[Any, Any]:
        found = lanczos(operator, steps)
        return found.eigenvalues.tolist(), found.eigenvectors

    as_user = _measure("hessian_eigenthings", "max_iter doubled until it converges", model, batches, doubled)
    steps = k
    while True:
        while steps < max_iter and not lanczos(search, steps).converged.all():
            steps += 1
        oracle = _measure("hessian_eigenthings", f"max_iter={steps}, by an oracle", model, batches, once)
        if oracle.residuals.max() <= rtol or steps >= max_iter:
            return [as_user, oracle]
        steps += 1


def _measure(
    module: str, setting: str, model: Module, batches: Sequence[Batch], solve: Callable[[], tuple[Any, Any]]
) -> PeerResult:
    """Times `solve() -> (eigenvalues, eigenvectors)`, counts its products, then computes the residuals."""
    torch: Any = importlib.import_module("torch")
    with _count_products() as count:
        started = time.perf_counter()
        values, vectors = solve()
        seconds = time.perf_counter() - started
    residuals = []
    for value, vector in zip(values, vectors, strict=True):
        flat = torch.cat([part.reshape(-1) for part in vector]) if isinstance(vector, list) else vector
        flat = flat / flat.norm()
        residuals.append(float((hvp(model, batches, flat) - value * flat).norm()) / abs(value))
    order = np.argsort(-np.abs(values))
    name = f"{PACKAGES[module]} {importlib.metadata.version(PACKAGES[module])}"
    products = count[0] // len(batches)
    return PeerResult(name, setting, np.asarray(values)[order], np.asarray(residuals)[order], products, seconds)


@contextlib.contextmanager
def _count_products() -> Iterator[list[int]]:
    """Counts, in the list's one entry, the calls of `torch.autograd.grad` that multiply by a vector."""
    torch: Any = importlib.import_module("torch")
    grad, count = torch.autograd.grad, [0]

    def counted(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
        count[0] += grad_outputs is not None
        return grad(outputs, inputs, grad_outputs, **options)

    with mock.patch.object(torch.autograd, "grad", counted):
        yield count


def gradient_and_product_seconds(model: Module, batch: Batch, repeats: int = 15) -> tuple[float, float]:
    """Median seconds of one gradient and of one `hvp` on a batch, taken in turn, after one of each untimed."""
    torch: Any = importlib.import_module("torch")
    params = list(model.parameters())
    vector = torch.ones(sum(p.numel() for p in params))
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.autograd.grad(torch.nn.functional.cross_entropy(model(batch[0]), batch[1]), params)
        times[0].append(time.perf_counter() - started)
        started = time.perf_counter()
        hvp(model, [batch], vector)
        times[1].append(time.perf_counter() - started)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])
