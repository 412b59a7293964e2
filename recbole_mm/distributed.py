r"""Several processes of one run: who we are, what is exchanged, and which part of a batch is ours.

Every process holds the whole data and the whole model and goes through the same batches: shuffles, negatives and random views come from
generators that are equal everywhere. Of each batch of N rows, process r computes the :math:`n_r` rows of its :class:`Share`. With
:math:`L_r` what the model's loss gives for them, the loss of the batch is

.. math:: L = \frac1W \sum_r s_r L_r, \qquad s_r = W n_r / N,

W the number of processes, so a mean over rows stays the mean over all rows however unequal the shares are, and a term that does not depend
on the rows counts once. Gradients are averaged over processes, by DistributedDataParallel where it can wrap the model. What is not a mean is
written with the functions below, which do nothing in one process: :func:`sum_rows`, :func:`count_rows`, :func:`gather_rows`. They are
differentiable: the gradient of every process's loss comes back to the process that gave the rows.

`launch.py` starts the processes of one machine; torchrun does as well.
"""

import atexit
import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.overrides import TorchFunctionMode

from recbole_mm.errors import UserError
from recbole_mm.launch import REPORTS

_TIMEOUT = timedelta(days=2)  # one process may encode a catalogue while the others wait; a dead one is noticed by its closed connection
_BUCKET_BYTES = 32 << 20
_reported: dict[str, str] = {}
_group = None  # for what autograd exchanges: DistributedDataParallel has its own order on the default group


# --- who we are -----------------------------------------------------------------------------------------------------------------


def world() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) where no group was started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this process writes files and logs."""
    return world()[0] == 0


def planned() -> tuple[int, int, int]:
    """Number of processes, this one's number on its machine, and how many there are on it, as torchrun and our launcher put them into the environment."""
    try:
        processes = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
        return processes, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except ValueError:
        raise UserError(
            "RANK, WORLD_SIZE and LOCAL_RANK in the environment must be whole numbers. Start several processes with --nproc=N or torchrun."
        ) from None


def choose_device(use_gpu: bool) -> torch.device:
    """The device of this process where several are planned: a GPU each; fewer GPUs than processes are shared."""
    if not use_gpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", planned()[1] % torch.cuda.device_count())


def start(device: torch.device) -> None:
    """Join the other processes if there are any (gloo for tensors on the CPU, nccl for those on GPUs); later calls do nothing.

    Raises:
        UserError: when the environment names several processes but not where they meet.
    """
    global _group
    processes, _, on_machine = planned()
    if processes == 1 or world()[1] > 1:
        return
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {processes}, but MASTER_ADDR and MASTER_PORT are not set. Start the processes with --nproc={processes} or torchrun."
        )
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # nccl wants a GPU for each process; gloo lets several share one
        backend = "cpu:gloo,cuda:nccl" if on_machine <= torch.cuda.device_count() else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    _group = dist.new_group(timeout=_TIMEOUT)
    atexit.register(stop)


def stop() -> None:
    """Leave the group."""
    global _group
    if world()[1] > 1:
        dist.destroy_process_group()
    _group = None


def report(name: str, text: str) -> None:
    """Leave a line for the launcher, which tells the user where a broken run lies; :func:`reported` gives it back."""
    _reported[name] = text
    folder = os.environ.get(REPORTS)
    if folder:
        Path(folder, name).write_text(text, encoding="utf-8")


def reported(name: str) -> str | None:
    """What this process has left under `name`."""
    return _reported.get(name)


def lost_contact(error: BaseException) -> bool:
    """Whether an exception means that another process is gone."""
    if world()[1] == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("by peer", "Broken pipe", "gloo", "NCCL", "Connection refused", "Socket")
    )


# --- values -----------------------------------------------------------------------------------------------------------------------


def barrier() -> None:
    """Wait for all processes."""
    if world()[1] > 1:
        broadcast_value(None)


def broadcast_value(value: Any) -> Any:
    """The main process's `value`, a small Python object."""
    if world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns in the main process, which alone runs it, for all; its UserError reaches all too."""
    rank, processes = world()
    if processes == 1:
        return function()
    value = problem = None
    if rank == 0:
        try:
            value = function()
        except UserError as error:
            problem = str(error)
    value, problem = broadcast_value((value, problem))
    if problem is not None:
        raise UserError(problem)
    return value


def gather_values(value: Any) -> list:
    """Every process's `value`, a small Python object, in order of rank."""
    processes = world()[1]
    if processes == 1:
        return [value]
    values = [None] * processes
    dist.all_gather_object(values, value)
    return values


def own_part(total: int) -> slice:
    """This process's part of `total` rows: parts of equal size, the last one shorter."""
    rank, processes = world()
    share = -(-total // processes)
    return slice(min(rank * share, total), min((rank + 1) * share, total))


def gather(part: Tensor) -> Tensor:
    """The tensors of all processes below each other in order of rank; their lengths may differ. No gradient."""
    if world()[1] == 1:
        return part
    before, total = _place(len(part))
    whole = part.new_zeros(total, *part.shape[1:])
    whole[before : before + len(part)] = part
    if whole.dtype is torch.bool:
        whole = whole.to(torch.uint8)
        dist.all_reduce(whole)
        return whole.bool()
    dist.all_reduce(whole)
    return whole


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite `tensors` by those of the main process."""
    if world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes, without gradient."""
    if world()[1] == 1:
        return tensor
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor


def _place(rows: int) -> tuple[int, int]:
    """Number of rows of the processes before this one, and of all."""
    rank, processes = world()
    sizes = torch.zeros(processes, dtype=torch.int64)
    sizes[rank] = rows
    dist.all_reduce(sizes)
    return int(sizes[:rank].sum()), int(sizes.sum())


def same_generators(everything: bool = False) -> None:
    """Give all processes the random state of the main one: torch's, or `everything`, Python's and NumPy's too."""
    if world()[1] == 1:
        return
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])
    broadcast_tensors(states)
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
    if everything:
        python, numpy = broadcast_value((random.getstate(), np.random.get_state()))
        random.setstate(python)
        np.random.set_state(numpy)


# --- a share of a batch -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Rows start..stop of each of the `blocks` blocks of `rows` rows that a batch consists of.

    A batch with k negatives for each of B positives has k blocks of B rows below each other; the rows of a positive stay together.
    """

    rows: int
    start: int
    stop: int
    blocks: int = 1

    @classmethod
    def of(cls, rows: int, blocks: int = 1) -> "Share | None":
        """This process's share of a batch, or None where there are fewer rows than processes: then everybody computes them all."""
        rank, processes = world()
        if processes == 1 or rows < processes:
            return None
        size, longer = divmod(rows, processes)
        start = rank * size + min(rank, longer)
        return cls(rows, start, start + size + (rank < longer), blocks)

    @property
    def size(self) -> int:
        """Number of own rows."""
        return (self.stop - self.start) * self.blocks

    @property
    def scale(self) -> float:
        """s_r of the module's formula."""
        return world()[1] * (self.stop - self.start) / self.rows

    @property
    def equal(self) -> bool:
        """Whether all processes have the same number of rows."""
        return self.rows % world()[1] == 0

    def take(self, column: Tensor) -> Tensor:
        """The own rows of a column (or of draws) of the whole batch."""
        if self.blocks == 1:
            return column[self.start : self.stop]
        return column.unflatten(0, (self.blocks, self.rows))[:, self.start : self.stop].flatten(0, 1)


_share: Share | None = None


def active() -> Share | None:
    """The share that is being computed, None where the batch at hand is whole."""
    return _share


@contextlib.contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """Compute a share: row dropout and RecBole's norm over embeddings see the whole batch, and the functions below work. None is no share."""
    global _share
    if share is None:
        yield
        return
    from recbole.model.loss import EmbLoss

    before, _share = _share, share
    try:
        with mock.patch.object(EmbLoss, "forward", _embedding_norms(EmbLoss.forward)), _RowDropout():
            yield
    finally:
        _share = before


def sum_rows(value: Tensor) -> Tensor:
    """A sum over the rows of the share, in the place of the sum over the rows of the batch."""
    return value if _share is None else value * (_share.rows / (_share.stop - _share.start))


def count_rows(number: Tensor) -> Tensor:
    """The number of something in the whole batch from that in the share; without gradient."""
    return number if _share is None else all_sum(number)


def rand_rows(rows: int, *shape: int, device=None) -> Tensor:
    """Uniform numbers [rows, ...]; where `rows` are those of the share, the own ones of the whole batch's draws."""
    if _share is None or rows != _share.size:
        return torch.rand(rows, *shape, device=device)
    return _share.take(torch.rand(_share.rows * _share.blocks, *shape, device=device))


def gather_rows(*parts: Tensor) -> list[Tensor]:
    """For each of the tensors, which have the same length here, those of all shares below each other, with gradient; the shares' lengths may differ."""
    if _share is None:
        return list(parts)
    place = _place(len(parts[0]))
    return [_GatherRows.apply(part, *place) for part in parts]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, before: int, total: int) -> Tensor:
        ctx.own = slice(before, before + len(part))
        whole = part.new_zeros(total, *part.shape[1:])
        whole[ctx.own] = part
        dist.all_reduce(whole, group=_group)
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=_group)
        return gradient[ctx.own], None, None


def _embedding_norms(original):
    """RecBole's EmbLoss divides the un-squared norm of a batch's vectors by the batch size: the squares are summed over the shares first."""

    def forward(self, *embeddings, require_pow=False):
        own = _share.size
        if require_pow or not all(len(e) == own for e in embeddings):  # a mean over rows, or no rows of the batch
            return original(self, *embeddings, require_pow=require_pow)
        rank, processes = world()
        norms = torch.stack([torch.norm(e, p=self.norm) for e in embeddings]).unsqueeze(0)
        norms = _GatherRows.apply(norms, rank, processes)  # [W, number]
        return (torch.norm(norms, p=self.norm, dim=0).sum() / (_share.rows * _share.blocks)).reshape(1)

    return forward


class _RowDropout(TorchFunctionMode):
    """Dropout of a tensor whose first dimension is the share's rows draws the whole batch's mask and takes its own rows of it.

    So processes neither repeat each other's masks nor fall out of step, and they drop what one process would have dropped. Attention draws
    its mask inside one kernel; on the CPU, where that kernel is no more than its formula, the formula is written out. On GPUs every process
    draws the same mask for its rows.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.dropout:
            return _row_dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _row_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _row_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1 or x.dim() == 0 or len(x) != _share.size:
        return F.dropout(x, p, training, inplace)
    whole = torch.ones(_share.rows * _share.blocks, *x.shape[1:], dtype=x.dtype, device=x.device)
    return x * _share.take(F.dropout(whole, p, True))


def _row_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    if not dropout_p or len(q) != _share.size or q.device.type != "cpu" or enable_gqa:
        more = {"enable_gqa": True} if enable_gqa else {}
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **more)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    empty = (scores == -torch.inf).all(-1, keepdim=True)  # a row that sees nothing gives zeros, not NaN
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return _row_dropout(weights, dropout_p) @ v


# --- gradients --------------------------------------------------------------------------------------------------------------------


class _Step(nn.Module):
    """A model whose ``forward`` is its loss, as DistributedDataParallel wants it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, loss_function, batch):
        return loss_function(batch)


class Exchange:
    """Computes losses of shares and averages their gradients.

    Args:
        model: the model; its parameters become those of the main process.
        mode: ``rows``, every process gets its rows; ``own``, the model gets the whole batch and takes its share itself;
            ``whole``, every process computes the whole batch.
        wrap: use DistributedDataParallel; else :meth:`finish` averages the gradients.
    """

    def __init__(self, model: nn.Module, mode: str, wrap: bool):
        self.model, self.mode = model, mode
        self.step = None
        trainable = [p for p in model.parameters() if p.requires_grad]
        if wrap and trainable:
            with warnings.catch_warnings():  # newer versions rename the argument
                warnings.simplefilter("ignore", FutureWarning)
                self.step = nn.parallel.DistributedDataParallel(_Step(model), find_unused_parameters=True, broadcast_buffers=False)
        else:
            broadcast_tensors(model.parameters())
        self._drifted = False

    def losses(self, loss_function, batch, rows, blocks: int, last: bool):
        """The scaled losses s_r L_r of the own share of `batch`; a tensor or a tuple.

        Args:
            loss_function: called with the own rows.
            rows: ``rows(batch, share)`` gives the own rows.
            blocks: see :class:`Share`.
            last: whether the gradients are averaged after this batch; else they pile up.
        """
        share = Share.of(len(batch) // blocks, blocks) if self.mode == "rows" else None
        self._drifted = self.mode == "own" or (share is not None and not share.equal)
        part = batch if share is None else rows(batch, share)
        with sharing(share):
            if self.step is None:
                losses = loss_function(part)
            else:
                with contextlib.nullcontext() if last else self.step.no_sync():
                    losses = self.step(loss_function, part)
        if share is None or share.equal:
            return losses
        return tuple(part * share.scale for part in losses) if isinstance(losses, tuple) else losses * share.scale

    def end_batch(self) -> None:
        """Bring generators into step again where the shares may have drawn differently."""
        if self._drifted:
            same_generators()

    def finish(self) -> None:
        """Average the gradients, unless DistributedDataParallel has done so."""
        if self.step is None:
            average_gradients(self.model.parameters())


def average_gradients(parameters: Iterable[Tensor], divide: bool = True) -> None:
    """Replace gradients by their mean (or sum) over the processes; a parameter without one anywhere keeps none, so the optimizer skips it."""
    processes = world()[1]
    if processes == 1:
        return
    parameters = list(parameters)
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    buckets: dict[tuple, list[list[Tensor]]] = {}
    for parameter, there in zip(parameters, present.tolist()):
        if not there:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        lists = buckets.setdefault((gradient.dtype, gradient.device), [[]])
        if lists[-1] and sum(g.numel() * g.element_size() for g in lists[-1]) > _BUCKET_BYTES:
            lists.append([])
        lists[-1].append(gradient)
    for bucket in (bucket for lists in buckets.values() for bucket in lists):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat)
        if divide:
            flat /= processes
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket])):
            gradient.copy_(part.view_as(gradient))
