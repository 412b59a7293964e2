import http.server
import io
import json
import threading
from collections import Counter

import pytest
from PIL import Image

from recbole_mm.data.convert.download import MANIFEST, Politeness, fetch_pictures, read_manifest
from recbole_mm.errors import UserError


def png(colour="red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def server(monkeypatch):
    """A local server whose answers a test sets: path -> list of (status, headers, body), the last one for ever."""
    answers, asked = {}, Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            given = answers.get(self.path, [(404, {}, b"")])
            status, headers, body = given[min(asked[self.path], len(given)) - 1]
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{service.server_address[1]}", answers, asked
    service.shutdown()
    service.server_close()


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.sleeps = 0.0, []

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.now += seconds

    def clock(self):
        return self.now


def listing(folder, base, paths):
    (folder / "images.csv").write_text("item_id,url\n" + "".join(f"i{k},{base}{path}\n" for k, path in enumerate(paths)))


def fetch(folder, time=None, **settings):
    time = time or Time()
    options = {key: settings.pop(key) for key in ("retry_failed",) if key in settings}
    return fetch_pictures(
        folder,
        Politeness(**{"rate": 1000.0, "retries": 2, "backoff": 1.0, **settings}),
        progress=False,
        sleep=time.sleep,
        clock=time.clock,
        **options,
    )


def test_pictures_are_named_by_what_they_are(tmp_path, server):
    base, answers, _ = server
    answers |= {"/a.jpg": [(200, {}, png())], "/b": [(302, {"Location": "/a.jpg"}, b"")]}
    listing(tmp_path, base, ["/a.jpg", "/b"])
    assert fetch(tmp_path) == {"fetched": 2}
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["i0.png", "i1.png"]
    entry = read_manifest(tmp_path / MANIFEST)["i0"]
    assert entry["bytes"] == len(png()) and len(entry["sha256"]) == 64


def test_a_second_call_asks_for_nothing(tmp_path, server):
    base, answers, asked = server
    answers["/a"] = [(200, {}, png())]
    listing(tmp_path, base, ["/a", "/gone"])
    assert fetch(tmp_path) == {"fetched": 1, "given up": 1}
    assert fetch(tmp_path) == {"there already": 1, "given up before": 1}
    assert asked == {"/a": 1, "/gone": 1}  # 404 is not asked again
    assert fetch(tmp_path, retry_failed=True) == {"there already": 1, "given up": 1}
    (tmp_path / "images" / "i0.png").unlink()
    assert fetch(tmp_path)["fetched"] == 1


def test_it_goes_on_where_a_kill_cut_the_manifest(tmp_path, server):
    base, answers, asked = server
    answers |= {"/a": [(200, {}, png())], "/b": [(200, {}, png())]}
    listing(tmp_path, base, ["/a", "/b"])
    fetch(tmp_path)
    lines = (tmp_path / MANIFEST).read_text().splitlines()
    (tmp_path / MANIFEST).write_text(lines[0] + "\n" + lines[1][:20])
    assert fetch(tmp_path) == {"there already": 1, "fetched": 1}
    assert set(read_manifest(tmp_path / MANIFEST)) == {"i0", "i1"} and asked == {"/a": 1, "/b": 2}
    assert all(entry["status"] == "fetched" for entry in read_manifest(tmp_path / MANIFEST).values())


def test_errors_of_the_server_are_retried_and_its_wish_to_wait_is_kept(tmp_path, server):
    base, answers, asked = server
    answers["/a"] = [(503, {"Retry-After": "7"}, b""), (500, {}, b""), (200, {}, png())]
    listing(tmp_path, base, ["/a"])
    time = Time()
    assert fetch(tmp_path, time) == {"fetched": 1}
    assert asked["/a"] == 3
    waits = [s for s in time.sleeps if s > 0.1]
    assert waits[0] == 7 and 1.5 <= waits[1] <= 2.5  # asked for; backoff doubled, with jitter


def test_after_all_tries_it_is_left_for_the_next_call(tmp_path, server):
    base, answers, asked = server
    answers["/a"] = [(500, {}, b"")] * 3 + [(200, {}, png())]
    listing(tmp_path, base, ["/a"])
    assert fetch(tmp_path) == {"failed": 1} and asked["/a"] == 3
    assert fetch(tmp_path) == {"fetched": 1}


def test_a_cut_body_is_asked_for_again(tmp_path, server):
    base, answers, asked = server
    answers["/a"] = [(200, {"Content-Length": str(len(png()))}, png()[:40]), (200, {}, png())]
    listing(tmp_path, base, ["/a"])
    assert fetch(tmp_path) == {"fetched": 1} and asked["/a"] == 2


def test_the_rate_is_kept(tmp_path, server):
    base, answers, _ = server
    answers["/a"] = [(200, {}, png())]
    listing(tmp_path, base, ["/a"] * 5)
    time = Time()
    fetch(tmp_path, time, rate=2.0)
    assert time.now == pytest.approx(2.0)  # five requests, half a second apart


@pytest.mark.parametrize(
    "body, reason",
    [(b"<html>no</html>", "not a readable picture"), (png()[:50], "not a readable picture"), (b"x" * 2000, "more than 1,000 bytes")],
)
def test_what_is_no_picture_is_given_up(tmp_path, server, monkeypatch, body, reason):
    monkeypatch.setattr("recbole_mm.data.convert.download.MAX_BYTES", 1000)
    base, answers, asked = server
    answers["/a"] = [(200, {}, body)]
    listing(tmp_path, base, ["/a"])
    assert fetch(tmp_path) == {"given up": 1} and asked["/a"] == 1
    assert reason in read_manifest(tmp_path / MANIFEST)["i0"]["error"]
    assert not list((tmp_path / "images").iterdir())


def test_only_web_addresses_and_plain_names(tmp_path, server):
    base, answers, asked = server
    (tmp_path / "secret.png").write_bytes(png())
    answers["/a"] = [(302, {"Location": f"file://{tmp_path}/secret.png"}, b"")]
    rows = [("x", f"file://{tmp_path}/secret.png"), ("../y", f"{base}/a"), ("z", f"{base}/a")]
    (tmp_path / "images.csv").write_text("item_id,url\n" + "".join(f"{t},{u}\n" for t, u in rows))
    result = fetch(tmp_path, retries=0)
    assert "fetched" not in result and sum(result.values()) == 3
    assert not list((tmp_path / "images").iterdir()) and asked["/a"] == 1


def test_no_server(tmp_path):
    listing(tmp_path, "http://127.0.0.1:9", ["/a"])
    assert fetch(tmp_path) == {"failed": 1}
    assert json.loads((tmp_path / MANIFEST).read_text())["error"].endswith("3 tries")


def test_wrong_input(tmp_path):
    with pytest.raises(UserError, match="no list of pictures"):
        fetch(tmp_path)
    (tmp_path / "images.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="expected the columns item_id,url"):
        fetch(tmp_path)
    listing(tmp_path, "http://127.0.0.1:9", [])
    with pytest.raises(UserError, match="above 0"):
        fetch(tmp_path, rate=0.0)
