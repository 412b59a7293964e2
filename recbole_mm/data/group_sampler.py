"""Negatives for users in groups: uniform over what the user's group has bought in training, less what the user has."""

import torch
from torch import Tensor

from recbole_mm.data.sampler import CandidateSampler, NegativeSampler


class GroupSampler:
    r"""Draws uniformly from :math:`P_{g(u)} \setminus I_u`, P_g the training items of group g and I_u those of the user.

    A user who has bought all that the group has (the published sampler never returns for such a user, and gives others their own
    positives) draws from the whole catalogue less the own items.

    Args:
        pairs: sorted keys ``user * item_num + item`` of the training interactions, item 0 absent.
        user_num, item_num: numbers of ids, padding included.
        groups: [user_num] group of each user, or None for one pool, the whole catalogue (global negatives).
        device: where draws are made.
        tokens: user id -> name, for messages.
    """

    def __init__(self, pairs: Tensor, user_num: int, item_num: int, groups: Tensor | None = None, device="cpu", tokens=str):
        self.whole = NegativeSampler(user_num, item_num, pairs, device=device, tokens=tokens)
        self.groups = None if groups is None else groups.to(device)
        self.pools: dict[int, CandidateSampler] = {}
        if groups is None:
            return
        users, items = pairs // item_num, pairs % item_num
        member = groups.to(pairs.device)[users]
        for group in member.unique().tolist():
            inside = member == group
            pool = items[inside].unique()
            full = torch.bincount(users[inside], minlength=user_num) >= len(pool)
            self.groups[full.nonzero().flatten().to(device)] = -1
            used = pairs[inside & ~full[users]]
            if len(used):
                self.pools[group] = CandidateSampler(user_num, item_num, pool, used, device=device, tokens=tokens)

    def sample(self, users: Tensor, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `num` items for each of the B users, [B, num]; randomness from `generator` or torch's global one."""
        if self.groups is None:
            return self._draw(self.whole, users, num, generator)
        out = torch.empty(len(users), num, dtype=torch.int64, device=users.device)
        member = self.groups[users]
        for group in member.unique().tolist():
            rows = (member == group).nonzero().flatten()
            out[rows] = self._draw(self.pools.get(group, self.whole), users[rows], num, generator)
        return out

    @staticmethod
    def _draw(sampler: NegativeSampler, users: Tensor, num: int, generator) -> Tensor:
        positives = torch.zeros_like(users)  # read by samplers of repeatable data only
        return sampler.sample(users, positives, num, generator).view(num, -1).T
