"""Training of PerPEFT-SASRec: one adapter for all, grouping, one adapter per group."""

import csv
import io
import math

import torch
from recbole.data.interaction import Interaction

from recbole_mm.distributed import is_main
from recbole_mm.errors import UserError
from recbole_mm.files import write_text
from recbole_mm.trainer.trainer import Trainer


class GroupBatches:
    """One pass over the users: batches of users of one group, in an order drawn from torch's global generator.

    Every user with a training pair comes once, so a group has a share of the batches that is proportional to its size.

    Args:
        users: the users to train on.
        groups: group of every user id.
        batch_size: users per batch.
        field: name of the user column.
    """

    def __init__(self, users: torch.Tensor, groups: torch.Tensor, batch_size: int, field: str):
        self.users, self.field, self.batch_size = users, field, batch_size
        self.member = groups[users]
        self.sizes = self.member.unique(return_counts=True)[1].tolist()

    def __len__(self) -> int:
        return sum(math.ceil(size / self.batch_size) for size in self.sizes)

    def __iter__(self):
        shuffled = torch.randperm(len(self.users), device=self.users.device)
        shuffled = shuffled[self.member[shuffled].argsort(stable=True)]
        batches = [batch for group in self.users[shuffled].split(self.sizes) for batch in group.split(self.batch_size)]
        for index in torch.randperm(len(batches)).tolist():
            yield Interaction({self.field: batches[index]})


class PerPEFTTrainer(Trainer):
    """Three parts in one count of epochs: `global_epochs` with one adapter for all, then the groups, then the rest with an adapter each.

    `epochs` counts all of them, so that runs of every ``peft_scope`` train equally long. There is no early stopping in the first part, and
    the best epoch is chosen among those of the last. Between the parts the optimizer starts afresh, as in the official code.
    The groups are in every checkpoint and in ``groups.csv`` of the run directory.
    """

    wrap = False  # the adapter of the batch's group is trainable, all others are not

    def __init__(self, config, model):
        super().__init__(config, model)
        if model.personalized and not 0 <= model.global_epochs < self.epochs:
            raise UserError(
                f"global_epochs: expected 0 to epochs - 1 = {self.epochs - 1}, got {model.global_epochs}; epochs counts the global and the "
                "personalised part together."
            )

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        model = self.model
        if not bool(model.grouped):
            if epoch_idx < model.global_epochs:
                self.cur_step = 0
            else:
                self._personalize()
        batches = GroupBatches(model.training_users(), model.user_group, self.config["train_batch_size"], model.USER_ID)
        return super()._train_epoch(batches, epoch_idx, loss_func, show_progress)

    def _personalize(self) -> None:
        """From one adapter to one per group."""
        groups = self.model.assign_groups()
        self.optimizer.state.clear()
        self.cur_step = 0
        self.best_valid_score = -math.inf if self.valid_metric_bigger else math.inf
        if self._saved and is_main():
            self._write_groups(groups)

    def _write_groups(self, groups: torch.Tensor) -> None:
        dataset = self.model.dataset
        tokens = dataset.id2token(dataset.uid_field, range(1, len(groups)))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("user", "group"))
        writer.writerows(zip(tokens, groups[1:].tolist()))
        write_text(self.run_dir / "groups.csv", text.getvalue())
