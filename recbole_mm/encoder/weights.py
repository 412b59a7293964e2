"""Where weights come from: a path, the weights folder, the Hugging Face cache, the network; and what to say when they are nowhere."""

import os
import socket
from pathlib import Path

import torch

from recbole_mm.errors import UserError


def weights_folder() -> Path:
    """Folder that is searched for weight files given by name: ``$RECBOLE_MM_WEIGHTS``, else ``~/.cache/recbole_mm``."""
    return Path(os.environ.get("RECBOLE_MM_WEIGHTS") or Path.home() / ".cache" / "recbole_mm")


def find_weights(name: str | None) -> Path | None:
    """The file or folder called `name`: as a path, or in the weights folder; None when it is in neither."""
    if not name:
        return None
    for path in (Path(name).expanduser(), weights_folder() / name):
        if path.exists():
            return path
    return None


def missing_weights(what: str, source: str, name: str) -> UserError:
    """The one sentence that says what to download and where to put it."""
    return UserError(
        f"The weights of {what} are not on this machine and cannot be fetched from it: download them from {source} and save them as "
        f"{weights_folder() / name}, or give their path with --pretrained=<path> (--pretrained=null starts from random weights)."
    )


def online(host: str = "huggingface.co") -> bool:
    """Whether a download can be tried at all; a machine without a name server answers at once instead of after five retries."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def hub_file(repository: str, file: str) -> Path | None:
    """`file` of a Hugging Face repository from the local cache or the network; None when it can be had from neither."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    if not online():
        return None
    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError):
        return None


def hub_or_path(name: str) -> str | None:
    """A folder, or the name of a Hugging Face repository whose ``config.json`` can be had; None otherwise."""
    path = find_weights(name)
    if path is not None:
        return str(path)
    return name if name.count("/") <= 1 and hub_file(name, "config.json") is not None else None


def read_tensors(path: Path) -> dict:
    """A weight file, safetensors or PyTorch, without running any code that it might hold.

    Raises:
        UserError: when the file is neither.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, by what the file turns out to be
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: expected a safetensors file or a PyTorch checkpoint of tensors and plain values, got something that cannot be read "
            f"as one ({reason[:200]}). Download it again, or save its state dictionary with torch.save and use that."
        ) from error
