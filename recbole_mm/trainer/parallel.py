"""How each model shares a batch among several processes (see `recbole_mm.distributed`)."""

import logging

from recbole_mm.errors import UserError

MODES = ("rows", "own", "whole")
#: models of RecBole whose loss of a batch is the mean of the losses of its rows (or a norm over them, which is treated as such): two epochs
#: in two processes give the losses of one process to 1e-6 (benchmarks/distribution.py; benchmarks/results/distribution.md lists all models tried)
ROWS = frozenset({
    "BPR", "Caser", "CORE", "DeepFM", "DGCF", "DMF", "FFM", "FISM", "FM", "FOSSIL", "FPMC", "GCMC", "GCSAN", "GRU4Rec", "HGN",
    "HRM", "LightGCN", "LightSANs", "LR", "NARM", "NeuMF", "NextItNet", "NGCF", "NNCF", "NPE", "PNN", "RepeatNet", "SASRec",
    "SimpleX", "SINE", "SpectralCF", "SRGNN", "STAMP", "TransRec", "WideDeep", "xDeepFM",
})  # fmt: skip
#: trainers of RecBole with a loop of their own, in which nothing could be exchanged
ONE_PROCESS = ("NCLTrainer", "DecisionTreeTrainer")


def mode_of(model) -> str:
    """How processes share the batches of `model`.

    ``rows``: each gets its rows; what the class says in ``parallel``, or RecBole's models in `ROWS`. ``own``: the model takes its share
    itself. ``whole``: each computes the whole batch, which is right for any model and no faster than one process.
    """
    kind = type(model)
    mode = getattr(kind, "parallel", None)
    if mode is None:
        mode = "rows" if kind.__module__.startswith("recbole.") and kind.__name__ in ROWS else "whole"
        if mode == "whole":
            logging.getLogger().warning(
                f"{kind.__name__}: the loss of a batch is not known to be the mean over its rows, so every process computes whole batches. The "
                "result is that of one process, in about the same time; the evaluation is shared."
            )
    if mode not in MODES:
        raise UserError(f"{kind.__name__}.parallel: expected one of {', '.join(MODES)}, got {mode!r}.")
    return mode


def check_trainer(trainer_class: type) -> None:
    """Refuse trainers whose loop is not ours.

    Raises:
        UserError: for RecBole's boosted trees and NCL.
    """
    for kind in trainer_class.__mro__:
        if kind.__name__ in ONE_PROCESS:
            raise UserError(
                f"{trainer_class.__name__}, RecBole's trainer of this model, has a loop of its own and runs in one process. Leave --nproc at 1."
            )
