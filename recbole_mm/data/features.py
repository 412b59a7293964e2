"""Feature files: find, load, align to RecBole's item ids. (First version, so that everything above can run; DATA replaces it.)"""

from pathlib import Path

import numpy as np
import torch

from recbole_mm.errors import UserError, nearest

STANDARD = ("textual", "visual", "acoustic")


def load_features(config, dataset):
    root = Path(config["data_path"])
    folder = root
    name = config["feature_set"] or config["encoder"]
    if name:
        folder = root / "features" / name
    files = {p.stem: p for p in sorted(folder.glob("*.npy"))}
    for theirs, ours in (("image_feat", "visual"), ("text_feat", "textual")):
        if theirs in files:
            files[ours] = files.pop(theirs)
    order = [m for m in STANDARD if m in files] + [m for m in files if m not in STANDARD]
    wanted = config["modalities"] or order
    out = {}
    ids_file = folder / "item_ids.txt"
    tokens = dataset.field2id_token[dataset.iid_field]
    for modality in wanted:
        if modality not in files:
            raise UserError(f"Unknown modality {modality!r} in {folder}.{nearest(modality, files)} There are {', '.join(files) or 'none'}.")
        table = np.load(files[modality], mmap_mode="r", allow_pickle=False)
        ids = ids_file.read_text().split() if ids_file.is_file() else [str(i) for i in range(len(table))]
        row = {t: i for i, t in enumerate(ids)}
        at = np.array([row.get(str(t), -1) for t in tokens])
        x = np.zeros((len(tokens), table.shape[1]), np.float32)
        x[at >= 0] = table[at[at >= 0]]
        missing = at < 0
        missing[0] = False
        if missing.any():
            x[missing] = x[at >= 0].mean(0)
        out[modality] = torch.from_numpy(x)
    return out
