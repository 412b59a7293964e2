"""Speed of the graph models as ratios to RecBole's LightGCN epoch, their floors, and what each means of propagating costs.

    python benchmarks/graph_speed.py --data=../shared/data --repetitions=5            # ratios, floors, operators
    python benchmarks/graph_speed.py --data=../shared/data --profile                  # profiles before and after, in results/

Every repetition runs all variants one after the other; ratios are formed within a repetition. RecBole's side is RecBole's own loop (see speed.py): LightGCN, 2 layers, d 64,
batch 2048, on tiktok. Ours are the models with their published sizes (SLMRec, MMGCL: 3 layers; MMGCN: 3 layers, visual width 256; LATTICE: 2 + 1 layers, k 10; MMGCL draws new
graphs for every batch).

The floor of a model is the larger of (floating point operations of its products / measured matmul rate) and (bytes its operations read and write / measured copy bandwidth),
counted over one epoch's batches as they run.

"before" in the profiles is the same mathematics done plainly: torch.sparse COO with autograd's backward, every channel propagated in full for all rows, softmax over all pairs
of the batch by cross entropy.
"""

import argparse
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from speed import epoch, our_side, recbole_side
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_mm.files import write_json, write_text
from recbole_mm.layer import contrastive, fusion, graph
from recbole_mm.model import mmgcl, slmrec

SIZES = {
    "SLMRec": {"n_layers": 3},
    "MMGCN": {"n_layers": 3},
    "LATTICE": {"n_layers": 1, "n_ui_layers": 2},
    "MMGCL": {"n_layers": 3, "resample": "batch"},
}
TARGETS = {"SLMRec": 3, "MMGCN": 6, "LATTICE": 2, "MMGCL": 8}
REFERENCE = {"SLMRec": 5.4, "MMGCN": 11.4, "LATTICE": 15.3}  # the published implementations, from the project's issue
RESULTS = Path(__file__).resolve().parent / "results"


CLOCK = time.perf_counter


def seconds(function) -> float:
    """Time of one call by the chosen clock."""
    begin = CLOCK()
    function()
    return CLOCK() - begin


class Counter(TorchDispatchMode):
    """Counts operations of products and bytes that operations read and write; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.flop = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        returned = function._schema.returns
        if returned and returned[0].alias_info is not None and not returned[0].alias_info.is_write:
            return out
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        self.bytes += sum(self._size(x) for x in tensors)
        name = function._schema.name
        if name in ("aten::mm", "aten::addmm"):
            a, b = args[-2:] if name == "aten::mm" else args[1:3]
            sparse = a.layout != torch.strided
            self.flop += 2 * (a._nnz() if sparse else a.shape[0] * a.shape[1]) * b.shape[1]
        return out

    @staticmethod
    def _size(x) -> int:
        if x.layout == torch.strided:
            return x.numel() * x.element_size()
        return x._nnz() * (x.dtype.itemsize + 8) if x.layout in (torch.sparse_csr, torch.sparse_coo) else 0


def rates() -> tuple[float, float]:
    """Measured float operations per second of a matmul, and bytes per second of a copy (read and write)."""
    a, b = torch.randn(8192, 256), torch.randn(256, 256)
    matmul = min(seconds(lambda: a @ b) for _ in range(20))
    x, y = torch.randn(1 << 25), torch.empty(1 << 25)
    copy = min(seconds(lambda: y.copy_(x)) for _ in range(10))
    return 2 * 8192 * 256 * 256 / matmul, 2 * 4 * (1 << 25) / copy


def floor(side, flop_rate: float, byte_rate: float) -> dict:
    """Operations and bytes of one epoch, and the time no implementation of the same operations can undercut."""
    trainer, train, _ = side
    with Counter() as counted:
        trainer._train_epoch(train, 0)
    return {
        "gflop": counted.flop / 1e9,
        "gbyte": counted.bytes / 1e9,
        "flop_s": counted.flop / flop_rate,
        "bytes_s": counted.bytes / byte_rate,
        "floor_s": max(counted.flop / flop_rate, counted.bytes / byte_rate),
    }


def operators(data: str, dim: int = 64, repetitions: int = 15) -> dict[str, float]:
    """Forward and backward of one propagation step on amazon-baby's graph, milliseconds (fastest of the repetitions)."""
    import numpy as np
    from torch_geometric import EdgeIndex

    pairs = np.loadtxt(f"{data}/amazon-baby/amazon-baby.train.inter", skiprows=1, dtype=np.int64) + 1
    n, m = pairs[:, 0].max() + 1, pairs[:, 1].max() + 1
    bipartite = graph.BipartiteGraph(torch.from_numpy(pairs[:, 0]), torch.from_numpy(pairs[:, 1]), int(n), int(m))
    operator = bipartite.operator("sym")
    index, value = operator.to_coo()
    coo = torch.sparse_coo_tensor(index, value, (n + m, n + m)).coalesce()
    matrix = coo.to_sparse_csr()
    edges = EdgeIndex(index, sparse_size=(int(n + m), int(n + m)), sort_order="row", is_undirected=True).fill_cache_()
    x = torch.randn(n + m, dim, requires_grad=True)
    grad = torch.randn(n + m, dim)

    def step(product):
        def run():
            x.grad = None
            product().backward(grad)

        return run

    variants = {
        "torch.sparse COO": step(lambda: torch.sparse.mm(coo, x)),
        "torch.sparse CSR, autograd's backward": step(lambda: matrix @ x),
        "symmetric CSR operator (layer/graph.py)": step(lambda: graph.SparseOperator(matrix, matrix)(x)),
        "two bipartite blocks (layer/graph.py, used)": step(lambda: torch.cat(operator(x[:n], x[n:]))),
        "torch-geometric EdgeIndex, undirected": step(lambda: edges.matmul(x, input_value=value)),
    }
    times = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, function in variants.items():
            times[name].append(seconds(function) * 1e3)
    return {name: min(t) for name, t in times.items()}


@contextlib.contextmanager
def plainly():
    """The same mathematics without any of the savings."""

    def coo_product(self, x):
        if not hasattr(self, "_coo"):
            self._coo = self.matrix.to_sparse_coo().coalesce()
        return torch.sparse.mm(self._coo, x)

    class AllRows:
        """Every row computed, the wanted ones taken."""

        def __init__(self, operator, index):
            self.operator, self.index, self.matrix = operator, index, operator.matrix

        def __call__(self, x):
            return self.operator(x)[self.index]

    def every_channel(operator, users, items, n_layers, user_rows=None, item_rows=None):
        u, i = graph.lightgcn(operator, users.repeat(1, items.shape[1] // users.shape[1]), items, n_layers)
        return graph.pick(u, user_rows), graph.pick(i, item_rows)

    def all_pairs(anchors, keys, temperature, anchor_of, key_of, extra=None, distinct=False, key_ids=None):
        a, k = anchors[anchor_of], keys if distinct else keys[key_of]
        logits = a @ k.T / temperature
        if extra is not None:
            logits = torch.cat([logits, extra[:, None] / temperature], 1)
        return torch.nn.functional.cross_entropy(logits, key_of if distinct else torch.arange(len(a)))

    def propagate_features(self, user_rows=None, item_rows=None):
        return fusion.ChannelEncoder.forward(self.encoder, self.operator, self.n_layers, None, user_rows, item_rows)

    def unit(x):
        return torch.nn.functional.normalize(x, dim=1)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (graph.SparseOperator, "__call__", coo_product),
            (graph.SparseOperator, "rows", lambda operator, index: AllRows(operator, index)),
            (fusion, "lightgcn_shared_users", every_channel),
            (fusion.FixedGraphEncoder, "__call__", propagate_features),
            (contrastive, "info_nce", all_pairs),
            (slmrec, "info_nce", all_pairs),
            (mmgcl, "info_nce", all_pairs),
            (graph, "unit_rows", unit),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def profiles(data: str, folder: str, batches: int) -> str:
    """Time by operation before and after, as Markdown."""
    from torch.profiler import ProfilerActivity, profile

    sections = ["# Profiles before and after", "", f"{batches} batches of tiktok, {torch.get_num_threads()} thread(s), {date.today().isoformat()}; see graph_speed.py for what", "\"before\" means."]  # fmt: skip
    for model in SIZES:
        for name, context in (("before", plainly), ("after", contextlib.nullcontext)):
            with context():
                trainer, train, _ = our_side(model, data, folder, **SIZES[model])
                some = [batch for _, batch in zip(range(batches + 1), train)]
                trainer._train_epoch(some[:1], 0)
                begin = time.process_time()
                trainer._train_epoch(some[1:], 0)
                spent = (time.process_time() - begin) / batches
                with profile(activities=[ProfilerActivity.CPU]) as recorded:
                    trainer._train_epoch(some[1:], 0)
            table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=36)
            columns = "\n".join(line[: line.find("CPU total %")] if "CPU total %" in line else line[:68] for line in table.splitlines())
            sections += ["", f"## {model}, {name}: {spent * 1e3:.0f} ms of processor time a batch", "", "```", columns, "```"]
    return "\n".join(sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("RECBOLE_MM_DATA", "../shared/data"))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--batches", type=int, default=0, help="time so many prepared batches instead of epochs (both sides; without loaders and sampling)"
    )
    parser.add_argument("--busy", action="store_true", help="on a machine with other work: one thread, processor time instead of wall time")
    arguments = parser.parse_args()
    if arguments.busy:
        global CLOCK
        CLOCK, arguments.threads = time.process_time, 1
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.profile:
            text = profiles(arguments.data, folder, arguments.batches or 8)
            write_text(RESULTS / "graph_profile.md", text)
            print(text)
            return
        sides = {model: our_side(model, arguments.data, folder, **settings) for model, settings in SIZES.items()}
        lightgcn, share = recbole_side("LightGCN", arguments.data, folder), 1.0
        if arguments.batches:
            share = arguments.batches / len(lightgcn[1])
            lightgcn, *ours = [(t, [b for _, b in zip(range(arguments.batches), train)], v) for t, train, v in (lightgcn, *sides.values())]
            sides = dict(zip(sides, ours))
        trainer, _, valid = sides["LATTICE"]
        variants = {"RecBole LightGCN": epoch(lightgcn)}
        for model, side in sides.items():
            variants[model] = epoch(side)
            if model == "LATTICE":  # right after an epoch, so that its neighbours are searched anew
                variants["LATTICE evaluation"] = lambda: trainer.evaluate(valid, load_best_model=False)
        times = {name: [] for name in variants}
        for repetition in range(arguments.repetitions + 1):
            for name, function in variants.items():
                spent = seconds(function)
                if repetition:  # the first round warms up
                    times[name].append(spent)
        flop_rate, byte_rate = rates()
        floors = {model: floor(side, flop_rate, byte_rate) for model, side in sides.items()}
        steps = operators(arguments.data)
    base = times["RecBole LightGCN"]
    rows = []
    for name, measured in times.items():
        whole = share if name == "LATTICE evaluation" else 1.0  # an evaluation is compared with a whole epoch
        each = [a / b * whole for a, b in zip(measured, base)]
        target = 0.5 if name == "LATTICE evaluation" else TARGETS.get(name)
        reference = 4.6 if name == "LATTICE evaluation" else REFERENCE.get(name)
        rows.append(
            {"what": name, "target": target, "reference": reference, "median": statistics.median(each), "min": min(each), "max": max(each),
             "seconds": min(measured), "floor_s": floors.get(name, {}).get("floor_s")}
        )  # fmt: skip
    machine = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": os.getloadavg(), "torch": torch.__version__, "matmul_gflops": flop_rate / 1e9, "copy_gb_s": byte_rate / 1e9, "date": date.today().isoformat()}  # fmt: skip
    write_json(RESULTS / "graph_speed.json", {"machine": machine, "rows": rows, "times_s": times, "floors": floors, "operators_ms": steps})

    def show(value, digits=2):
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [
        "# Speed of the graph models", "",
        f"{f'{arguments.batches} prepared batches' if arguments.batches else 'Epochs'} on tiktok as ratios to RecBole's LightGCN, {machine['threads']} threads of {machine['cores']} cores (load {machine['load'][0]:.1f} at the end), {arguments.repetitions} interleaved repetitions, "
        f"{'processor time beside other work' if arguments.busy else 'wall time'}, torch {torch.__version__}, {machine['date']}. Measured matmul rate {flop_rate / 1e9:.0f} GFLOP/s, copy bandwidth {byte_rate / 1e9:.1f} GB/s. Repeat with `python benchmarks/graph_speed.py`.", "",
        "| | target | published code | median | min | max | fastest, s | floor, s | times the floor |", "|---|---|---|---|---|---|---|---|---|",
        *(f"| {r['what']} | {show(r['target'], 1)} | {show(r['reference'], 1)} | {r['median']:.2f} | {r['min']:.2f} | {r['max']:.2f} | {r['seconds']:.3f} | {show(r['floor_s'], 3)} | {show(r['seconds'] / r['floor_s'] if r['floor_s'] else None, 1)} |" for r in rows),
        "", "| an epoch | GFLOP | GB | by operations, s | by bytes, s |", "|---|---|---|---|---|",
        *(f"| {name} | {f['gflop']:.0f} | {f['gbyte']:.1f} | {f['flop_s']:.3f} | {f['bytes_s']:.3f} |" for name, f in floors.items()),
        "", "One propagation step, forward and backward, amazon-baby's graph, d 64:", "", "| | ms |", "|---|---|", *(f"| {name} | {t:.1f} |" for name, t in steps.items()),
    ]  # fmt: skip
    write_text(RESULTS / "graph_speed.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
