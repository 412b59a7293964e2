"""Fetch the pictures of ``images.csv`` politely: one at a time, so many a second, again after errors, and on from where it stopped.

The manifest (``images_manifest.jsonl``) has one line per address that is settled: fetched, with size and SHA-256, or given up, with the
reason. A later call takes up what the manifest does not settle.
"""

import csv
import hashlib
import http.client
import io
import json
import random
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recbole_mm.errors import UserError
from recbole_mm.files import atomic_path

LISTING, MANIFEST = "images.csv", "images_manifest.jsonl"
MAX_BYTES = 20_000_000
GONE = (400, 401, 403, 404, 405, 410, 451)  # asking again will not help
SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
AGENT = "recbole_mm (research; one request at a time)"


@dataclass
class Politeness:
    """How the server is asked."""

    rate: float = 2.0  # requests a second, at the most
    retries: int = 4  # after the first try
    backoff: float = 1.0  # seconds before the first retry; doubled each time, with jitter
    timeout: float = 30.0
    longest_wait: float = 300.0  # of what a server may ask for in Retry-After


class _OnlyWeb(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, stream, code, message, headers, url):
        if not url.startswith(("http://", "https://")):
            raise urllib.error.URLError(f"redirected to {url[:60]!r}, which is no web address")
        return super().redirect_request(request, stream, code, message, headers, url)


class _Final(Exception):
    """An answer that a retry will not change."""


def read_manifest(path: Path) -> dict[str, dict]:
    """Token -> its last line; a last line cut by a kill is left out."""
    settled = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                settled[entry["token"]] = entry
            except (ValueError, KeyError, TypeError):
                continue
    return settled


def read_listing(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no list of pictures. The amazon converter writes it from --meta; its columns are item_id,url.")
    with open(path, encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.reader(stream))
    if not rows or rows[0][:2] != ["item_id", "url"]:
        raise UserError(f"{path}: expected the columns item_id,url, got {rows[0] if rows else 'an empty file'}.")
    return [(row[0], row[1]) for row in rows[1:] if len(row) >= 2]


def fetch_pictures(
    folder: Path,
    politeness: Politeness | None = None,
    retry_failed: bool = False,
    progress: bool = True,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Counter:
    """Fetch what ``images.csv`` in `folder` lists to ``images/<token><suffix>``; return how many ended how."""
    from tqdm import tqdm

    politeness = politeness or Politeness()
    if not politeness.rate > 0:
        raise UserError(f"--rate: expected pictures a second above 0, got {politeness.rate}.")
    folder = Path(folder)
    listing = read_listing(folder / LISTING)
    settled = read_manifest(folder / MANIFEST)
    opener = urllib.request.build_opener(_OnlyWeb)
    (folder / "images").mkdir(exist_ok=True)
    result: Counter = Counter()
    next_at = clock()
    with open(folder / MANIFEST, "a+b") as manifest:
        if manifest.tell() and _last_byte(manifest) != b"\n":
            manifest.write(b"\n")  # the last line was cut by a kill
        for token, url in tqdm(listing, desc="pictures", unit="", disable=not progress):
            old = settled.get(token)
            if old and old.get("url") == url:
                if old["status"] == "fetched" and (folder / "images" / old["file"]).is_file():
                    result["there already"] += 1
                    continue
                if old["status"] == "given up" and not retry_failed:
                    result["given up before"] += 1
                    continue

            def wait_turn():
                nonlocal next_at
                if (pause := next_at - clock()) > 0:
                    sleep(pause)
                next_at = clock() + 1 / politeness.rate

            entry = {"token": token, "url": url, **_fetch(opener, token, url, folder / "images", politeness, wait_turn, sleep)}
            result[entry["status"]] += 1
            manifest.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            manifest.flush()
    return result


def _last_byte(stream) -> bytes:
    stream.seek(-1, 2)
    return stream.read(1)


def _fetch(opener, token: str, url: str, folder: Path, politeness: Politeness, wait_turn, sleep) -> dict:
    """One picture, with retries; the manifest's entry without token and address."""
    if Path(token).name != token or token in ("", ".", "..") or "\\" in token:
        return {"status": "given up", "error": "the item token cannot be a file name"}
    if not url.startswith(("http://", "https://")):
        return {"status": "given up", "error": "no web address"}
    error = ""
    for trial in range(politeness.retries + 1):
        wait_turn()
        asked = 0.0
        try:
            content = _read(opener, url, politeness.timeout)
            path = folder / f"{token}{_suffix(content)}"
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
            return {"status": "fetched", "file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        except _Final as final:
            return {"status": "given up", "error": str(final)}
        except urllib.error.HTTPError as http_error:
            error = f"HTTP {http_error.code}"
            if http_error.code in GONE:
                return {"status": "given up", "error": error}
            after = http_error.headers.get("Retry-After", "")
            asked = min(float(after), politeness.longest_wait) if after.isdigit() else 0.0
        except (urllib.error.URLError, http.client.HTTPException, OSError) as network_error:
            error = f"{type(network_error).__name__}: {network_error}"
        except ValueError as value_error:
            return {"status": "given up", "error": str(value_error)}
        if trial < politeness.retries:
            sleep(max(asked, politeness.backoff * 2**trial * (0.75 + 0.5 * random.random())))
    return {"status": "failed", "error": f"{error}, {politeness.retries + 1} tries"}  # a later call tries again


def _read(opener, url: str, timeout: float) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": AGENT})
    with opener.open(request, timeout=timeout) as answer:
        content = answer.read(MAX_BYTES + 1)
        length = answer.headers.get("Content-Length", "")
    if len(content) > MAX_BYTES:
        raise _Final(f"more than {MAX_BYTES:,} bytes")
    if length.isdigit() and len(content) < int(length):
        raise http.client.IncompleteRead(content, int(length) - len(content))
    return content


def _suffix(content: bytes) -> str:
    """File suffix by what the bytes are; the address and the server's word do not count."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as picture:
            kind = picture.format or ""
            picture.verify()
    except Exception as error:
        raise _Final(f"not a readable picture ({type(error).__name__})") from None
    if kind not in SUFFIX:
        raise _Final(f"a picture of kind {kind}, which is not used")
    return SUFFIX[kind]
