r"""Beam search over the items that exist.

The token sequences of all items form a trie. A step of the search scores, for every beam, the children of its node only. The score of an
item is :math:`\sum_t \log p(y_t \mid y_{<t}, x)`, with p either normalised over the children of the node (``trie``, the default: the
distribution of a model that can only write items) or over the whole vocabulary (``vocabulary``). With ``trie`` an item is decided as soon
as it is the only one below its node, because all further steps have probability 1.

The decoder runs for all beams of a user against one copy of the encoder's keys and values, with transformers' own modules and cache.
transformers' ``generate`` copies the encoder states for every beam first.

Shapes: B users, W beams, N nodes, C most children of the nodes in a step, M edges.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessor

from recbole_mm.model.vip5.network import VIP5Network

NORMALISE = ("trie", "vocabulary")


class Trie:
    """All item token sequences (end mark included) as tensors: children of node n are the edges ``ptr[n]:ptr[n + 1]``.

    Attributes:
        ptr: [N + 1]; edge_token, edge_node: [M] token and child of an edge, edges of a node ordered by token.
        level: tokens that occur on each level; edge_local: place of an edge's token among those of its level [M].
        items: item of every sequence [I]; path: nodes of every sequence, 0 where it has ended [I, L].
        count: number of items below a node [N]; owner: sum of their ids [N], so the id itself where the count is 1.
        widest: the largest number of unfinished nodes on a level.
    """

    def __init__(self, items: Sequence[int], sequences: Sequence[Sequence[int]]):
        children: list[dict[int, int]] = [{}]
        depth = [0]
        path = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            node = 0
            for place, token in enumerate(sequence):
                token = int(token)
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                    depth.append(depth[node] + 1)
                node = children[node][token]
                path[row, place] = node
        edges = [(node, token, child) for node, below in enumerate(children) for token, child in sorted(below.items())]
        sizes = np.array([len(below) for below in children])
        tokens = [sorted({t for n, t, _ in edges if depth[n] == d}) for d in range(max(depth))]
        place = [{t: i for i, t in enumerate(level)} for level in tokens]
        self.ptr = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
        self.edge_token = torch.tensor([t for _, t, _ in edges])
        self.edge_node = torch.tensor([c for _, _, c in edges])
        self.edge_local = torch.tensor([place[depth[n]][t] for n, t, _ in edges])
        self.level = [torch.tensor(level) for level in tokens]
        self.items = torch.as_tensor(np.asarray(items, dtype=np.int64))
        self.path = torch.from_numpy(path)
        self.count, self.owner = self._below(self.path[None], self.items[None])
        self.count, self.owner = self.count[0], self.owner[0]
        self.widest = max(int(((np.array(depth) == d) & (sizes > 0)).sum()) for d in range(max(depth) + 1))
        self.lengths = torch.tensor([len(s) for s in sequences])
        self._row_of = torch.zeros(int(self.items.max()) + 1, dtype=torch.int64)
        self._row_of[self.items] = torch.arange(len(self.items))

    def to(self, device) -> "Trie":
        """The same object, on `device`."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self.level = [level.to(device) for level in self.level]
        return self

    def _below(self, path: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Number and sum of ids of the items below every node, for sets of items: path [B, I, L], items [B, I] -> [B, N] twice."""
        nodes = len(self.ptr) - 1
        flat = path.flatten(1)
        live = ((path > 0) & (items > 0)[..., None]).flatten(1).long()
        count = flat.new_zeros(len(path), nodes).scatter_add_(1, flat, live)
        owner = flat.new_zeros(len(path), nodes).scatter_add_(1, flat, live * items.repeat_interleave(path.shape[-1], 1))
        alone = (items > 0).sum(1)  # the root stands above all of them but in no path
        count[:, 0], owner[:, 0] = alone, items.sum(1)
        return count, owner

    def restricted(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """`count` and `owner` for each user's own candidates [B, K] (0: none): [B, N] twice."""
        known = candidates.clamp(max=len(self._row_of) - 1)
        known = torch.where((candidates == known) & (self.items[self._row_of[known]] == known), known, 0)
        return self._below(self.path[self._row_of[known]], known)


class Decoder:
    """One decoder pass per step for W beams of B users, over one copy of the encoder's keys and values."""

    def __init__(self, network: VIP5Network, encoded: Tensor, mask: Tensor):
        self.network, self.encoded = network, encoded
        self.mask = torch.zeros(mask.shape, dtype=encoded.dtype, device=mask.device)
        self.mask = self.mask.masked_fill(mask == 0, torch.finfo(encoded.dtype).min)[:, None, None, :]
        config = network.decoder.config
        self.cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        self.past = 0

    def keep(self, rows: Tensor) -> None:
        """Go on with the given rows of the last step, [B * W] numbers."""
        self.cache.self_attention_cache.reorder_cache(rows)

    def step(self, tokens: Tensor) -> Tensor:
        """Decoder states [B, W, D] after feeding one token to every beam, [B, W]."""
        stack = self.network.decoder
        users, beams = tokens.shape
        hidden = stack.embed_tokens(tokens.reshape(-1, 1))
        bias = cross_bias = None
        for block in stack.block:
            hidden, bias, _ = block.layer[0](hidden, position_bias=bias, past_key_values=self.cache)
            hidden, cross_bias, _ = block.layer[1](
                hidden.view(users, beams, -1),
                key_value_states=self.encoded,
                attention_mask=self.mask,
                position_bias=cross_bias,
                past_key_values=self.cache,
            )
            hidden = block.layer[2](hidden).view(users * beams, 1, -1)
        return stack.final_layer_norm(hidden).view(users, beams, -1)


@torch.no_grad()
def beam_search(
    network: VIP5Network,
    encoded: Tensor,
    mask: Tensor,
    trie: Trie,
    beams: int,
    count: int,
    candidates: Tensor | None = None,
    normalise: str = "trie",
) -> tuple[Tensor, Tensor]:
    """The best `count` items of every user.

    Args:
        network: in evaluation mode.
        encoded, mask: encoder states [B, S, D] and the mask of their tokens [B, S].
        trie: the items.
        beams: unfinished beginnings kept in a step.
        count: items wanted.
        candidates: the items of each user's own list [B, K], 0 for none; None for all items.
        normalise: ``trie`` or ``vocabulary``; see the module.

    Returns:
        items [B, count], best first, 0 where there are no more, and their scores, -inf there.
    """
    users, device = len(encoded), encoded.device
    below, owner = (trie.count[None], trie.owner[None]) if candidates is None else trie.restricted(candidates)
    below, owner = below.expand(users, -1), owner.expand(users, -1)
    decoder = Decoder(network, encoded, mask)
    node = torch.zeros(users, 1, dtype=torch.int64, device=device)
    score = torch.zeros(users, 1, device=device)
    tokens = torch.full_like(node, network.settings.decoder_start_token_id)
    best = torch.full((users, count), -torch.inf, device=device)
    found = torch.zeros(users, count, dtype=torch.int64, device=device)
    for level in trie.level:
        hidden = decoder.step(tokens)
        begin, size = trie.ptr[node], trie.ptr[node + 1] - trie.ptr[node]
        offset = torch.arange(int(size.max()), device=device)
        there = offset < size[..., None]
        edge = torch.where(there, begin[..., None] + offset, 0)  # [B, W, C]
        child = trie.edge_node[edge]
        there = there & (below.gather(1, child.flatten(1)).view_as(child) > 0) & torch.isfinite(score)[..., None]
        if normalise == "vocabulary":
            logits = network.head(hidden).float()
            values = logits.gather(-1, trie.edge_token[edge]) - logits.logsumexp(-1, keepdim=True)
        else:
            values = network.head(hidden, level).float().gather(-1, torch.where(there, trie.edge_local[edge], 0))
            values = values.masked_fill(~there, -torch.inf).log_softmax(-1)
        values = torch.where(there, values + score[..., None], -torch.inf).flatten(1)
        child, edge = child.flatten(1), edge.flatten(1)
        done = trie.ptr[child + 1] == trie.ptr[child]
        if normalise == "trie":
            done = done | (below.gather(1, child) == 1)
        finished = torch.where(done, values, -torch.inf)
        finished, place = finished.topk(min(count, finished.shape[1]), dim=1)
        best, order = torch.cat([best, finished], 1).topk(count, dim=1)
        found = torch.cat([found, owner.gather(1, child.gather(1, place))], 1).gather(1, order)
        live = torch.where(done, -torch.inf, values)
        width = live.shape[1] // node.shape[1]
        score, place = live.topk(min(beams, live.shape[1]), dim=1)
        if not bool((score[:, 0] > best[:, -1]).any()):
            break  # scores only fall: nothing unfinished can still come among the best
        rows = place // width + torch.arange(users, device=device)[:, None] * node.shape[1]
        node, tokens = child.gather(1, place), trie.edge_token[edge.gather(1, place)]
        decoder.keep(rows.flatten())
    return torch.where(torch.isfinite(best), found, 0), best


@torch.no_grad()
def score_items(
    network: VIP5Network, encoded: Tensor, mask: Tensor, trie: Trie, items: Tensor, normalise: str = "trie", chunk: int = 512
) -> Tensor:
    """Scores of given items by reading each whole sequence: [B, K] for items [B, K]; what the search approximates.

    ``trie`` normalises over the tokens that the whole catalogue allows at each place.
    """
    rows = trie._row_of[items]
    path, lengths = trie.path[rows], trie.lengths[rows]
    parents = torch.cat([torch.zeros_like(path[..., :1]), path[..., :-1]], -1)
    token_of = torch.zeros(len(trie.ptr) - 1, dtype=torch.int64, device=items.device)
    token_of[trie.edge_node] = trie.edge_token
    labels = torch.where(torch.arange(path.shape[-1], device=items.device) < lengths[..., None], token_of[path], -100)
    out = []
    for begin in range(0, items.shape[1], max(1, chunk // len(items))):
        part = slice(begin, begin + max(1, chunk // len(items)))
        label, parent = labels[:, part], parents[:, part]
        width = label.shape[1]
        flat = label.flatten(0, 1)
        logits = network.logits(encoded.repeat_interleave(width, 0), mask.repeat_interleave(width, 0), flat).float()
        if normalise == "trie":
            logits = logits.masked_fill(~allowed_tokens(trie, parent.flatten(0, 1), logits.shape[-1]), -torch.inf)
        picked = logits.log_softmax(-1).gather(-1, flat.clamp(min=0)[..., None])[..., 0]
        out.append(torch.where(flat == -100, 0.0, picked).sum(-1).view(len(items), width))
    return torch.cat(out, 1)


def allowed_tokens(trie: Trie, nodes: Tensor, vocabulary: int) -> Tensor:
    """Which tokens may follow each node: bool [..., vocabulary] for nodes [...]."""
    flat = nodes.flatten()
    begin, size = trie.ptr[flat], trie.ptr[flat + 1] - trie.ptr[flat]
    offset = torch.arange(max(int(size.max()), 1), device=nodes.device)
    there = offset < size[:, None]
    edge = torch.where(there, begin[:, None] + offset, 0)
    allowed = torch.zeros(len(flat), vocabulary + 1, dtype=torch.bool, device=nodes.device)
    allowed.scatter_(1, torch.where(there, trie.edge_token[edge], vocabulary), True)  # the extra column takes what is not there
    return allowed[:, :vocabulary].view(*nodes.shape, vocabulary)


class TrieLogits(LogitsProcessor):
    """The same restriction for transformers' ``generate``: works with every decoding strategy of it, slower.

    Scores that are no continuation of an item become -inf; with ``normalise="trie"`` the others are normalised among themselves.
    """

    def __init__(self, trie: Trie, eos_token_id: int, normalise: str = "trie"):
        self.trie, self.eos, self.normalise = trie, eos_token_id, normalise

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        node = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)
        for token in input_ids[:, 1:].T:  # the start token is in no path
            begin, size = self.trie.ptr[node], self.trie.ptr[node + 1] - self.trie.ptr[node]
            offset = torch.arange(max(int(size.max()), 1), device=node.device)
            edge = torch.where(offset < size[:, None], begin[:, None] + offset, 0)
            match = (self.trie.edge_token[edge] == token[:, None]) & (offset < size[:, None])
            node = torch.where(match, self.trie.edge_node[edge], 0).sum(-1)
        allowed = allowed_tokens(self.trie, node, scores.shape[-1])
        ended = (node == 0) if input_ids.shape[1] > 1 else torch.zeros_like(node, dtype=torch.bool)
        allowed[ended, self.eos] = True
        leaf = self.trie.ptr[node + 1] == self.trie.ptr[node]
        allowed[leaf, self.eos] = True
        scores = scores.masked_fill(~allowed, -torch.inf)
        return scores.log_softmax(-1) if self.normalise == "trie" else scores
