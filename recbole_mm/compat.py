"""Adaptations that let RecBole 1.2.1 run unchanged on current NumPy, SciPy, pandas, PyTorch and setuptools, and without ray.

RecBole's last release is of 2023 (its issue 2215 asks for today's libraries). Each function below adapts one thing and says what breaks
without it and why. `apply` arranges that a function runs when the RecBole module that it concerns is imported, so ``import recbole_mm``
costs nothing by itself. Nothing here changes a result, and nothing reaches beyond RecBole, with two exceptions that RecBole itself needs:
the old names that RecBole's own Config puts into NumPy, and one private method of SciPy's ``dok_matrix``.
"""

import collections
import contextlib
import functools
import importlib
import importlib.abc
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path

from recbole_mm.errors import UserError

INSTALL_RECBOLE = "pip install --no-deps recbole==1.2.1"


class MissingRecBole(UserError, ImportError):
    """RecBole is not installed. Both a UserError (the command line prints it) and an ImportError (``try: import recbole`` still works)."""


def numpy_aliases(module: types.ModuleType) -> None:
    """``Config.compatibility_settings`` reads ``np.float_`` and ``np.unicode_``, which NumPy 2.0 removed (RecBole issues 1604, 2215).

    RecBole's other modules read ``np.float`` and its like, which that method puts into NumPy. This sets the same names to the same types;
    names that the installed NumPy has again (``np.bool``, ``np.long``) stay as they are. They are set on import, so that ``Interaction``
    and the metrics work before the first Config, as they did with the NumPy of 2021.
    """
    import numpy as np

    types_of_names = {
        "bool": np.bool_, "int": np.int_, "float": np.float64, "complex": np.complex128,
        "object": np.object_, "str": np.str_, "long": np.int_, "unicode": np.str_,
    }  # fmt: skip

    def compatibility_settings(self=None):
        for name, kind in types_of_names.items():
            if name not in vars(np):
                setattr(np, name, kind)

    compatibility_settings()
    if hasattr(module, "Config"):
        module.Config.compatibility_settings = compatibility_settings


def property_files_in_lower_case(module: types.ModuleType) -> None:
    """XGBoost and LightGBM have their defaults in ``xgboost.yaml`` and ``lightgbm.yaml``, which are not found where case matters in file names.

    RecBole looks for ``<model>.yaml``. Where that is missing, the file in lower case is read.
    """
    folder = Path(module.__file__).parent.parent / "properties" / "model"
    original = module.Config._load_internal_config_dict

    @functools.wraps(original)
    def load_internal_config_dict(self, model, model_class, dataset):
        exact, lower = ((folder / f"{name}.yaml").is_file() for name in (model, model.lower()))
        original(self, model.lower() if lower and not exact else model, model_class, dataset)

    module.Config._load_internal_config_dict = load_internal_config_dict


def scipy_dok_update(module: types.ModuleType) -> None:
    """Seven models fill a ``scipy.sparse.dok_matrix`` by its private ``_update``, which SciPy 1.13 removed (RecBole issue 2034).

    They are LightGCN, NGCF, NCL, SpectralCF, GCMC, KGIN and MCCLK. The method stored the entries of a dict unchecked; so does this one.
    """
    from scipy.sparse import dok_matrix

    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda self, data: self._dict.update(data)


def pandas_frames(module: types.ModuleType) -> None:
    """Three things changed in pandas 3 on which RecBole's datasets rely; without them all models that read user or item attributes fail.

    * ``frame[field].fillna(..., inplace=True)`` no longer reaches the frame (copy on write), so missing values survive.
    * ``column.agg(len)`` is the length of the column, no longer that of each entry (pandas pull request 53325), so every sequence is cut
    wrongly; with ready splits of sequences the item lengths would be wrong without any error.
    * ``read_csv(dtype=str)`` gives the new string type in place of objects.

    RecBole's dataset module therefore sees a stand-in for ``pd`` whose `read_csv` and `DataFrame` give a subclass with the old behaviour
    in these three points. Everything derived from such a frame (``merge``, ``concat``, selections) is of the subclass too. pandas itself
    is not touched.
    """
    import pandas as pd

    class Column(pd.Series):
        _internal_names = [*pd.Series._internal_names, "_source"]  # pandas' way to have an attribute that is no data and is not copied on
        _internal_names_set = set(_internal_names)
        _source = None  # (frame, field) that the column was taken from

        @property
        def _constructor(self):
            return Column

        @property
        def _constructor_expanddim(self):
            return Frame

        def agg(self, func=None, *args, **kwargs):
            return self.map(func) if func is len else super().agg(func, *args, **kwargs)

        def fillna(self, *args, inplace=False, **kwargs):
            filled = super().fillna(*args, **kwargs)
            if not inplace or self._source is None:
                return filled
            frame, field = self._source
            frame[field] = filled
            return None

    class Frame(pd.DataFrame):
        @property
        def _constructor(self):
            return Frame

        @property
        def _constructor_sliced(self):
            return Column

        def __getitem__(self, key):
            value = super().__getitem__(key)
            if isinstance(value, Column):
                value._source = (self, key)
            return value

    def read_csv(*args, **kwargs):
        frame = Frame(pd.read_csv(*args, **kwargs))
        for position, kind in enumerate(frame.dtypes):
            if isinstance(kind, pd.StringDtype):
                frame.isetitem(position, frame.iloc[:, position].astype(object))
        return frame

    module.pd = _stand_in(pd, read_csv=read_csv, DataFrame=Frame)


def torch_checkpoints(module: types.ModuleType) -> None:
    """Since PyTorch 2.6 ``torch.load(file)`` refuses the checkpoints that RecBole's trainer wrote a moment ago (RecBole issue 2212).

    Two reasons: they contain a Config object and NumPy numbers, which are no weights, and they are written by pickle protocol 4, of which
    PyTorch's restricted reader understands nothing. The trainer module sees a stand-in for ``torch``: its `save` uses the default
    protocol and leaves out the two attributes of the Config that are classes; its `load` allows by name, and while loading, what then
    remains. ``weights_only`` stays on: a file that holds anything else is refused as before.
    """
    import torch

    def save(state, file, pickle_protocol=None):
        from recbole.config import Config

        if isinstance(state, dict) and isinstance(state.get("config"), Config):
            config = Config.__new__(Config)
            vars(config).update({k: v for k, v in vars(state["config"]).items() if k not in ("model_class", "yaml_loader")})
            state = {**state, "config": config}
        torch.save(state, file)

    def load(file, map_location=None):
        with _checkpoints_allowed():
            return torch.load(file, map_location=map_location, weights_only=True)

    module.torch = _stand_in(torch, save=save, load=load)


def plain_other_parameters(module: types.ModuleType) -> None:
    """Models list what a checkpoint must hold beside weights; eight list objects of classes that the restricted reader refuses.

    FDSA, DIN, DIEN, GRU4RecF and SASRecF list a layer, whose weights are in the state dict anyhow: it is left out. ItemKNN and AsymKNN
    list a sparse matrix in the list-of-lists format, RippleNet a defaultdict: a CSR matrix and a dict hold the same values.
    """
    import torch
    from scipy import sparse

    recommender = module.AbstractRecommender
    original = recommender.other_parameter

    @functools.wraps(original)
    def other_parameter(self):
        found = {key: value for key, value in original(self).items() if not isinstance(value, torch.nn.Module)}
        for key, value in found.items():
            if isinstance(value, collections.defaultdict):
                found[key] = dict(value)
            elif sparse.issparse(value) and value.format not in ("csr", "csc"):
                found[key] = value.tocsr()
        return found

    recommender.other_parameter = other_parameter


def torch_load_functions(module: types.ModuleType) -> None:
    """The same for the other places where RecBole loads its checkpoints: ``load_data_and_model`` and the models with a pre-training stage.

    These are RaCT, S3Rec, NeuMF, NAIS, ConvNCF and KD_DAGFM, which load in ``__init__`` (RecBole issue 2212).
    """

    def allowing(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            with _checkpoints_allowed():
                return function(*args, **kwargs)

        return wrapped

    if hasattr(module, "load_data_and_model"):
        module.load_data_and_model = allowing(module.load_data_and_model)
        return
    name = module.__name__.rpartition(".")[2]
    for model in vars(module).values():
        if isinstance(model, type) and model.__module__ == module.__name__ and model.__name__.lower() == name:
            model.__init__ = allowing(model.__init__)


def _checkpoints_allowed() -> contextlib.AbstractContextManager:
    """Let ``torch.load`` read what a RecBole checkpoint holds besides tensors: a Config, RecBole's enumerations, NumPy numbers, arrays.

    ItemKNN, AsymKNN, EASE and SLIMElastic keep their result in arrays and sparse matrices. Allowing a class allows a file to call it, and
    RecBole's Config evaluates strings that it is called with. So the name of Config stands for a subclass that cannot be called; a
    checkpoint only needs an empty object whose attributes it then fills.
    """
    import numpy as np
    import torch
    from recbole.config import Config
    from recbole.utils import enum_type
    from scipy import sparse

    class SavedConfig(Config):
        def __init__(self, *args, **kwargs):
            raise pickle.UnpicklingError("A RecBole checkpoint does not construct a Config; this file has been tampered with.")

    enums = [c for c in vars(enum_type).values() if isinstance(c, type) and c.__module__ == enum_type.__name__]
    make_number, make_array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    numbers = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    arrays = [np.ndarray, np.matrix, sparse.csr_matrix, sparse.csc_matrix]
    config = (SavedConfig, f"{Config.__module__}.{Config.__qualname__}")
    return torch.serialization.safe_globals([config, *enums, np.dtype, make_number, make_array, *numbers, *arrays])


def _stand_in(module: types.ModuleType, **replaced) -> types.ModuleType:
    """Return a module that is `module` but for the names in `replaced`."""
    result = types.ModuleType(module.__name__, module.__doc__)
    vars(result).update(vars(module))
    result.__getattr__ = lambda name: getattr(module, name)
    vars(result).update(replaced)
    return result


class _Tune:
    """Stands for ``ray.tune`` in RecBole's quick_start until somebody uses it."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return getattr(importlib.import_module("ray.tune"), name)
        except ImportError as error:
            raise UserError(
                f"RecBole's ray.tune.{name} needs the package ray, which cannot be imported here ({error}). "
                "Hyperparameter search in recbole_mm does not need it: use `recbole-mm search`."
            ) from error


@contextlib.contextmanager
def ray_optional():
    """``recbole.quick_start`` imports ray, which is used by one function only, ``objective_function``.

    RecBole pins ray <= 2.6.3: that version needs ``np.bool8`` (removed in NumPy 2) and ``pkg_resources`` (removed in setuptools 81), and
    has no wheel for Python >= 3.12. While the module is imported, ``ray`` is a stand-in whose ``tune`` imports the real one on first use;
    afterwards ``sys.modules`` is as before, so that other libraries see whether ray is there.
    """
    stand_in = types.ModuleType("ray", "stand-in while recbole.quick_start is imported")
    stand_in.tune = _Tune()
    with _module_present("ray", stand_in):
        yield


@contextlib.contextmanager
def _module_present(name: str, module: types.ModuleType):
    """Let ``import name`` give `module` for a while; afterwards ``sys.modules`` is as before."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def torch_scatter_functions(module: types.ModuleType) -> None:
    """KGIN and MCCLK import two functions of torch_scatter, which must be compiled for each version of PyTorch (RecBole issue 1638).

    PyTorch itself has what they need. While the two layers that import them run, ``torch_scatter`` is a module with these functions.
    """
    import torch

    def scatter_mean(src, index, dim=0, dim_size=None):
        """Mean of the rows of `src` [E, D] by `index` [E] -> [dim_size, D]; zero where there are none."""
        rows = int(index.max()) + 1 if dim_size is None else dim_size
        count = torch.bincount(index, minlength=rows).clamp(min=1).to(src.dtype)
        return src.new_zeros(rows, src.shape[1]).index_add(0, index, src) / count[:, None]

    def scatter_softmax(src, index, dim=0):
        """Softmax of each column of `src` [E, D] within the rows of equal `index` [E] -> [E, D]."""
        rows = int(index.max()) + 1
        spread = index[:, None].expand_as(src)
        largest = src.detach().new_full((rows, src.shape[1]), -torch.inf).scatter_reduce(0, spread, src.detach(), "amax")
        powers = (src - largest[index]).exp()
        return powers / powers.new_zeros(rows, src.shape[1]).index_add(0, index, powers)[index]

    stand_in = types.ModuleType("torch_scatter")
    stand_in.scatter_mean, stand_in.scatter_softmax = scatter_mean, scatter_softmax
    forward = module.Aggregator.forward

    @functools.wraps(forward)
    def with_torch_scatter(*args, **kwargs):
        with _module_present("torch_scatter", stand_in):
            return forward(*args, **kwargs)

    module.Aggregator.forward = with_torch_scatter


def ksr_precision(module: types.ModuleType) -> None:
    """KSR keeps the preloaded relation vectors in double precision and multiplies them with single precision, which PyTorch refuses.

    RecBole reads every preloaded weight as float64; the entity vectors become float32 by being copied into an embedding, the relation
    vectors stay. This gives them the precision of the entity vectors. (Not known upstream; KSR ends in "expected m1 and m2 to have the
    same dtype" with any PyTorch since 1.5.)
    """
    original = module.KSR.__init__

    @functools.wraps(original)
    def initialise(self, config, dataset):
        original(self, config, dataset)
        self.relation_Matrix = self.relation_Matrix.to(self.entity_embedding.weight.dtype)

    module.KSR.__init__ = initialise


def dgl_graph(module: types.ModuleType) -> None:
    """KGAT builds its first attention matrix with dgl, whose ``adjacency_matrix(scipy_fmt=...)`` is gone since dgl 1.0 (RecBole issue 1978).

    KGAT needs a list of edges with relations, the edges of one relation, and their matrix. While it is constructed, ``dgl`` is a module
    with that. Rows are sources and columns targets, as in dgl 0.5 to 0.9.
    """
    import numpy as np
    from scipy import sparse

    class Graph:
        def __init__(self, edges, nodes=None):
            self.source, self.target = edges
            self.nodes = nodes or int(max(self.source.max(), self.target.max())) + 1
            self.edata = {}

        def filter_edges(self, predicate):
            return predicate(types.SimpleNamespace(data=self.edata)).nonzero().flatten()

        def adjacency_matrix(self, transpose=False, scipy_fmt="coo"):
            edges = (self.source.numpy(), self.target.numpy())
            return sparse.coo_matrix((np.ones(len(edges[0])), edges), shape=(self.nodes, self.nodes))

    def edge_subgraph(graph, edges, preserve_nodes=True):
        return Graph((graph.source[edges], graph.target[edges]), graph.nodes)

    stand_in = types.ModuleType("dgl")
    stand_in.graph, stand_in.edge_subgraph = Graph, edge_subgraph
    construct = module.KGAT.__init__

    @functools.wraps(construct)
    def with_dgl(*args, **kwargs):
        with _module_present("dgl", stand_in):
            construct(*args, **kwargs)

    module.KGAT.__init__ = with_dgl


# Adaptations by the RecBole module after (or, for context managers, around) whose import they run.
AFTER_IMPORT: dict[str, tuple[Callable[[types.ModuleType], None], ...]] = {
    "recbole.data.interaction": (numpy_aliases,),
    "recbole.config.configurator": (numpy_aliases, property_files_in_lower_case),
    "recbole.evaluator.metrics": (numpy_aliases,),
    "recbole.model.abstract_recommender": (scipy_dok_update, plain_other_parameters),
    "recbole.data.dataset.dataset": (pandas_frames,),
    "recbole.trainer.trainer": (torch_checkpoints,),
    "recbole.quick_start.quick_start": (torch_load_functions,),
    "recbole.model.knowledge_aware_recommender.kgin": (torch_scatter_functions,),
    "recbole.model.knowledge_aware_recommender.mcclk": (torch_scatter_functions,),
    "recbole.model.knowledge_aware_recommender.kgat": (dgl_graph,),
    "recbole.model.sequential_recommender.ksr": (ksr_precision,),
    **{
        f"recbole.model.{module}": (torch_load_functions,)
        for module in (
            "general_recommender.ract",
            "general_recommender.neumf",
            "general_recommender.nais",
            "general_recommender.convncf",
            "sequential_recommender.s3rec",
            "context_aware_recommender.kd_dagfm",
        )
    },
}
AROUND_IMPORT: dict[str, Callable[[], contextlib.AbstractContextManager]] = {"recbole.quick_start.quick_start": ray_optional}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the adaptations run with the import of their module; every other import passes by."""

    def find_spec(self, name, path=None, target=None):
        if name != "recbole" and not name.startswith("recbole."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None and name == "recbole":
            error = MissingRecBole(
                f"RecBole is not installed for this Python ({sys.executable}, {sys.version.split()[0]}). Install it by: {INSTALL_RECBOLE}  "
                "(On Python 3.12 and later pip cannot do it by itself, because RecBole pins a version of ray that has no wheel there; "
                "recbole_mm does not need ray and brings everything else that RecBole needs.)"
            )
            error.name = name
            raise error
        if spec is not None and (name in AFTER_IMPORT or name in AROUND_IMPORT):
            execute = spec.loader.exec_module

            def exec_module(module):
                with AROUND_IMPORT.get(name, contextlib.nullcontext)():
                    execute(module)
                for adapt in AFTER_IMPORT.get(name, ()):
                    adapt(module)

            spec.loader.exec_module = exec_module
        return spec


def apply() -> None:
    """Arrange all adaptations; those for modules imported earlier run at once. Calling it again does nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name, adaptations in AFTER_IMPORT.items():
        if name in sys.modules:
            for adapt in adaptations:
                adapt(sys.modules[name])
