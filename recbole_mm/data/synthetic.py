r"""A small shop with planted tastes, so that every claim of the project can be tested against a known truth.

What is planted, and where it can be seen:

==========  ===============================================  =================================================================
signal      what it is                                       who can see it
==========  ===============================================  =================================================================
picture     ``colour``, ``pattern``, ``shape`` of an item    only its picture (64-pixel JPEG)
text        ``material``, ``occasion``, ``brand``            only its title, description and brand column
kind        what the thing is: ``cushion``, ``lamp`` ...     its picture (by the ground it is shown on) and its title
hidden      ``circle`` and popularity                        nothing but the interactions
group       each user's group looks at four of the six        the whole history of a user
            attributes, two of each modality, one leading;
            and buys four of the ten kinds, of which each
            user likes two
order       the lead value of the next item is the           only who reads the history in order
            successor, on the group's own wheel, of the
            last item's
cold        the newest items are sold only in each user's    pictures and texts of items without training interaction
            last two interactions
word        a review names the item's value of the group's   group of the user and content of the item
            lead attribute
==========  ===============================================  =================================================================

One choice of user u (group g) after item j is drawn from

.. math:: P(i) \propto \mathrm{pop}_i \exp\bigl( w_f [a_g(i) \in F_g] + w_o [a_g(i) = \sigma_g(a_g(j))] + w_s [b_g(i) \in S_g]
          + w_u [b_g(i) = s_u] + w_a \textstyle\sum_k [e_{gk}(i) \in T_{gk}] + w_k [k(i) \in K_u] + w_c [c(i) = c_u] \bigr)

over the items on sale that u does not own. :math:`a_g` is the group's lead attribute, :math:`F_g` its favourite values in the order of its
wheel :math:`\sigma_g`, :math:`b_g` its second attribute with favourites :math:`S_g`, of which :math:`s_u` is the user's own,
:math:`e_{g1}, e_{g2}` two more attributes with liked values, k the kind with the user's kinds :math:`K_u`, c the hidden circle. Picture and
text of one item are related, as in any shop: both show the kind, and each material tends to come in one colour and so on (`STYLE`).
Otherwise a contrastive encoder would have nothing to learn from the pairs.

All random numbers are uniform doubles of numpy's PCG64 (other distributions may change between numpy versions), and pictures are
computed by arithmetic; Pillow only encodes. So tables and pixels follow from the seed; the bytes of a JPEG depend on the encoder's version.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_mm.errors import UserError
from recbole_mm.files import atomic_path, write_json

VERSION = 3

VALUES = {
    "colour": ("red", "orange", "yellow", "green", "blue", "purple"),
    "pattern": ("plain", "striped", "ribbed", "checked", "dotted", "slanted"),
    "shape": ("round", "square", "triangular", "crossed", "ringed", "starry"),
    "material": ("cotton", "wooden", "leather", "ceramic", "bamboo", "steel"),
    "occasion": ("picnic", "office", "wedding", "travel", "winter", "garden"),
    "brand": ("Alvora", "Brindel", "Cortina", "Dunmore", "Elkhart", "Fennway"),
}
VISUAL = ("colour", "pattern", "shape")
TEXTUAL = ("material", "occasion", "brand")
ATTRIBUTES = VISUAL + TEXTUAL
N_VALUES = 6
N_CIRCLES = 6
STYLE_PARTNER = {"material": "colour", "occasion": "pattern", "brand": "shape"}

# (lead, second, two more): every attribute leads one group, is second in another and ignored by two; two of each group can be seen in the
# picture, two read in the text; lead and second are never related by STYLE_PARTNER.
GROUPS = (
    ("colour", "occasion", "pattern", "brand"),
    ("pattern", "brand", "shape", "material"),
    ("shape", "material", "colour", "occasion"),
    ("material", "pattern", "occasion", "colour"),
    ("occasion", "shape", "brand", "pattern"),
    ("brand", "colour", "material", "shape"),
)
LEADS = np.array([ATTRIBUTES.index(names[0]) for names in GROUPS])
SECONDS = np.array([ATTRIBUTES.index(names[1]) for names in GROUPS])
OTHERS = np.array([[ATTRIBUTES.index(name) for name in names[2:]] for names in GROUPS])
N_FAVOURITES = 3  # liked values of lead and second attribute
N_ALSO = 2  # liked values of each of the two others

KINDS = ("cushion", "lamp", "tray", "basket", "mug", "bag", "box", "clock", "bowl", "blanket")
CATEGORY = {
    "cushion": "Living", "lamp": "Living", "clock": "Living", "blanket": "Living", "tray": "Kitchen", "mug": "Kitchen",
    "bowl": "Kitchen", "basket": "Storage", "bag": "Storage", "box": "Storage",
}  # fmt: skip
N_KINDS_GROUP = 4  # kinds that a group buys
N_KINDS_USER = 2  # kinds that a user likes, of the group's
OPENERS = ("A fine", "A handy", "A simple", "A well made", "An honest", "A solid", "A light", "A neat")
CLOSERS = (
    "Easy to clean .", "Ships in two days .", "Made in small series .", "Comes in a gift box .", "With two years of warranty .",
    "Packed without plastic .", "Designed to last .", "Spare parts available .",
)  # fmt: skip
FIRST_NAMES = (
    "Ada", "Ben", "Carla", "Dino", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Liam", "Mina", "Noor", "Otto", "Pia",
    "Quinn", "Rosa", "Sven", "Tara", "Umar", "Vera", "Wim", "Xenia", "Yara", "Zoe",
)  # fmt: skip
LAST_NAMES = (
    "Abel", "Brandt", "Costa", "Diaz", "Engel", "Fischer", "Gomez", "Haas", "Ito", "Jansen", "Keller", "Lopez", "Meyer", "Novak",
    "Okafor", "Peters", "Quist", "Rossi", "Sato", "Tanaka", "Ueda", "Vogel", "Weber", "Xu", "Young", "Zeller",
)  # fmt: skip
REVIEWS = {
    1: ("Not for me , the {word} {attribute} disappoints", "The {word} {attribute} was a mistake"),
    2: ("The {word} {attribute} is a pity", "I expected more of the {word} {attribute}"),
    3: ("The {word} {attribute} is fine", "Nothing wrong with the {word} {attribute}"),
    4: ("I like the {word} {attribute}", "Good choice thanks to the {word} {attribute}"),
    5: ("I love the {word} {attribute}", "The {word} {attribute} is just perfect"),
}
HEADLINES = {
    1: ("Very poor", "Sent it back"),
    2: ("Not great", "Could be better"),
    3: ("It is okay", "Does the job"),
    4: ("Good buy", "Quite happy"),
    5: ("Wonderful", "Best buy ever"),
}

# Strength of each signal: log odds of an item that has it against one that has not.
WEIGHTS = {"favourite": 2.0, "order": 2.0, "second": 1.5, "own": 1.5, "also": 1.5, "kind": 2.5, "circle": 0.7}
POPULARITY = 0.6  # log odds: half the span between the most and the least popular item
STYLE = 0.7  # probability that a textual attribute repeats the index of its visual partner; else uniform
COLD_SHARE = 0.15  # share of items that arrive last
NOVELTY = 1.2  # log odds of a new arrival against an old item, in the last two interactions of a user
START, SPAN, LATE = 1_704_067_200, 366 * 86_400, 0.9  # first second of 2024, its seconds, share of it before the new items arrive

BLOCK = 8192  # users drawn for at once

PICTURE_SIZE = 64
HUES = {"red": 0.0, "orange": 28.0, "yellow": 55.0, "green": 125.0, "blue": 218.0, "purple": 285.0}  # degrees


@dataclass(frozen=True)
class Shop:
    """Tables and truth of one shop; `items`, `users` and `interactions` are what is written to the atomic files."""

    seed: int
    items: pd.DataFrame
    users: pd.DataFrame
    interactions: pd.DataFrame  # rows in random order: order of appearance must tell nothing
    attributes: np.ndarray  # [I, 6] value index of each attribute, columns as ATTRIBUTES
    kind: np.ndarray  # [I] index in KINDS
    circle: np.ndarray  # [I]
    popularity: np.ndarray  # [I] weight, not log
    cold: np.ndarray  # [I] bool: arrives last
    group: np.ndarray  # [U]
    favourites: np.ndarray  # [G, N_FAVOURITES] lead values in the order of the wheel
    seconds: np.ndarray  # [G, N_FAVOURITES] liked values of the second attribute
    also: np.ndarray  # [G, 2, N_ALSO] liked values of the group's two further attributes
    own: np.ndarray  # [U] the value of the second attribute that the user likes best
    user_kinds: np.ndarray  # [U, N_KINDS_USER] the kinds each user likes
    user_circle: np.ndarray  # [U]
    user: np.ndarray = field(repr=False)  # [N] index of the user of each interaction, sorted by user, then time
    item: np.ndarray = field(repr=False)  # [N]


def _pick(rng: np.random.Generator, n: int, size) -> np.ndarray:
    """Uniform integers 0 .. n-1 made of uniform doubles."""
    return (rng.random(size) * n).astype(np.int64)


def _ranking(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """One random order of 0 .. n-1 per row."""
    return np.argsort(rng.random(shape), axis=1, kind="stable")


def _permutation(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.argsort(rng.random(n), kind="stable")


def make_shop(users: int = 1000, items: int = 1000, interactions: int = 20_000, seed: int = 2024, reviews: bool = True) -> Shop:
    """Draw a shop; same arguments, same shop. `reviews` adds the columns feature_word, summary and review."""
    if users < len(GROUPS) or items < 50:
        raise UserError(f"A shop needs at least {len(GROUPS)} users (one a taste group) and 50 items, got {users} users and {items} items.")
    mean = interactions / users
    if not 5 <= mean <= items / 4:
        raise UserError(
            f"A shop needs 5 to {items // 4} interactions per user on average (with more, users run out of items they like), got "
            f"{interactions:,} for {users:,} users. Change --interactions or --users."
        )
    rng = np.random.Generator(np.random.PCG64(seed))

    attributes = _pick(rng, N_VALUES, (items, len(ATTRIBUTES)))
    for attribute, partner in STYLE_PARTNER.items():
        follows = rng.random(items) < STYLE
        column = ATTRIBUTES.index(attribute)
        attributes[:, column] = np.where(follows, attributes[:, ATTRIBUTES.index(partner)], attributes[:, column])
    kind = _pick(rng, len(KINDS), items)
    circle = _pick(rng, N_CIRCLES, items)
    popularity = np.exp(POPULARITY * (rng.random(items) + rng.random(items) - 1))
    cold = np.zeros(items, bool)
    cold[_permutation(rng, items)[: int(round(COLD_SHARE * items))]] = True

    group = _permutation(rng, users) % len(GROUPS)
    favourites = np.stack([_permutation(rng, N_VALUES)[:N_FAVOURITES] for _ in GROUPS])
    seconds = np.stack([_permutation(rng, N_VALUES)[:N_FAVOURITES] for _ in GROUPS])
    also = np.stack([[_permutation(rng, N_VALUES)[:N_ALSO] for _ in range(2)] for _ in GROUPS])
    own = seconds[group, _pick(rng, N_FAVOURITES, users)]
    group_kinds = _ranking(rng, (len(GROUPS), len(KINDS)))[:, :N_KINDS_GROUP]
    user_kinds = np.take_along_axis(group_kinds[group], _ranking(rng, (users, N_KINDS_GROUP))[:, :N_KINDS_USER], axis=1)
    user_circle = _pick(rng, N_CIRCLES, users)

    # At least 5 interactions each (3 to train on), at most 3 times the mean; the mean is met up to rounding.
    extra = -np.log1p(-rng.random(users) * 0.95)
    length = np.floor(5 + extra * (mean - 5) / extra.mean() + rng.random(users)).astype(np.int64).clip(5, items // 3)

    user, item = _draw_histories(
        rng, attributes, kind, circle, popularity, cold, group, favourites, seconds, also, own, user_kinds, user_circle, length
    )
    timestamp = _draw_times(rng, length)
    rating = _draw_ratings(rng, user, item, attributes, circle, group, favourites, seconds, own, user_circle)

    item_tokens = np.char.add("i", (_permutation(rng, items) + 1).astype(str))
    user_tokens = np.char.add("u", (_permutation(rng, users) + 1).astype(str))
    table = pd.DataFrame({"user_id": user_tokens[user], "item_id": item_tokens[item], "rating": rating, "timestamp": timestamp})
    if reviews:
        _add_reviews(rng, table, user, item, attributes, group)
    names = [f"{FIRST_NAMES[a]} {LAST_NAMES[b]}" for a, b in zip(_pick(rng, 26, users), _pick(rng, 26, users))]
    shuffled = _permutation(rng, len(table))
    return Shop(
        seed=seed,
        items=_describe_items(rng, item_tokens, attributes, kind),
        users=pd.DataFrame({"user_id": user_tokens, "name": names}),
        interactions=table.iloc[shuffled].reset_index(drop=True),
        attributes=attributes, kind=kind, circle=circle, popularity=popularity, cold=cold, group=group, favourites=favourites,
        seconds=seconds, also=also, own=own, user_kinds=user_kinds, user_circle=user_circle, user=user, item=item,
    )  # fmt: skip


def _draw_histories(
    rng, attributes, kind, circle, popularity, cold, group, favourites, seconds, also, own, user_kinds, user_circle, length
) -> tuple[np.ndarray, np.ndarray]:
    """Return (user, item) of every interaction, sorted by user, then step.

    Within a group the utility of an item depends on the user only through its cell (lead value, second value, circle, kind), so a step draws
    the cell of every user at once and then an item within the cell by popularity, again if the user owns it: exactly the softmax over all
    items, at any size. `BLOCK` users at a time bound the memory.
    """
    n_users, n_cells = len(group), N_VALUES * N_VALUES * N_CIRCLES * len(KINDS)
    first = np.concatenate([[0], np.cumsum(length)])
    bought = np.full(first[-1], -1, np.int64)

    lead_value, second_value, cell_circle, cell_kind = np.unravel_index(np.arange(n_cells), (N_VALUES, N_VALUES, N_CIRCLES, len(KINDS)))
    for g in range(len(GROUPS)):
        members = np.flatnonzero(group == g)
        a, b = attributes[:, LEADS[g]], attributes[:, SECONDS[g]]
        liked = sum(np.isin(attributes[:, column], values).astype(float) for column, values in zip(OTHERS[g], also[g]))
        appeal = popularity * np.exp(WEIGHTS["also"] * liked)
        phases = (np.where(cold, 0.0, appeal), np.where(cold, appeal * np.exp(NOVELTY), appeal))
        cell = ((a * N_VALUES + b) * N_CIRCLES + circle) * len(KINDS) + kind
        order = np.argsort(cell, kind="stable")
        start = np.searchsorted(cell[order], np.arange(n_cells + 1))
        running = [np.concatenate([[0.0], np.cumsum(weight[order])]) for weight in phases]
        mass = [r[start[1:]] - r[start[:-1]] for r in running]

        wheel = np.full(N_VALUES, -1)  # successor of a favourite lead value; after another value every favourite is as good
        wheel[favourites[g]] = np.roll(favourites[g], -1)
        taste = WEIGHTS["favourite"] * np.isin(lead_value, favourites[g]) + WEIGHTS["second"] * np.isin(second_value, seconds[g])

        last = np.full(len(members), -1)
        for step in range(length[members].max()):
            going = np.flatnonzero(length[members] > step)
            for active in np.split(going, range(BLOCK, len(going), BLOCK)):
                who = members[active]
                late = length[who] - step <= 2
                utility = np.exp(
                    taste[None]
                    + WEIGHTS["order"] * ((last[active, None] >= 0) & (wheel[last[active]][:, None] == lead_value[None]))
                    + WEIGHTS["own"] * (own[who, None] == second_value[None])
                    + WEIGHTS["circle"] * (user_circle[who, None] == cell_circle[None])
                    + WEIGHTS["kind"] * (user_kinds[who][:, :, None] == cell_kind).any(1)
                )
                weights = np.cumsum(utility * np.where(late[:, None], mass[1][None], mass[0][None]), axis=1)
                chosen = np.full(len(active), -1, np.int64)
                open_ = np.arange(len(active))
                while len(open_):
                    drawn = (weights[open_] <= (rng.random(len(open_)) * weights[open_, -1])[:, None]).sum(1).clip(max=n_cells - 1)
                    r = rng.random(len(open_))
                    for phase in (0, 1):
                        rows = np.flatnonzero(late[open_] == phase)
                        target = running[phase][start[drawn[rows]]] + r[rows] * mass[phase][drawn[rows]]
                        place = np.searchsorted(running[phase], target, side="right") - 1
                        chosen[open_[rows]] = order[np.clip(place, start[drawn[rows]], start[drawn[rows] + 1] - 1)]
                    owned = np.zeros(len(open_), bool)
                    for back in range(step):
                        owned |= bought[first[who[open_]] + back] == chosen[open_]
                    open_ = open_[owned]
                bought[first[who] + step] = chosen
                last[active] = a[chosen]
    return np.repeat(np.arange(n_users), length), bought


def _draw_times(rng, length) -> np.ndarray:
    """Seconds, strictly rising per user; the last two of each user lie after the new items arrived, all others before."""
    first = np.concatenate([[0], np.cumsum(length)])[:-1]
    step = np.arange(length.sum()) - np.repeat(first, length)
    late = np.repeat(length, length) - step <= 2
    moment = rng.random(length.sum())
    moment = np.where(late, LATE + (1 - LATE) * moment, LATE * moment)
    by_time = np.lexsort((moment, np.repeat(np.arange(len(length)), length)))
    return START + (moment[by_time] * (SPAN - 200)).astype(np.int64) + step.clip(max=199)


def _draw_ratings(rng, user, item, attributes, circle, group, favourites, seconds, own, user_circle) -> np.ndarray:
    """1 to 5: how well the item fits the user, order left aside, with noise."""
    lead, second = LEADS[group[user]], SECONDS[group[user]]
    a, b = attributes[item, lead], attributes[item, second]
    score = (
        1.6
        + 1.3 * (favourites[group[user]] == a[:, None]).any(1)
        + 0.8 * (seconds[group[user]] == b[:, None]).any(1)
        + 0.6 * (own[user] == b)
        + 0.4 * (user_circle[user] == circle[item])
    )
    noise = rng.random(len(user)) + rng.random(len(user)) - 1
    return np.rint(score + noise).clip(1, 5).astype(np.int64)


def _add_reviews(rng, table, user, item, attributes, group) -> None:
    """Columns feature_word (the item's value of the group's lead attribute), summary (without it) and review (with it)."""
    lead = LEADS[group[user]]
    value = attributes[item, lead]
    rating = table["rating"].to_numpy()
    variant = _pick(rng, 2, (2, len(user)))
    words = np.array([VALUES[a] for a in ATTRIBUTES])
    sentences = np.array(
        [[[[t.format(word=w, attribute=a) for t in REVIEWS[stars]] for stars in range(1, 6)] for w in VALUES[a]] for a in ATTRIBUTES]
    )
    table["feature_word"] = words[lead, value]
    table["summary"] = np.array([HEADLINES[stars] for stars in range(1, 6)])[rating - 1, variant[0]]
    table["review"] = sentences[lead, value, rating - 1, variant[1]]


def _describe_items(rng, tokens, attributes, kind) -> pd.DataFrame:
    """Titles name brand and kind; material and occasion stand in the description."""
    n = len(tokens)
    material, occasion, brand = (np.array(VALUES[a])[attributes[:, ATTRIBUTES.index(a)]] for a in TEXTUAL)
    noun = np.array(KINDS)[kind]
    number = 100 + _pick(rng, 900, n)
    opener, closer = np.array(OPENERS)[_pick(rng, len(OPENERS), n)], np.array(CLOSERS)[_pick(rng, len(CLOSERS), n)]
    title = [f"{b} {x} {k}" for b, x, k in zip(brand, noun, number)]
    description = [f"{o} {m} {x} by {b} for {c} days . {z}" for o, m, x, b, c, z in zip(opener, material, noun, brand, occasion, closer)]
    return pd.DataFrame(
        {
            "item_id": tokens,
            "title": title,
            "description": description,
            "brand": brand,
            "categories": [f"Home {CATEGORY[x]} {x.capitalize()}" for x in noun],
        }
    )


def draw_pictures(attributes: np.ndarray, kind: np.ndarray, seed: int, size: int = PICTURE_SIZE) -> np.ndarray:
    """Pictures [n, size, size, 3] uint8 of items with these attributes and kinds: one object in its colour, pattern and shape on the pale
    ground of its kind.

    Place, size, turn, shade and noise vary from item to item. Each picture depends on the seed and its row number only.
    """
    n = len(attributes)
    jitter = np.random.Generator(np.random.PCG64([seed, 1])).random((n, 12))
    grain = np.random.Generator(np.random.PCG64([seed, 3]))
    pictures = np.empty((n, size, size, 3), np.uint8)
    fine = 2 * size  # drawn at twice the size and averaged: smooth edges
    y, x = (np.mgrid[:fine, :fine] + 0.5) / fine * 2 - 1
    for row in range(n):
        colour, pattern, shape = (VALUES[name][attributes[row, ATTRIBUTES.index(name)]] for name in VISUAL)
        u = jitter[row]
        angle, scale = np.deg2rad(16 * (u[0] - 0.5)), 0.78 + 0.16 * u[1]
        px, py = x - 0.24 * (u[2] - 0.5), y - 0.24 * (u[3] - 0.5)
        px, py = (px * np.cos(angle) + py * np.sin(angle)) / scale, (py * np.cos(angle) - px * np.sin(angle)) / scale
        inside = _inside(shape, px, py)
        dark = _ink(pattern, px, py, u[4])

        base = _rgb(HUES[colour] + 12 * (u[5] - 0.5), 0.75 + 0.2 * u[6], 0.78 + 0.17 * u[7])
        ground = 0.86 + 0.1 * u[8] + 0.06 * np.array([u[9], u[10], u[11]]) - 0.03
        texture, tone = _setting(int(kind[row]), x, y, u[4])
        ground = np.where(texture[..., None], tone * ground, ground)
        image = np.where(inside[..., None], np.where(dark[..., None], 0.35 * base, base), ground)
        image = image.reshape(size, 2, size, 2, 3).mean((1, 3))
        image += 0.03 * (grain.random((size, size, 1)) - 0.5)
        pictures[row] = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    return pictures


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bool mask of the outline; every shape covers about half of the square."""
    r = np.hypot(x, y)
    if shape == "round":
        return r < 0.8
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.71
    if shape == "triangular":
        return (y < 0.75) & (y > 2 * abs(x) - 0.95)
    if shape == "crossed":
        return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.92)
    if shape == "ringed":
        return (r < 0.92) & (r > 0.45)
    return r < 0.62 + 0.33 * np.cos(5 * np.arctan2(x, -y))  # starry


def _ink(pattern: str, x: np.ndarray, y: np.ndarray, phase: float) -> np.ndarray:
    """Bool mask of the dark part of a pattern, before it is cut to the outline."""
    width = 0.32

    def bands(z):
        return ((z + phase * width) % width) < 0.4 * width

    if pattern == "plain":
        return np.zeros_like(x, bool)
    if pattern == "striped":
        return bands(y)
    if pattern == "ribbed":
        return bands(x)
    if pattern == "checked":
        return bands(x) ^ bands(y)
    if pattern == "slanted":
        return bands((x + y) * 0.7071)
    cx, cy = (x + phase * width) % width - width / 2, (y + phase * width) % width - width / 2
    return np.hypot(cx, cy) < 0.3 * width  # dotted


def _setting(kind: int, x: np.ndarray, y: np.ndarray, phase: float) -> tuple[np.ndarray, np.ndarray]:
    """Ground on which things of this kind are shown: where its boards, laths, tiles, weave or dots are, and their tone."""
    width = 0.25
    across, along = ((x / width + phase) % 1) < 0.4, ((y / width + phase) % 1) < 0.4
    weave = (((x + y) * 0.7071 / width + phase) % 1) < 0.4
    dots = np.hypot((x / width + phase) % 1 - 0.5, (y / width + phase) % 1 - 0.5) < 0.36
    texture = (along, across, along | across, weave, dots)[kind % 5]
    return texture, _rgb(360 / len(KINDS) * kind, 0.35, 0.85)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV (hue in degrees) to RGB in 0 .. 1."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def planted_features(shop: Shop, width: int = 128) -> dict[str, np.ndarray]:
    """Feature tables [I, width] float16 per modality in place of pictures and texts: attributes mixed by a random matrix, with noise."""
    rng = np.random.Generator(np.random.PCG64([shop.seed, 2]))

    def normal(*shape):
        """Nearly normal numbers (sums of four uniform ones), which are the same with every version of NumPy."""
        return sum(rng.random(shape, dtype=np.float32) for _ in range(4)) * np.float32(3**0.5) - np.float32(2 * 3**0.5)

    tables = {}
    for modality, names in (("textual", TEXTUAL), ("visual", VISUAL)):
        mixing = normal(len(names), N_VALUES, width)
        table = 0.7 * normal(len(shop.attributes), width) + normal(len(KINDS), width)[shop.kind]
        for k, name in enumerate(names):
            table += mixing[k, shop.attributes[:, ATTRIBUTES.index(name)]]
        tables[modality] = (table / np.float32((len(names) + 1) ** 0.5)).astype(np.float16)
    return tables


TYPES = {
    "user_id": "token", "item_id": "token", "rating": "float", "timestamp": "float", "feature_word": "token", "summary": "token_seq",
    "review": "token_seq", "name": "token_seq", "title": "token_seq", "description": "token_seq", "brand": "token",
    "categories": "token_seq",
}  # fmt: skip


def write_shop(shop: Shop, folder: Path, name: str | None = None, pictures: bool = True) -> None:
    """Write atomic files, ``truth.npz`` and pictures (or feature tables in their place) into `folder`."""
    folder = Path(folder)
    name = name or folder.name
    for suffix, table in (("inter", shop.interactions), ("item", shop.items), ("user", shop.users)):
        with atomic_path(folder / f"{name}.{suffix}") as path:
            table.rename(columns=lambda c: f"{c}:{TYPES[c]}").to_csv(path, sep="\t", index=False)
    with atomic_path(folder / "truth.npz") as path:
        np.savez_compressed(
            path,
            version=VERSION,
            seed=shop.seed,
            item_tokens=shop.items["item_id"].to_numpy(str),
            user_tokens=shop.users["user_id"].to_numpy(str),
            attribute_names=np.array(ATTRIBUTES),
            value_names=np.array([VALUES[a] for a in ATTRIBUTES]),
            attributes=shop.attributes.astype(np.int8),
            kind_names=np.array(KINDS),
            kind=shop.kind.astype(np.int8),
            circle=shop.circle.astype(np.int8),
            popularity=shop.popularity.astype(np.float32),
            cold=shop.cold,
            group=shop.group.astype(np.int8),
            group_lead=LEADS.astype(np.int8),
            group_second=SECONDS.astype(np.int8),
            group_others=OTHERS.astype(np.int8),
            also=shop.also.astype(np.int8),
            favourites=shop.favourites.astype(np.int8),
            seconds=shop.seconds.astype(np.int8),
            own=shop.own.astype(np.int8),
            user_kinds=shop.user_kinds.astype(np.int8),
            user_circle=shop.user_circle.astype(np.int8),
        )
    if pictures:
        from PIL import Image

        (folder / "images").mkdir(exist_ok=True)
        for token, pixels in zip(shop.items["item_id"], draw_pictures(shop.attributes, shop.kind, shop.seed)):
            with atomic_path(folder / "images" / f"{token}.jpg") as path:
                Image.fromarray(pixels).save(path, quality=80)
    else:
        for modality, table in planted_features(shop).items():
            with atomic_path(folder / f"{modality}.npy") as path:
                np.save(path, table)
        with atomic_path(folder / "item_ids.txt") as path:
            path.write_text("\n".join(shop.items["item_id"]) + "\n", encoding="utf-8")
    write_json(
        folder / "shop.json",
        {
            "generator": "recbole_mm.data.synthetic",
            "version": VERSION,
            "seed": shop.seed,
            "users": len(shop.users),
            "items": len(shop.items),
            "interactions": len(shop.interactions),
            "cold_items": int(shop.cold.sum()),
            "pictures": pictures,
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """``recbole-mm synthetic``: write a shop of any size."""
    parser = argparse.ArgumentParser(prog="recbole-mm synthetic", description="Write a sample shop with planted tastes.")
    parser.add_argument("--out", required=True, type=Path, help="folder of the dataset, e.g. dataset/shop; its name is the dataset's")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--interactions", type=int, help="default: 20 a user")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument(
        "--no-pictures", action="store_true", help="no pictures and reviews but ready feature tables (128 columns): for benchmark sizes"
    )
    args = parser.parse_args(arguments)
    interactions = 20 * args.users if args.interactions is None else args.interactions
    shop = make_shop(args.users, args.items, interactions, args.seed, reviews=not args.no_pictures)
    write_shop(shop, args.out, pictures=not args.no_pictures)
    print(json.dumps({"folder": str(args.out), "users": args.users, "items": args.items, "interactions": len(shop.interactions)}))
    return 0
