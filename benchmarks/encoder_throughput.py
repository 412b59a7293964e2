"""Extraction with ViT-B/16 at 224 pixels against a plain fp32 open_clip loop and against the model's pure forward rate.

    python benchmarks/encoder_throughput.py [--pictures 1536] [--plain 96] [--model ViT-B-16] [--out benchmarks/results/encoder_throughput.json]

Random weights (speed does not depend on them); the shop's pictures, each written several times with another margin so that none is a
duplicate. All parts run in this process on the same data, with the same number of decoding workers:

* plain: ``open_clip.create_model``, its own transform in a torch DataLoader, fp32 weights, the faster of batches of 16 and of 32;
* forward: open_clip's own ``encode_image``, its weights in the precision that ``extract`` chooses, on batches that are already prepared,
  before and after; the fastest of batches of 8, 16 and 32;
* own forward: our encoder on such batches, at the batch size of ``extract``;
* extract: `recbole_mm.encoder.extract.extract`, files in, feature set out.

Prints pictures per second, the ratios, and the smallest cosine between the features of extract and those in fp32.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from recbole_mm.config import Config
from recbole_mm.encoder import build_encoder
from recbole_mm.encoder.extract import batch_size, choose_precision, encoder_settings, extract
from recbole_mm.files import write_json, write_text
from recbole_mm.memory import keep_freed_memory
from recbole_mm.paths import bundled_dataset_dir


def make_dataset(folder: Path, pictures: int) -> list[Path]:
    """`pictures` different JPEG files of 224 pixels from the shop's, and the item file that names them."""
    source = sorted((bundled_dataset_dir() / "shop" / "images").glob("*.jpg"))
    (folder / "images").mkdir(parents=True)
    paths = []
    for i in range(pictures):
        copy, which = divmod(i, len(source))
        image = Image.open(source[which]).convert("RGB").resize((224 + 8 * copy, 224 + 8 * copy), Image.Resampling.BICUBIC)
        paths.append(folder / "images" / f"p{i}.jpg")
        image.save(paths[-1], quality=90)
    write_text(folder / f"{folder.name}.inter", "user_id:token\titem_id:token\nu1\tp0\n")
    return paths


class Pictures(Dataset):
    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(Image.open(self.paths[i]))


def plain_loop(name: str, paths: list[Path], workers: int, batch: int) -> float:
    """What a user would write with open_clip: seconds per picture after the first batch."""
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=None)
    torch.manual_seed(2020)
    loader = DataLoader(Pictures(paths, transform), batch_size=batch, num_workers=workers)
    model.eval()
    count, begin = 0, None
    with torch.no_grad():
        for images in loader:
            model.encode_image(images)
            if begin is None:
                begin = time.perf_counter()  # starting workers and warming up do not count
            else:
                count += len(images)
    return (time.perf_counter() - begin) / count


@torch.inference_mode()
def forward_rate(encode, dtype: torch.dtype, batch: int, seconds: float) -> float:
    """Pictures per second of the network alone."""
    images = torch.randn(batch, 3, 224, 224, dtype=dtype)
    encode(images)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        encode(images)
        count += batch
    return count / (time.perf_counter() - begin)


@torch.inference_mode()
def fp32_features(config, paths: list[Path]) -> torch.Tensor:
    """Features of some pictures with the same random weights in full precision."""
    torch.manual_seed(config["seed"])
    encoder = build_encoder(config["encoder"], encoder_settings(config)).eval()
    return torch.cat([encoder.encode(images=torch.stack([encoder.preprocess(Image.open(p)) for p in paths]))["visual"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1536)
    parser.add_argument("--plain", type=int, default=96, help="pictures for the plain loop, which is slow")
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batch", type=int, help="of extract; by default its own choice")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "encoder_throughput.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    workers = min(os.cpu_count() or 1, 8)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "many"
        paths = make_dataset(folder, args.pictures)
        given = {"dataset": "many", "data_path": root, "use_gpu": False, "encoder": "clip", "encoder_model": args.model, "pretrained": None}
        config = Config("BPR", config_dict={**given, "modalities": ["visual"], "encoder_batch_size": args.batch})

        keep_freed_memory()  # as extract does; all parts profit
        encoder = build_encoder("clip", encoder_settings(config)).eval()
        dtype = torch.bfloat16 if choose_precision(encoder, None, torch.device("cpu")) == "bf16" else torch.float32
        encoder.to(dtype)
        batch = batch_size(args.batch, "visual", torch.device("cpu"))
        model = open_clip.create_model(args.model, pretrained=None).eval().to(dtype)

        def forwards() -> list[float]:
            own = forward_rate(lambda images: encoder.encode(images=images), dtype, batch, 5)
            return [own, *(forward_rate(model.encode_image, dtype, size, 5) for size in (8, 16, 32))]

        before = forwards()
        begin = time.perf_counter()
        made = extract(config, progress=False)
        spent = time.perf_counter() - begin
        after = forwards()  # before and after: a shared processor's speed changes within minutes
        meta = json.loads((made / "meta.json").read_text())
        rows = np.load(made / "visual.npy")
        order = {token: i for i, token in enumerate((made / "item_ids.txt").read_text().split())}

        own, *by_size = [sum(pair) / 2 for pair in zip(before, after)]
        forward = max(by_size)
        plains = [1 / plain_loop(args.model, paths[: args.plain], workers, size) for size in (16, 32)]
        plain = max(plains)

        exact = fp32_features(config, paths[:32])
        ours = torch.from_numpy(rows[[order[p.stem] for p in paths[:32]]])
        cosine = torch.nn.functional.cosine_similarity(exact, ours).min().item()
    rate = args.pictures / spent
    result = {
        "model": args.model, "pictures": args.pictures, "threads": torch.get_num_threads(), "workers": workers,
        "amx": torch.cpu._is_amx_tile_supported(), "avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "precision": meta["precision"],
        "batch": batch, "extract_per_s": round(rate, 2), "own_forward_per_s": round(own, 2), "own_forward_before_after": [round(before[0], 2), round(after[0], 2)],
        "open_clip_forward_per_s": round(forward, 2), "open_clip_forward_by_batch_8_16_32": [round(r, 2) for r in by_size],
        "plain_fp32_per_s": round(plain, 2), "plain_fp32_by_batch_16_32": [round(r, 2) for r in plains], "extract_over_plain": round(rate / plain, 2),
        "extract_over_open_clip_forward": round(rate / forward, 3), "extract_over_own_forward": round(rate / own, 3), "min_cosine_to_fp32": round(cosine, 6),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    write_json(args.out, result)


if __name__ == "__main__":
    main()
