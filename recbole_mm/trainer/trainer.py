"""RecBole's Trainer with what a long run needs: resume, schedules, accumulation, autocast, fast evaluation, a record of every epoch."""

import math
import time
from collections.abc import Iterable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import recbole.trainer.trainer as recbole_trainer
import torch
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer as RecBoleTrainer
from recbole.utils import get_trainer as recbole_get_trainer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from recbole_mm import checkpoint, distributed
from recbole_mm.data.loader import TrainLoader, loader_state, restore_loader_state
from recbole_mm.data.sampler import build_sampler
from recbole_mm.errors import UserError
from recbole_mm.evaluator.full_sort import EvaluationResult, evaluate
from recbole_mm.memory import keep_freed_memory
from recbole_mm.model.bank import FeatureBank
from recbole_mm.trainer.optim import build_optimizer
from recbole_mm.trainer.parallel import check_trainer, mode_of

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CHECK_EVERY = 50  # batches between looks at the loss: each look waits for the GPU


class _NoCurves:
    """Stands in for tensorboard's writer when curves are off."""

    def add_scalar(self, *args, **kwargs): ...

    def add_hparams(self, *args, **kwargs): ...


def learning_rate_factor(config, epoch: int) -> float:
    """What the base learning rate is multiplied by in `epoch` (first: 0), for ``lr_schedule`` and ``warmup_epochs``.

    step: ``lr_gamma ** (epoch // lr_step_epochs)``; exponential: ``lr_gamma ** (epoch / lr_step_epochs)``; cosine and linear: down to 0
    at ``epochs``. It depends on the epoch alone, so a resumed run needs no state of it.
    """
    warmup = config["warmup_epochs"] or 0
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    schedule, step = config["lr_schedule"], max(config["lr_step_epochs"] or 1, 1)
    if schedule == "step":
        return config["lr_gamma"] ** (epoch // step)
    if schedule == "exponential":
        return config["lr_gamma"] ** (epoch / step)
    progress = (epoch - warmup) / max(config["epochs"] - warmup, 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - progress
    return 1.0


class Trainer(RecBoleTrainer):
    """RecBole's training loop, extended at its seams.

    Reads beyond RecBole: ``gradient_accumulation``, ``amp``, ``lr_schedule`` and its numbers, ``stop_on``, ``save_last``, ``checkpoint_seconds``, ``tensorboard``,
    ``eval_mask``. A model may offer ``parameter_groups()``, ``before_epoch(epoch)``, ``before_batch(interaction)``, ``after_backward()``,
    ``after_step()`` and ``before_evaluation()``; each is called where its name says.

    Files, in ``config["run_dir"]`` (``checkpoint_dir`` when a caller sets none): ``best.pt``, the epoch that is best on validation, and
    ``last.pt``, the state after an epoch with optimizer and random generators, from which :meth:`resume_checkpoint` continues. Both are
    written together, at most every ``checkpoint_seconds``: an epoch can be shorter than the writing, and a resumed run repeats the epochs
    after ``last.pt`` exactly.

    Several processes go through the same batches, each with its share of the rows, and average their gradients; only the first one
    writes files (see `recbole_mm.distributed`).

    Args:
        config: the run's settings.
        model: the model, on its device.
    """

    #: whether DistributedDataParallel may average the gradients: it wants one backward pass for each loss, and parameters that are trainable
    #: from the beginning to the end
    wrap = True

    def __init__(self, config, model):
        keep_freed_memory()
        self.run_dir = Path(config["run_dir"] or config["checkpoint_dir"])
        with mock.patch.object(recbole_trainer, "get_tensorboard", lambda logger: self._curves(config)):
            super().__init__(config, model)  # names its curves by the second; two runs in one second would share them
        self.checkpoint_dir = str(self.run_dir)
        self.saved_model_file = str(self.run_dir / "best.pt")
        self.history: list[dict[str, Any]] = []
        self.evaluation_times: list[float] = []
        self.last_evaluation: EvaluationResult | None = None
        if config["stop_on"] == "loss":
            self.valid_metric_bigger = False
            self.best_valid_score = math.inf
        fp16 = config["amp"] == "fp16" or (self.enable_scaler and config["amp"] is None)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=fp16 and self.device.type == "cuda")
        self._autocast_dtype = _AMP.get(config["amp"])
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._resumed: dict[str, Any] | None = None
        self._train_data = None
        self._best_state: dict[str, Any] | None = None  # not yet in best.pt
        self._written = time.monotonic()
        self._valid_loss_data = None
        self._saved = True
        self._exchange: distributed.Exchange | None = None
        if distributed.world()[1] > 1:
            check_trainer(type(self))
            wrap = self.wrap and not getattr(getattr(model, "features", None), "trainable", False)
            self._exchange = distributed.Exchange(model, mode_of(model), wrap)

    def _curves(self, config):
        if not config["tensorboard"] or not distributed.is_main():
            return _NoCurves()
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(Path("log_tensorboard") / self.run_dir.name))

    def _hook(self, name: str, *args) -> None:
        """Call `name` of the model's feature bank, which encodes items in end-to-end training, then of the model; who has none is skipped."""
        bank = getattr(self.model, "features", None)
        for owner in (bank if isinstance(bank, FeatureBank) else None, self.model):
            function = getattr(owner, name, None)
            if function is not None:
                function(*args)

    def _build_optimizer(self, **kwargs):
        groups = kwargs.pop("params", None)
        if groups is None:
            groups = self.model.parameter_groups() if hasattr(self.model, "parameter_groups") else self.model.parameters()
            bank = getattr(self.model, "features", None)
            groups = bank.own_groups(groups) if isinstance(bank, FeatureBank) else groups
        return build_optimizer(
            kwargs.pop("learner", self.learner),
            groups,
            learning_rate=kwargs.pop("learning_rate", self.learning_rate),
            weight_decay=kwargs.pop("weight_decay", self.weight_decay),
        )

    # training

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        self.model.train()
        self._hook("before_epoch", epoch_idx)
        for group, rate in zip(self.optimizer.param_groups, self._base_rates):
            group["lr"] = rate * learning_rate_factor(self.config, epoch_idx)
        loss_func = loss_func or self.model.calculate_loss
        accumulate = self.config["gradient_accumulation"] or 1
        batches = len(train_data)
        exchange = self._exchange
        if exchange is not None:
            distributed.same_generators(everything=True)
        bar = tqdm(train_data, total=batches, desc=f"Train {epoch_idx:>5}", ncols=100, delay=2, leave=False, disable=not show_progress)
        amp = self._autocast_dtype is not None or self.enable_amp
        total: list[Tensor] | None = None
        several = False
        for index, interaction in enumerate(bar):
            interaction = interaction.to(self.device)
            first = index - index % accumulate
            if index == first:
                self.optimizer.zero_grad(set_to_none=getattr(self.model, "set_grads_to_none", True))
            self._hook("before_batch", interaction)
            last = index + 1 == min(first + accumulate, batches)
            with torch.autocast(self.device.type, dtype=self._autocast_dtype, enabled=amp):
                if exchange is None:
                    losses = loss_func(interaction)
                else:
                    losses = exchange.losses(loss_func, interaction, _own_rows, _blocks(train_data, interaction), last)
            several = isinstance(losses, tuple)
            parts = losses if several else (losses,)
            loss = sum(parts) if several else losses
            if index % _CHECK_EVERY == 0:
                self._check_finite(parts, epoch_idx, index)
            # every interaction weighs the same, also in the last, shorter group of batches
            self._scaler.scale(loss / min(accumulate, batches - first)).backward()
            self._hook("after_backward")
            if exchange is not None:
                exchange.end_batch()
            if last:
                self._step()
            parts = [part.detach() for part in parts]
            total = parts if total is None else [a + b for a, b in zip(total, parts)]
        if total is None:
            raise UserError(
                "There is not one training batch: the training part of the dataset is empty. Check the split (eval_args) and the filters."
            )
        self._check_finite(total, epoch_idx, batches - 1)
        total = self._over_processes(total)
        values = tuple(part.item() for part in total)
        return values if several else values[0]

    def _step(self) -> None:
        if self._exchange is not None:
            self._exchange.finish()
        if self.clip_grad_norm:
            self._scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._hook("after_step")

    def _over_processes(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Losses of the batch (or of an epoch) from those of this process's share."""
        _, processes = distributed.world()
        return [distributed.all_sum(part) / processes for part in parts] if processes > 1 else list(parts)

    def _check_finite(self, total: Iterable[Tensor], epoch: int, batch: int) -> None:
        total = self._over_processes(total)  # so that all of them stop
        if not all(torch.isfinite(part).all() for part in total):
            raise UserError(
                f"The training loss is no longer a number (epoch {epoch}, by batch {batch}). A smaller learning_rate (now {self.learning_rate}), "
                "clip_grad_norm: {max_norm: 1.0} or amp: null usually helps."
            )

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        self._train_data, self._saved = train_data, saved
        if self._resumed is not None:
            restore_loader_state(train_data, self._resumed["loader"])
            checkpoint.set_random_state(self._resumed["random"])
            if self.start_epoch >= self.epochs or self.cur_step > self.stopping_step:  # it was killed between training and the test
                self.eval_collector.data_collect(train_data)
                return self.best_valid_score, self.best_valid_result

        def after_evaluation(epoch, score):
            self.history[-1]["valid"] = dict(self._valid_result)
            self.history[-1]["valid_score"] = float(score)
            self._save_last(epoch)
            if callback_fn:
                callback_fn(epoch, score)

        outcome = super().fit(train_data, valid_data, verbose, saved, show_progress, after_evaluation)
        if self.history:
            self._save_last(self.history[-1]["epoch"], now=True)
        return outcome

    def _add_train_loss_to_tensorboard(self, epoch_idx, losses, tag="Loss/Train"):
        """RecBole calls this once after each epoch's training; the epoch's record begins here."""
        super()._add_train_loss_to_tensorboard(epoch_idx, losses, tag)
        loss = float(sum(losses)) if isinstance(losses, tuple) else float(losses)
        self.history.append({"epoch": epoch_idx, "train_loss": loss, "valid": None, "time_s": round(self._epoch_seconds, 4)})
        if self._train_data is not None and (self.eval_step <= 0 or (epoch_idx + 1) % self.eval_step):
            self._save_last(epoch_idx)

    def _generate_train_loss_output(self, epoch_idx, s_time, e_time, losses):
        self._epoch_seconds = e_time - s_time
        return super()._generate_train_loss_output(epoch_idx, s_time, e_time, losses)

    # evaluation

    def _valid_epoch(self, valid_data, show_progress=False):
        result = self.evaluate(valid_data, load_best_model=False, show_progress=show_progress)
        self._valid_result = result
        if self.config["stop_on"] == "loss":
            # every process computes all of it; on GPUs the last digits may differ, and all must stop in the same epoch
            loss = distributed.broadcast_value(self._validation_loss(valid_data))
            self._valid_result = {**result, "loss": loss}
            return loss, result
        return result[self.valid_metric], result

    @torch.no_grad()
    def _validation_loss(self, valid_data) -> float:
        """Mean training loss over the validation interactions, with the same negatives and the same dropout-free model every time."""
        self.model.eval()
        if self._valid_loss_data is None:
            parts = [valid_data.train_dataset, valid_data._dataset]
            loader = TrainLoader(self.config, parts[1], build_sampler(self.config, parts[1], parts, phase="valid"), shuffle=False)
            self._valid_loss_data = loader, loader_state(loader)
        loader, begin = self._valid_loss_data
        restore_loader_state(loader, begin)
        state = checkpoint.random_state()
        torch.manual_seed(self.config["seed"])
        total, rows = 0.0, 0
        for interaction in loader:
            losses = self.model.calculate_loss(interaction.to(self.device))
            total += float(sum(losses) if isinstance(losses, tuple) else losses) * len(interaction)
            rows += len(interaction)
        checkpoint.set_random_state(state)
        return total / max(rows, 1)

    @torch.no_grad()
    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """RecBole's evaluation; full sort goes through our batches of users and leaves per-user values in ``self.last_evaluation``."""
        if not eval_data:
            return None
        self._write_best()
        distributed.barrier()
        if load_best_model and (model_file or Path(self.saved_model_file).is_file()):
            file = model_file or self.saved_model_file
            checkpoint.load_weights(self.model, checkpoint.load(file, self.device), file)
            self.logger.info(f"Loading model structure and parameters from {file}")
        self.model.eval()
        self._settle()
        self._hook("before_evaluation")
        begin = time.perf_counter()
        metrics = self._metrics(eval_data, show_progress)
        self.evaluation_times.append(round(time.perf_counter() - begin, 4))
        self.wandblogger.log_eval_metrics(metrics, head="eval")
        return metrics

    def _metrics(self, eval_data, show_progress: bool):
        """What :meth:`evaluate` returns, from a model that holds the weights and is in evaluation mode."""
        self.last_evaluation = evaluate(
            self.model, eval_data, self.config, self.eval_collector, self.evaluator, show_progress=show_progress
        )
        return self.last_evaluation.metrics

    # checkpoints

    def _state(self, epoch: int) -> dict[str, Any]:
        return {
            "model": self.config["model"],
            "dataset": self.config["dataset"],
            "fingerprint": self.config["data_fingerprint"],
            "settings": self.config.settings() if hasattr(self.config, "settings") else {},
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score),
            "state_dict": self.model.state_dict(),
            "other_parameter": self.model.other_parameter(),
        }

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        """Keep the weights of `epoch` as the best ones; RecBole calls this after each improvement."""
        if self._resumed is not None and epoch < 0:
            return  # RecBole writes a fresh model over the best one when there is nothing left to train
        self._settle()
        if not distributed.is_main():
            return
        self._best_state = _copied(self._state(epoch))
        if self._due():
            self._write_best()

    def _settle(self) -> None:
        """Let the processes encode an end-to-end run's items together before each goes its own way: evaluates its rows, writes a checkpoint."""
        if self._exchange is not None and getattr(getattr(self.model, "features", None), "trainable", False):
            self.model.features.settle()

    def _due(self) -> bool:
        return time.monotonic() - self._written >= (self.config["checkpoint_seconds"] or 0)

    def _write_best(self) -> None:
        if self._best_state is not None:
            checkpoint.save(self.saved_model_file, self._best_state)
            self._best_state = None

    def _save_last(self, epoch: int, now: bool = False) -> None:
        """Write both checkpoints if it is time, the best one first: last.pt must never know of a best epoch that no file holds."""
        if not self._saved or not distributed.broadcast_value(now or self._due()):
            return
        self._settle()
        self._written = time.monotonic()
        if not distributed.is_main():
            return
        self._write_best()
        if self.config["save_last"]:
            checkpoint.save(
                self.run_dir / "last.pt",
                {
                    **self._state(epoch),
                    "best_valid_result": self.best_valid_result,
                    "history": self.history,
                    "evaluation_times": self.evaluation_times,
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self._scaler.state_dict(),
                    "random": checkpoint.random_state(),
                    "loader": loader_state(self._train_data),
                },
            )

    @property
    def resumable(self) -> bool:
        """Whether ``last.pt`` holds all there is: one optimizer, and RecBole's plain loop of epochs."""
        optimizers = {id(value) for value in vars(self).values() if isinstance(value, torch.optim.Optimizer)}
        return len(optimizers) == 1 and type(self).fit is Trainer.fit

    def resume_checkpoint(self, resume_file):
        """Continue after the epoch that `resume_file` (a ``last.pt``) was written in.

        Raises:
            UserError: when the file is damaged, foreign, of another model or of other data.
        """
        state = checkpoint.load(resume_file, self.device, needs=("model", "fingerprint", "state_dict"))
        if not {"random", "optimizer", "scaler", "loader", "epoch", "history"} <= set(state):
            raise UserError(
                f"{resume_file} cannot be resumed from: it holds a model, not the state of a run. Use the last.pt of the run directory."
            )
        if state["model"] != self.config["model"]:
            raise UserError(f"{resume_file} is a run of {state['model']}, not of {self.config['model']}.")
        if state["fingerprint"] != self.config["data_fingerprint"]:
            raise UserError(
                f"{resume_file}: the data of {self.config['dataset']} has changed since that run. Start a new run instead of resuming."
            )
        checkpoint.load_weights(self.model, state, resume_file)
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.start_epoch = state["epoch"] + 1
        self.cur_step = state["cur_step"]
        self.best_valid_score = state["best_valid_score"]
        self.best_valid_result = state["best_valid_result"]
        self.history = state["history"]
        self.evaluation_times = state["evaluation_times"]
        self._resumed = state
        self.logger.info(f"Resuming from {resume_file} at epoch {self.start_epoch}")


def _blocks(loader, batch) -> int:
    """Blocks of rows that a batch consists of: positives, then their negatives (see `distributed.Share`)."""
    blocks = getattr(loader, "times", 1)
    return blocks if isinstance(blocks, int) and len(batch) % blocks == 0 else 1


def _own_rows(batch, share: distributed.Share):
    """The rows of `batch`, an interaction or something that cuts itself by ``part(share)``, that are this process's."""
    if hasattr(batch, "part"):
        return batch.part(share)
    return Interaction({name: share.take(column) for name, column in batch.interaction.items()})


def _copied(value: Any) -> Any:
    """`value` with every tensor in it copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


def trainer_class_for(model_class: type, config) -> type:
    """The trainer of a model: what its class names in ``trainer_class``, else RecBole's choice on top of ours.

    A model of ours names it by a string ("package.module.Class"), because models do not import trainers.
    RecBole gives some models trainers of their own (KGAT, S3Rec, ...). They are put before ours in one class, so that their ``super()``
    calls arrive here. Decision trees share nothing with the loop and keep RecBole's trainer.
    """
    named = getattr(model_class, "trainer_class", None)
    if isinstance(named, str):
        return resolve_name(named)
    if named is not None:
        return named
    theirs = recbole_get_trainer(config["MODEL_TYPE"], config["model"])
    if theirs is RecBoleTrainer:
        return Trainer
    if not issubclass(theirs, RecBoleTrainer):
        return theirs
    members = {"save_pretrained_model": _save_pretrained_model} if issubclass(theirs, recbole_trainer.PretrainTrainer) else {}
    return type(theirs.__name__, (theirs, Trainer), members)


def _save_pretrained_model(self, epoch: int, saved_model_file: str) -> None:
    """What a pre-training stage (S3Rec, RaCT) leaves for the next one: a checkpoint of ours in place of RecBole's pickle."""
    if distributed.is_main():
        checkpoint.save(saved_model_file, self._state(epoch))
    distributed.barrier()
    self.saved_model_file = saved_model_file
