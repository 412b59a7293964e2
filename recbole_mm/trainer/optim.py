"""Optimizers by name, in the fused form where PyTorch has one.

A dense Adam step over the embedding tables of tiktok (16k x 64) takes 0.7 ms fused, 2.1 ms as foreach and 4.2 ms as PyTorch's default on one CPU core
(benchmarks/results/speed.md); with tables this size the default is a third of a BPR step.
"""

from collections.abc import Iterable

from torch import Tensor, optim
from torch.autograd.graph import increment_version

from recbole_mm.errors import UserError, nearest

#: learner -> (class, whether PyTorch has a fused form, whether it takes weight_decay)
LEARNERS = {
    "adam": (optim.Adam, True, True),
    "adamw": (optim.AdamW, True, True),
    "sgd": (optim.SGD, True, True),
    "adagrad": (optim.Adagrad, True, True),
    "rmsprop": (optim.RMSprop, False, True),
    "sparse_adam": (optim.SparseAdam, False, False),
}


def _fusible(group: dict) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"])


def _count_versions(optimizer: optim.Optimizer, *_) -> None:
    """Fused steps change parameters without counting up their versions, by which LATTICE sees that its item graph is out of date."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                increment_version(parameter)


def build_optimizer(
    learner: str, parameters: Iterable[Tensor] | Iterable[dict], learning_rate: float, weight_decay: float = 0.0
) -> optim.Optimizer:
    """The optimizer that ``learner`` names.

    Args:
        learner: one of `LEARNERS`, in any case.
        parameters: parameters, or groups ``{"params": [...], "lr": ..., "weight_decay": ...}`` whose own values win over the two below.
        learning_rate: for groups without ``lr``.
        weight_decay: for groups without ``weight_decay``.

    Raises:
        UserError: `learner` is unknown (RecBole would train with Adam and say so in the log), or it takes no weight decay.
    """
    name = str(learner).lower()
    if name not in LEARNERS:
        raise UserError(f"learner: expected one of {', '.join(LEARNERS)}, got {learner!r}.{nearest(name, LEARNERS)}")
    kind, has_fused, decays = LEARNERS[name]
    groups = [dict(p) if isinstance(p, dict) else p for p in parameters]
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    settings = {"lr": learning_rate}
    if decays:
        settings["weight_decay"] = weight_decay or 0.0
    elif weight_decay or any(group.get("weight_decay") for group in groups):
        raise UserError(f"learner {name} takes no weight_decay, got {weight_decay}. Set weight_decay: 0 or choose adam.")
    if has_fused and all(map(_fusible, groups)):
        try:
            optimizer = kind(groups, fused=True, **settings)
        except RuntimeError:  # an older PyTorch has no fused form for this device; the same numbers, slower
            pass
        else:
            optimizer.register_step_post_hook(_count_versions)
            return optimizer
    return kind(groups, **settings)
