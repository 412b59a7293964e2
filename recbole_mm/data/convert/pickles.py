"""Read foreign pickles without running foreign code: only plain values, numpy arrays and scipy sparse matrices are rebuilt."""

import pickle
from pathlib import Path
from typing import Any

from recbole_mm.errors import UserError

_NUMPY_CORE = ("numpy.core.multiarray", "numpy._core.multiarray")
ALLOWED = frozenset(
    {("collections", "OrderedDict"), ("collections", "defaultdict"), ("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")}
    | {(module, name) for module in _NUMPY_CORE for name in ("_reconstruct", "scalar")}
    | {("copy_reg", "_reconstructor"), ("copyreg", "_reconstructor")}  # object.__new__ of a class in this list, no more
    | {("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")}
    | {
        (f"scipy.sparse.{prefix}{kind}", f"{kind}_{shape}")
        for prefix in ("", "_")
        for kind in ("coo", "csr", "csc", "lil", "dok")
        for shape in ("matrix", "array")
    }
    | {
        (module, name)
        for module in ("builtins", "__builtin__")
        for name in ("dict", "list", "set", "frozenset", "tuple", "int", "long", "float", "str", "object")
    }
)


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise UserError(
                f"it asks for {module}.{name}; only plain values, numpy arrays and scipy sparse matrices are read, because a pickle "
                "can run any code. If you trust its source, load it yourself and save it as CSV or .npy"
            )
        for old, new in (("numpy.core.", "numpy._core."), ("scipy.sparse.", "scipy.sparse._")):
            if module.startswith(old) and not module.startswith(new):
                module = new + module.removeprefix(old)
        return super().find_class(module, name)


def read_pickle(path: str | Path) -> Any:
    """The value in the pickle file `path`.

    Raises:
        UserError: when it asks for any class but those of `ALLOWED`, or is no whole pickle.
    """
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            return _Restricted(stream, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path}: this pickle is refused: {error}.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(
            f"{path}: expected a whole pickle file, got something else or only a part ({type(error).__name__}: {error})."
        ) from None
