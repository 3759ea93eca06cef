"""What a run takes where its configuration leaves it open, by data set, model and method, each with its source.

An entry is looked for with the data set and model, then with the data set, then among those of the method everywhere.
What nobody published for a network here is said to be a starting point: `experiments.search` finds better.
"""

from __future__ import annotations

from typing import Any

# Each penalty is of another size: "eigenvalue" is an eigenvalue, not a mean square. Starting points.
PENALTIES: dict[str, dict[str, Any]] = {"eigenvalue": {"gamma": 0.1}}

# The usual recipe for residual networks on images of 32 x 32 and the authors': SGD, momentum 0.9, cosine, 200 epochs.
_USUAL: dict[str, Any] = {
    "model": "resnet20",
    "epochs": 200,
    "batch_size": 128,
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
}
# Wide residual networks: Foret et al., Sharpness-aware minimization, ICLR 2021, appendix (batch 256, 200 epochs).
# VGG without shortcuts: half the learning rate, as in its usual re-implementations for CIFAR. The small transformer is
# trained by SGD here as everything else is; its learning rate is a starting point.
_MODELS: dict[str, dict[str, Any]] = {
    "wide_resnet": {"batch_size": 256},
    "vgg19_bn": {"learning_rate": 0.05},
    "vit_tiny": {"learning_rate": 0.03, "weight_decay": 1e-4},
}


def _methods(*, sam: float, asam: float, **others: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of methods where `sam` and `asam` are their rho.

    rho of SAM: Foret et al., ICLR 2021, by data set. Of ASAM: Kwon et al., ICML 2021, section 5 (0.5 for CIFAR-10, 1.0
    for CIFAR-100 and ImageNet). HERO takes ASAM's, so that the two differ by the penalty alone, and the authors' gamma.
    rho of MSAM: the default of its authors' code (Becker et al., 2024). sigma of NSO: Zhang et al., 2023 (arXiv
    2306.08553), where it is 0.008 to 0.012. The gamma of GRAD L1, the bits of the noise and the decay of EMA are
    starting points.
    """
    return {
        "noise": {"noise_bits": 3},
        "ema": {"ema_decay": 0.999},
        "nso": {"sigma": 0.01},
        "msam": {"rho": 0.3},
        "sam": {"rho": sam},
        "asam": {"rho": asam},
        "grad_l1": {"gamma": 1e-3},
        "hero": {"rho": asam, "gamma": 5.0},
    } | others


DATASETS: dict[str, dict[str, Any]] = {
    # rho and gamma by accuracy on 360 images held out of train (results/digits-search.md), never on the test set.
    "digits": {
        **_USUAL | {"model": "mlp", "epochs": 60, "batch_size": 64},
        "methods": _methods(
            sam=0.1, asam=1.0, ema={"ema_decay": 0.99}, grad_l1={"gamma": 0.003}, hero={"rho": 1.0, "gamma": 100.0}
        ),
    },
    "cifar10": {**_USUAL, "models": _MODELS, "methods": _methods(sam=0.05, asam=0.5)},
    "cifar100": {**_USUAL, "models": _MODELS, "methods": _methods(sam=0.1, asam=1.0)},
    "fashion_mnist": {**_USUAL, "epochs": 100, "models": _MODELS, "methods": _methods(sam=0.05, asam=0.5)},
    # Ten classes of ImageNet; a starting point, long enough for 9,469 images.
    "imagenette": {
        **_USUAL | {"model": "resnet18", "epochs": 80, "learning_rate": 0.05},
        "methods": _methods(sam=0.05, asam=1.0),
    },
    # He et al., CVPR 2016, and Goyal et al., 2017: batch 256, learning rate 0.1, weight decay 1e-4, 90 epochs.
    "imagenet2012": {
        **_USUAL | {"model": "resnet50", "epochs": 90, "batch_size": 256, "weight_decay": 1e-4},
        "methods": _methods(sam=0.05, asam=1.0, noise={"noise_bits": 4}, ema={"ema_decay": 0.9999}),
    },
}


def budget(dataset: str, model: str | None = None) -> dict[str, Any]:
    """The model, and epochs, batch size, learning rate and weight decay for it; None: the model of the data set."""
    preset = {name: DATASETS[dataset][name] for name in _USUAL} | ({"model": model} if model else {})
    return preset | DATASETS[dataset].get("models", {}).get(preset["model"], {})


def settings(dataset: str, method: str, penalty: str | None = None) -> dict[str, Any]:
    """The settings of a method on a data set, with a penalty (None: that of the method)."""
    found = DATASETS[dataset]["methods"].get(method, {})
    changed = PENALTIES.get(penalty or "", {})
    return {name: changed.get(name, value) for name, value in found.items()}
