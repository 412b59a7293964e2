"""Negatives for users in groups: uniform over what the user's group has bought in training, less what the user has."""

import torch
from torch import Tensor

from recbole_mm.data.sampler import NegativeSampler


class GroupSampler:
    r"""Draws uniformly from :math:`P_{g(u)} \setminus I_u`, P_g the training items of group g and I_u those of the user.

    A user who has bought all that the group has (the published sampler never returns for such a user, and gives others their own positives) draws from
    the whole catalogue less the own items.

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
        self.pools: dict[int, tuple[Tensor, NegativeSampler]] = {}
        if groups is None:
            return
        users, items = pairs // item_num, pairs % item_num
        member = groups.to(pairs.device)[users]
        for group in member.unique().tolist():
            u, i = users[member == group], items[member == group]
            pool, place = i.unique(return_inverse=True)
            full = torch.bincount(u, minlength=user_num) >= len(pool)
            self.groups[full.nonzero().flatten().to(device)] = -1
            keep = ~full[u]
            if keep.any():  # inside the pool its items are numbered 1, 2, ...; the sampler's 0 is padding
                keys = (u * (len(pool) + 1) + place + 1)[keep]
                self.pools[group] = (
                    pool.to(device),
                    NegativeSampler(user_num, len(pool) + 1, keys.sort().values, device=device, tokens=tokens),
                )

    def sample(self, users: Tensor, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `num` items for each of the B users, [B, num]; randomness from `generator` or torch's global one."""
        if self.groups is None:
            return self._draw(self.whole, users, num, generator)
        out = torch.empty(len(users), num, dtype=torch.int64, device=users.device)
        member = self.groups[users]
        for group in member.unique().tolist():
            rows = (member == group).nonzero().flatten()
            if group in self.pools:
                pool, sampler = self.pools[group]
                out[rows] = pool[self._draw(sampler, users[rows], num, generator) - 1]
            else:
                out[rows] = self._draw(self.whole, users[rows], num, generator)
        return out

    @staticmethod
    def _draw(sampler: NegativeSampler, users: Tensor, num: int, generator) -> Tensor:
        return sampler.sample(users, users, num, generator).view(num, -1).T
