"""One sequence per user: training parts keep plain interactions, evaluation parts get the user's history as a sequence."""

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_mm.data.dataset import MultimodalSequentialDataset
from recbole_mm.errors import UserError


class UserSequenceDataset(MultimodalSequentialDataset):
    """A sequential dataset without prefix augmentation, for models that learn from every position of a user's sequence at once.

    Split as RecBole splits interactions (`eval_args`, order by time), or by ready files (`benchmark_filename`). With leave-one-out
    for validation and test, users with fewer than three interactions are for training only.

    * The training part holds the training interactions themselves, sorted by user and time; `user_sequences` makes tensors of them.
    * A row of the validation and test parts is one interaction with ``item_id_list``, the user's latest items before it (training; for test also
      validation), padded on the right, and ``item_length``, as RecBole's sequential models expect.
    """

    def _benchmark_presets(self):
        self._aug_presets()

    def data_augmentation(self):
        """In place of RecBole's expansion into prefixes: only the order by user and time."""
        self._aug_presets()
        if self.time_field is None or self.time_field not in self.inter_feat:
            raise UserError(
                f"{self.dataset_name}: sequences need the time of each interaction, but the column {self.time_field!r} was not loaded. Name it in "
                "load_col, e.g. {inter: [user_id, item_id, timestamp]}, or set TIME_FIELD."
            )
        self.sort(by=[self.uid_field, self.time_field], ascending=True)

    def build(self):
        parts = super().build()
        if self.config["benchmark_filename"] is None and "LS" in self.config["eval_args"]["split"]:
            parts = self._short_users_train_only(parts)
        for part in parts:
            if self.time_field in part.inter_feat:
                part.sort(by=[self.uid_field, self.time_field], ascending=True)
        train, valid, test = parts
        seen = [train.inter_feat]
        for part in (valid, test):
            history = self._latest(seen, self.max_item_list_len)[part.inter_feat[self.uid_field]]
            seen.append(Interaction({field: part.inter_feat[field] for field in (self.uid_field, self.iid_field)}))
            part.inter_feat.update(Interaction({self.item_id_list_field: history, self.item_list_length_field: (history > 0).sum(1)}))
            keep = (history > 0).any(1)
            if not keep.all():
                self.logger.info(f"{int((~keep).sum())} interactions of users without an earlier one are not evaluated.")
                part.inter_feat = part.inter_feat[keep]
        train.later = seen[1:]
        return parts

    def _short_users_train_only(self, parts):
        """Hand validation and test items of users with fewer than three interactions back to the training part."""
        count = sum(torch.bincount(part.inter_feat[self.uid_field], minlength=self.user_num) for part in parts)
        if self.config["eval_args"]["split"]["LS"] != "valid_and_test":
            return parts
        train = parts[0].inter_feat
        moved = {field: [train[field]] for field in train}
        for part in parts[1:]:
            short = count[part.inter_feat[self.uid_field]] < 3
            for field in moved:
                moved[field].append(part.inter_feat[field][short])
            part.inter_feat = part.inter_feat[~short]
        parts[0].inter_feat = Interaction({field: torch.cat(values) for field, values in moved.items()})
        return parts

    def _latest(self, feats, length: int) -> Tensor:
        """The latest `length` items of every user over interactions given in order of time, [user_num, length], padded on the right."""
        users, items = (torch.cat([feat[field] for feat in feats]) for field in (self.uid_field, self.iid_field))
        order = users.argsort(stable=True)
        users, items = users[order], items[order]
        count = torch.bincount(users, minlength=self.user_num)
        place = torch.arange(len(users)) - (count.cumsum(0) - count)[users] - (count - length).clamp(min=0)[users]
        out = torch.zeros(self.user_num, length, dtype=torch.int64)
        out[users[place >= 0], place[place >= 0]] = items[place >= 0]
        return out

    def user_sequences(self, length: int, with_valid: bool = False) -> Tensor:
        """Each user's latest `length` training items (and validation items after them), [user_num, length], padded on the left."""
        if not hasattr(self, "later"):
            raise UserError("user_sequences belongs to the training part that build() returns.")
        rows = self._latest([self.inter_feat, *self.later[: int(with_valid)]], length)
        shift = length - (rows > 0).sum(1, keepdim=True)
        column = torch.arange(length) - shift
        return rows.gather(1, column.clamp(min=0)) * (column >= 0)

    def latest_sequences(self, users) -> Interaction:
        """What predicts the next item after everything known, test included: a row for each of `users`, as in the evaluation parts.

        Raises:
            UserError: for a user without any interaction.
        """
        users = torch.as_tensor(users)
        rows = self._latest([self.inter_feat, *self.later], self.max_item_list_len)[users]
        length = (rows > 0).sum(1)
        if (length == 0).any():
            name = self.id2token(self.uid_field, int(users[length == 0][0]))
            raise UserError(f"The user {name!r} has no interaction to start from.")
        return Interaction({self.uid_field: users, self.item_id_list_field: rows, self.item_list_length_field: length})

    def inter_matrix(self, form="coo", value_field=None):
        """Users x items of the interactions of this part."""
        return self._create_sparse_matrix(self.inter_feat, self.uid_field, self.iid_field, form, value_field)
