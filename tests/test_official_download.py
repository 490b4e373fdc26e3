"""Official networks by name: found, fetched, resumed, verified, and explained when they cannot be had.

The server is a real one on the loopback, and serves any bytes; the table of names points at it for the test.
"""

import dataclasses
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from diptych.errors import Cancelled, CheckpointError, ModelNotFound
from diptych.upscalers import official

CONTENTS = bytes(range(256)) * 4096  # one MiB: several chunks


class Server(ThreadingHTTPServer):
    """Serves CONTENTS, as GitHub does with ranges, or as told with faults."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []  # (path, Range header)
        self.ranges = True
        self.status = 200
        self.cuts = []  # after how many bytes to drop the connection, one per request
        self.contents = CONTENTS


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        body = self.server.contents[start:]
        self.send_response(206 if start else 200)
        if start:
            end = len(self.server.contents)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else len(body)
        self.wfile.write(body[:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def home(tmp_path, monkeypatch, server):
    """An empty cache folder, and a table whose x4plus lies on the server."""
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}/x4plus.pth"
    digest = hashlib.sha256(CONTENTS).hexdigest()
    entry = dataclasses.replace(official.OFFICIAL["x4plus"], url=url, sha256=digest, size=len(CONTENTS))
    monkeypatch.setitem(official.OFFICIAL, "x4plus", entry)
    return tmp_path


def part(home):
    return home / "upscalers" / "RealESRGAN_x4plus.pth.part"


def test_a_download_arrives_whole_with_progress(home, server):
    calls = []
    path = official.download("x4plus", lambda done, total: calls.append((done, total)))
    assert path == home / "upscalers" / "RealESRGAN_x4plus.pth"
    assert path.read_bytes() == CONTENTS
    assert calls == sorted(calls) and calls[-1] == (len(CONTENTS), len(CONTENTS)) and len(calls) > 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_there_is_not_fetched_again(home, server):
    assert official.resolve("x4plus") == official.resolve("x4plus")
    assert len(server.requests) == 1


def test_a_cut_connection_is_resumed_at_once(home, server):
    server.cuts = [300_000, 400_000]
    assert official.download("x4plus").read_bytes() == CONTENTS
    assert [asked for _, asked in server.requests] == [None, "bytes=300000-", "bytes=700000-"]


def test_an_interrupted_download_goes_on_the_next_time(home, server):
    server.cuts = [200_000, 1, 1]
    with pytest.raises(ModelNotFound, match="the connection ended after 200,002 of 1,048,576 bytes"):
        official.download("x4plus")
    assert part(home).stat().st_size == 200_002
    assert official.download("x4plus").read_bytes() == CONTENTS
    assert server.requests[-1][1] == "bytes=200002-"


def test_a_server_that_cannot_resume_sends_everything_again(home, server):
    server.ranges = False
    server.cuts = [300_000]
    assert official.download("x4plus").read_bytes() == CONTENTS


def test_cancelling_stops_and_keeps_what_has_arrived(home, server):
    cancel = threading.Event()

    def stop_half_way(done, total):
        if done >= total / 2:
            cancel.set()

    with pytest.raises(Cancelled, match="goes on from here the next time"):
        official.download("x4plus", stop_half_way, cancel)
    assert len(CONTENTS) / 2 <= part(home).stat().st_size < len(CONTENTS)
    assert not (home / "upscalers" / "RealESRGAN_x4plus.pth").exists()
    assert official.download("x4plus").read_bytes() == CONTENTS


def test_wrong_contents_are_refused_and_removed(home, server):
    server.contents = b"X" + CONTENTS[1:]
    with pytest.raises(CheckpointError, match="wrong contents"):
        official.download("x4plus")
    assert list((home / "upscalers").iterdir()) == []


def test_no_more_is_taken_than_the_table_says(home, server):
    server.contents = CONTENTS + b"more"
    assert official.download("x4plus").read_bytes() == CONTENTS


def test_a_download_goes_to_another_folder_if_asked(home, server):
    path = official.download("x4plus", folder=home / "elsewhere")
    assert path == home / "elsewhere" / "RealESRGAN_x4plus.pth"
    assert not (home / "upscalers").exists()


def test_a_spoiled_part_is_started_again_after_it_was_found_out(home, server):
    part(home).parent.mkdir()
    part(home).write_bytes(b"not the beginning")
    with pytest.raises(CheckpointError, match="wrong contents"):
        official.download("x4plus")
    assert official.download("x4plus").read_bytes() == CONTENTS


def test_a_part_longer_than_the_file_is_started_again(home, server):
    part(home).parent.mkdir()
    part(home).write_bytes(CONTENTS + b"more")
    assert official.download("x4plus").read_bytes() == CONTENTS


def test_a_missing_file_on_the_server_says_what_to_do_by_hand(home, server):
    server.status = 404
    with pytest.raises(ModelNotFound) as caught:
        official.download("x4plus")
    message = str(caught.value)
    entry = official.OFFICIAL["x4plus"]
    for part in ("the server answered 404", entry.url, entry.filename, str(home / "upscalers"), entry.sha256):
        assert part in message
    assert len(server.requests) == 1  # it will not be there the second time either


def test_a_server_in_trouble_is_asked_again(home, server):
    server.status = 503
    with pytest.raises(ModelNotFound, match="503"):
        official.download("x4plus")
    assert len(server.requests) == 3


def test_offline_the_message_says_which_file_to_put_where(home, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(ModelNotFound, match="could not be downloaded .*refused") as caught:
        official.resolve("x4plus")
    assert str(home / "upscalers") in str(caught.value) and "RealESRGAN_x4plus.pth" in str(caught.value)


def test_a_file_put_there_by_hand_is_used(home, server):
    (home / "upscalers").mkdir()
    (home / "upscalers" / "RealESRGAN_x4plus.pth").write_bytes(b"by hand")
    assert official.resolve("x4plus").read_bytes() == b"by hand"
    assert server.requests == []


def test_two_downloads_at_once_both_end_well(home, server):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(official.download("x4plus"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and all(path.read_bytes() == CONTENTS for path in paths)


def test_a_folder_that_cannot_be_made_is_explained(home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("DIPTYCH_HOME", str(home / "file"))
    with pytest.raises(official.DiptychError, match="set DIPTYCH_HOME"):
        official.download("x4plus")
