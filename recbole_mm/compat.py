"""Adaptations that let RecBole 1.2.1 run unchanged on current NumPy, SciPy, pandas, PyTorch and setuptools, and without ray.

RecBole's last release is of 2023 (its issue 2215 asks for today's libraries). Each function below adapts one thing and says what breaks without it
and why. `apply` arranges that a function runs when the RecBole module that it concerns is imported, so ``import recbole_mm`` costs nothing by itself.
Nothing here changes a result, and nothing reaches beyond RecBole, with two exceptions that RecBole itself needs: the old names that RecBole's
own Config puts into NumPy, and one private method of SciPy's ``dok_matrix``.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable

from recbole_mm.errors import UserError

INSTALL_RECBOLE = "pip install --no-deps recbole==1.2.1"


class MissingRecBole(UserError, ImportError):
    """RecBole is not installed. Both a UserError (the command line prints it) and an ImportError (``try: import recbole`` still works)."""


def numpy_aliases(module: types.ModuleType) -> None:
    """``Config.compatibility_settings`` reads ``np.float_`` and ``np.unicode_``, which NumPy 2.0 removed (RecBole issue 2215).

    RecBole's other modules read ``np.float`` and its like, which that method puts into NumPy. This sets the same names to the same types; names
    that the installed NumPy has again (``np.bool``, ``np.long``) stay as they are. They are set on import, so that ``Interaction`` and
    the metrics work before the first Config, as they did with the NumPy of 2021.
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


def scipy_dok_update(module: types.ModuleType) -> None:
    """Seven models fill a ``scipy.sparse.dok_matrix`` by its private ``_update``, which SciPy 1.13 removed (RecBole issue 2215).

    They are LightGCN, NGCF, NCL, SpectralCF, GCMC, KGIN and MCCLK. The method stored the entries of a dict unchecked; so does this one.
    """
    from scipy.sparse import dok_matrix

    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda self, data: self._dict.update(data)


def pandas_missing_values(module: types.ModuleType) -> None:
    """``df[field].fillna(..., inplace=True)`` does nothing since pandas 3 (copy on write), so missing values survive and the run fails.

    `Dataset._fill_nan` gets frames whose missing tokens and numbers are filled already, with the values RecBole uses; the part of it that
    still works (sequences) then runs as it is. See pandas' "Copy-on-Write" migration guide on chained in-place methods.
    """
    dataset_class, kinds = module.Dataset, module.FeatureType
    original = dataset_class._fill_nan

    @functools.wraps(original)
    def fill_nan(self):
        for name in self.feat_name_list:
            frame = getattr(self, name)
            for field in frame:
                kind = self.field2type[field]
                if kind == kinds.TOKEN:
                    frame[field] = frame[field].fillna(value=0)
                elif kind == kinds.FLOAT:
                    frame[field] = frame[field].fillna(value=frame[field].mean())
        with _no_chained_assignment_warning():
            original(self)

    dataset_class._fill_nan = fill_nan


def pandas_strings(module: types.ModuleType) -> None:
    """``pd.read_csv(dtype=str)`` gives the new string type since pandas 3, and empty sequence fields stay missing (see above).

    RecBole's dataset module reads its files through a stand-in for ``pd`` whose `read_csv` returns what pandas 2 returned: object columns; and
    in the columns declared as sequences (``genre:token_seq``) an empty string in place of a missing value, as RecBole's next statement intends.
    """
    import pandas as pd

    def read_csv(*args, **kwargs):
        frame = pd.read_csv(*args, **kwargs)
        for column in frame:
            if isinstance(frame[column].dtype, pd.StringDtype):
                frame[column] = frame[column].astype(object)
            if str(column).endswith("_seq"):
                frame[column] = frame[column].fillna("")
        return frame

    stand_in = types.ModuleType("pandas", "pandas, with read_csv as RecBole expects it")
    stand_in.__getattr__ = lambda name: getattr(pd, name)
    stand_in.read_csv = read_csv
    module.pd = stand_in
    original = module.Dataset._load_feat

    @functools.wraps(original)
    def load_feat(self, *args, **kwargs):
        with _no_chained_assignment_warning():
            return original(self, *args, **kwargs)

    module.Dataset._load_feat = load_feat


def torch_load(module: types.ModuleType) -> None:
    """RecBole reloads its own checkpoints by ``torch.load(file)``, which since PyTorch 2.6 refuses the Config object inside (RecBole issue 2215).

    The classes that RecBole's checkpoints contain are allowed by name, and only while RecBole's own functions run. ``weights_only`` stays on:
    a file that holds anything else is refused as before.
    """
    if hasattr(module, "load_data_and_model"):
        module.load_data_and_model = _with_safe_globals(module.load_data_and_model)
        return
    for trainer in vars(module).values():
        if isinstance(trainer, type) and trainer.__module__ == module.__name__:
            for name in ("evaluate", "resume_checkpoint"):
                if name in vars(trainer):
                    setattr(trainer, name, _with_safe_globals(vars(trainer)[name]))


def _with_safe_globals(function: Callable) -> Callable:
    @functools.wraps(function)
    def guarded(*args, **kwargs):
        import torch

        with torch.serialization.safe_globals(_checkpoint_classes()):
            return function(*args, **kwargs)

    return guarded


@functools.cache
def _checkpoint_classes() -> list:
    """Return the classes that a RecBole checkpoint names: the Config, its enumerations and the YAML loader class that it keeps."""
    import yaml
    from recbole.config import Config
    from recbole.utils import enum_type

    enums = [c for c in vars(enum_type).values() if isinstance(c, type) and c.__module__ == enum_type.__name__]
    return [Config, yaml.loader.FullLoader, *enums]


@contextlib.contextmanager
def _no_chained_assignment_warning():
    import pandas as pd

    with warnings.catch_warnings():
        for name in ("ChainedAssignmentError",):
            category = getattr(pd.errors, name, None)
            if category is not None and issubclass(category, Warning):
                warnings.simplefilter("ignore", category)
        yield


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

    RecBole pins ray <= 2.6.3: that version needs ``np.bool8`` (removed in NumPy 2) and ``pkg_resources`` (removed in setuptools 81), and has no wheel
    for Python >= 3.12. While the module is imported, ``ray`` is a stand-in whose ``tune`` imports the real one on first use; afterwards
    ``sys.modules`` is as before, so that other libraries see whether ray is there.
    """
    before = {name: sys.modules.pop(name) for name in ("ray",) if name in sys.modules}
    stand_in = types.ModuleType("ray", "stand-in while recbole.quick_start is imported")
    stand_in.tune = _Tune()
    sys.modules["ray"] = stand_in
    try:
        yield
    finally:
        del sys.modules["ray"]
        sys.modules.update(before)


# Adaptations by the RecBole module after (or, for context managers, around) whose import they run.
AFTER_IMPORT: dict[str, tuple[Callable[[types.ModuleType], None], ...]] = {
    "recbole.data.interaction": (numpy_aliases,),
    "recbole.config.configurator": (numpy_aliases,),
    "recbole.evaluator.metrics": (numpy_aliases,),
    "recbole.model.abstract_recommender": (scipy_dok_update,),
    "recbole.data.dataset.dataset": (pandas_strings, pandas_missing_values),
    "recbole.trainer.trainer": (torch_load,),
    "recbole.quick_start.quick_start": (torch_load,),
}
AROUND_IMPORT: dict[str, Callable[[], contextlib.AbstractContextManager]] = {"recbole.quick_start.quick_start": ray_optional}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the adaptations run with the import of their module; every other import passes by."""

    def find_spec(self, name, path=None, target=None):
        if name != "recbole" and not name.startswith("recbole."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None and name == "recbole":
            raise MissingRecBole(
                f"RecBole is not installed for this Python ({sys.executable}, {sys.version.split()[0]}). Install it by: {INSTALL_RECBOLE}  "
                "(On Python 3.12 and later pip cannot do it by itself, because RecBole pins a version of ray that has no wheel there; "
                "recbole_mm does not need ray and brings everything else that RecBole needs.)",
                name="recbole",
            )
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
