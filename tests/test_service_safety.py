"""What the server refuses, and that it is unharmed by it."""

import base64
import gc
import io
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import httpx
import pytest
from PIL import Image

from diptych.errors import DiptychError
from diptych.webui.models import ModelStore
from diptych.webui.server import WebServer
from diptych.webui.settings import Limits, Settings

BASE = "/sdapi/v1/"
OK = {"prompt": "a red cat", "steps": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def http(web_server):
    with httpx.Client(base_url=web_server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def unharmed(http):
    """After all the refusals the server draws as before."""
    yield
    assert http.post(BASE + "txt2img", json=OK).status_code == 200


@pytest.fixture
def start(tiny_pipeline_folder, tmp_path):
    """Starts further servers, without the page."""
    servers = []

    def start(**settings):
        more = {"port": 0, "model": str(tiny_pipeline_folder), "outputs": tmp_path / "outputs", "page": False}
        servers.append(WebServer(Settings(**more | settings)))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def bomb(width: int, height: int) -> str:
    """A PNG of this size in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    ).decode()


def refused(answer: httpx.Response, status: int, said: str) -> None:
    assert answer.status_code == status, answer.text[:300]
    body = answer.json()
    assert set(body) == {"error", "detail", "body", "errors"} or isinstance(body["detail"], list)
    assert said.lower() in json.dumps(body, ensure_ascii=False).lower()
    assert "Traceback" not in answer.text and "/site-packages/" not in answer.text


PICTURES = {
    "broken base64": ("abc", 422, "base64"),
    "a text file": (base64.b64encode(b"these are not the pixels").decode(), 422, "cannot be read"),
    "half a picture": (encoded(Image.effect_noise((64, 64), 50))[:2000], 422, "cannot be read"),
    "a bomb": (bomb(10_000, 10_000), 422, "at most 1,000,000"),
    "a huge bomb": (bomb(60_000, 60_000), 422, "limit of 1,000,000"),
    "an address": ("http://127.0.0.1:1/picture.png", 422, "never fetched"),
    "an address of a file": ("file:///etc/passwd", 422, "never fetched"),
    "a path": ("/etc/passwd", 422, "the picture"),
    "nothing": ("", 422, "cannot be read"),
    "emoji": ("🍎" * 100, 422, "base64"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_what_is_no_picture_is_named(http, kind):
    text, status, said = PICTURES[kind]
    refused(http.post(BASE + "png-info", json={"image": text}), status, said.replace("the picture", ""))
    refused(http.post(BASE + "extra-single-image", json={"image": text, "upscaler_1": "Lanczos"}), status, "")
    refused(http.post(BASE + "img2img", json=OK | {"init_images": [text]}), status, "")


WISHES = {
    "an unknown sampler": ({"sampler_name": "Magic"}, 404, "Euler a"),
    "an unknown scheduler": ({"sampler_name": "Euler", "scheduler": "Magic"}, 404, "Karras"),
    "an unknown upscaler": ({"enable_hr": True, "hr_upscaler": "Magic"}, 404, "tiny-model"),
    "a path as a model": ({"override_settings": {"sd_model_checkpoint": "../../etc/passwd"}}, 404, "tiny-model"),
    "no model at all": ({"override_settings": {"sd_model_checkpoint": ["x"]}}, 404, "name of a model"),
    "a path as a LoRA": ({"prompt": "a <lora:../../../etc/passwd:1>"}, 404, "LoRA"),
    "a script": ({"script_name": "X/Y/Z plot"}, 422, "not found"),
    "an always-on script": ({"alwayson_scripts": {"ControlNet": {"args": []}}}, 422, "not found"),
    "faces to restore": ({"restore_faces": True}, 422, "restore_faces"),
    "too many steps": ({"steps": 61}, 422, "the limit is 60"),
    "too large a picture": ({"width": 520, "height": 520}, 422, "the limit is 512"),
    "too many pictures": ({"batch_size": 2, "n_iter": 3}, 422, "the limit is 4"),
    "too large a result": ({"enable_hr": True, "width": 512, "height": 512, "hr_scale": 8}, 422, "4,000,000"),
    "too large a second pass": ({"enable_hr": True, "width": 256, "height": 256, "hr_scale": 4}, 422, "limit is 512"),
    "too many steps the second time": ({"enable_hr": True, "hr_second_pass_steps": 61}, 422, "the limit is 60"),
    "a latent mode without a second pass": (
        {"enable_hr": True, "hr_upscaler": "Latent", "denoising_strength": 0},
        422,
        "denoising_strength above 0",
    ),
    "too long a prompt": ({"prompt": "🍎" * 10_001}, 422, "the limit is 10,000"),
    "negative steps": ({"steps": -1}, 422, "greater than or equal to 1"),
    "a negative size": ({"width": -64}, 422, "greater than or equal to 8"),
    "a negative count": ({"batch_size": -1}, 422, "greater than or equal to 1"),
    "a seed below -1": ({"seed": -2}, 422, "greater than or equal to -1"),
    "a number too large for any machine": ({"seed": 10**30}, 422, "less than or equal"),
    "words as a number": ({"steps": "many"}, 422, "valid integer"),
    "brackets without end": ({"prompt": "(" * 5000}, 422, "brackets"),
}


@pytest.mark.parametrize("kind", WISHES)
def test_a_wish_that_cannot_be_granted_is_refused_with_the_reason_or_the_limit(http, kind):
    wish, status, said = WISHES[kind]
    refused(http.post(BASE + "txt2img", json=OK | wish), status, said)


PROMPTS = [
    "🍎" * 10_000, "<script>alert(1)</script>", "\0\x1b[2J", "a\nSteps: 1, Seed: 2, Size: 1x1", "' OR 1=1 --",
    "{{7*7}} %s %n",
]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_any_prompt_is_only_a_prompt(http, prompt):
    answer = http.post(BASE + "txt2img", json=OK | {"prompt": prompt, "save_images": True})
    assert answer.status_code == 200 and json.loads(answer.json()["info"])["prompt"] == prompt


MALFORMED = [
    b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b'{"cfg_scale": NaN}', b"[" * 100_000, b"\xff\xfe",
    b'{"prompt": "\\ud800"}', b'{"seed": 1' + b"0" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("body", MALFORMED)
def test_a_malformed_body_is_refused(http, body):
    answer = http.post(BASE + "txt2img", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and "Traceback" not in answer.text


def test_too_large_a_body_is_refused_with_the_limit_whether_its_length_was_told_or_not(http):
    body = b'{"prompt": "' + b"x" * 3_100_000 + b'"}'
    headers = {"content-type": "application/json"}
    refused(http.post(BASE + "txt2img", content=body, headers=headers), 413, "3,000,000")
    pieces = (body[start : start + 65536] for start in range(0, len(body), 65536))
    refused(http.post(BASE + "txt2img", content=pieces, headers=headers), 413, "3,000,000")


def test_two_gigabytes_are_refused_without_being_read(web_server):
    with socket.create_connection(("127.0.0.1", web_server.port), timeout=30) as client:
        client.sendall(b"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: 2147483648\r\n\r\n" + b"{" * 100_000)  # fmt: skip
        assert client.recv(4096).startswith(b"HTTP/1.1 413")


def test_gigabytes_of_tiny_values_are_refused_before_they_are_parsed(http):
    body = b'{"script_args": [' + b"[]," * 60_000 + b"0]}"
    refused(http.post(BASE + "txt2img", content=body, headers={"content-type": "application/json"}), 413, "100,000")
    join = b'{"session_hash": "s", "data": [' + b"0," * 110_000 + b"0]}"
    headers = {"content-type": "application/json"}
    refused(http.post("/gradio_api/queue/join", content=join, headers=headers), 413, "100,000")


def test_a_client_that_sends_too_slowly_is_told_so_and_left(start):
    server = start(limits=Limits(upload_seconds=0.3))
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(b"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: 100\r\n\r\n{")  # fmt: skip
        answer = client.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408") and server.backend.queue.jobs() == []
    assert httpx.post(server.url + BASE + "txt2img", json=OK, timeout=60).status_code == 200


def test_many_pictures_that_are_too_large_together_are_refused(start):
    url = start(limits=Limits(request_pixels=20_000)).url + BASE
    pictures = [encoded(Image.new("RGB", (100, 90)))] * 3
    batch = {"imageList": [{"data": text, "name": "x.png"} for text in pictures], "upscaler_1": "Lanczos"}
    refused(httpx.post(url + "extra-batch-images", json=batch), 422, "limit of 20,000")
    refused(httpx.post(url + "img2img", json=OK | {"init_images": pictures}), 422, "limit of 20,000")


def test_a_client_that_hangs_up_while_it_sends_is_forgotten(web_server):
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", web_server.port), timeout=30) as client:
            client.sendall(b"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 100000\r\n\r\n{\"prompt\": ")  # fmt: skip
    assert web_server.backend.queue.jobs() == []


TRAVERSALS = [
    "/file=/etc/passwd", "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd", "/../../etc/passwd",
    "/gradio_api/file=%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/gradio_api/file/etc/passwd", "/static/../../../../etc/passwd",
    "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd", "/gradio_api/proxy=http://127.0.0.1:1/", "/proxy=http://127.0.0.1:1/",
    "/gradio_api/file=http://127.0.0.1:1/x.png", "/gradio_api/stream/../../etc/passwd", "/outputs/library.sqlite",
    "/gradio_api/vibe-code/", "/gradio_api/dev/reload", "/monitoring", "/gradio_api/runs", "/gradio_api/deep_link",
    "/gradio_api/custom_component/1/client/component/../../../../etc/passwd", "/svelte/../../../../etc/passwd",
]  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_route_reads_a_file_of_the_machine_or_another_server(web_server, path):
    with socket.create_connection(("127.0.0.1", web_server.port), timeout=30) as client:  # no library tidies the path
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.split(b" ", 2)[1] in (b"400", b"403", b"404") and b"root:" not in answer


def test_the_library_and_its_pictures_are_not_served_from_where_they_lie(http, web_server):
    http.post(BASE + "txt2img", json=OK | {"save_images": True})
    folder = web_server.backend.library.folder
    for path in (*folder.glob("*.png"), folder / "library.sqlite"):
        assert http.get(f"/gradio_api/file={path}").status_code == 403


@pytest.mark.parametrize("name, kind", [("x.html", "text/html"), ("x.svg", "image/svg+xml")])
def test_an_uploaded_file_is_never_a_page_of_this_site(http, name, kind):
    (path,) = http.post("/gradio_api/upload", files={"files": (name, b"<script>alert(1)</script>", kind)}).json()
    answer = http.get(f"/gradio_api/file={path}")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"


LAYERS = {
    "a billion layers": ("10000000000", "PNG", "limit of 8"), "a layer before the first": ("-1", "PNG", "limit of 8"),
    "a text file": ("0", "text", "cannot be read"), "a bomb": ("0", "bomb", "1,000,000"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_the_editor_takes_no_layer_over_the_limits(http, kind):
    index, content, said = LAYERS[kind]
    contents = {"PNG": base64.b64decode(encoded(Image.new("RGBA", (8, 8)))), "text": b"these are no pixels at all",
                "bomb": base64.b64decode(bomb(10_000, 10_000))}  # fmt: skip
    answer = send_layer(http, index, contents[content], "one")
    assert answer.status_code == 422 and said in answer.json()["detail"]


def test_the_editor_forgets_the_layers_that_nobody_used(http, web_server):
    content = base64.b64decode(encoded(Image.new("RGBA", (8, 8))))
    for number in range(40):
        assert send_layer(http, "0", content, f"editor {number}").status_code == 200
    editors = [block for block in gc.get_objects() if type(block).__name__ == "ImageEditor"]
    assert editors and all(len(editor.blob_storage) <= 16 for editor in editors)


def send_layer(http, index, content, key):
    (editor,) = [item for item in http.get("/config").json()["components"] if item["type"] == "imageeditor"]
    form = {"type": "layer", "index": index, "id": key, "component_id": str(editor["id"]), "session_hash": "layers",
            "fn_name": "accept_blobs"}  # fmt: skip
    return http.post("/gradio_api/component_server", data=form, files={"file": ("blob", content, "image/png")})


def gradio_call(http, web_server, payload):
    config = http.get("/config").json()
    target = next(item for item in config["dependencies"] if len(item["inputs"]) == 1 and len(item["outputs"]) == 4)
    body = {"data": [payload], "fn_index": target["id"], "session_hash": "abcdefghij"}
    return http.post("/gradio_api/queue/join", json=body)


FILES = {
    "an address": {"path": "http://127.0.0.1:1/secret", "meta": {"_type": "gradio.FileData"}},
    "an address as its url": {"path": "", "url": "http://127.0.0.1:1/x", "meta": {"_type": "gradio.FileData"}},
    "a data address": {"path": "x", "url": "data:image/png;base64,AAAA", "meta": {"_type": "gradio.FileData"}},
    "a file of the machine": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    "a path that climbs": {"path": "../../../../etc/passwd", "meta": {"_type": "gradio.FileData"}},
    "one inside a list": [[{"image": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}]],
}


@pytest.mark.parametrize("kind", FILES)
def test_gradio_fetches_nothing_and_reads_no_file_on_a_clients_word(http, web_server, kind):
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.3)
        payload = json.loads(json.dumps(FILES[kind]).replace("127.0.0.1:1/", f"127.0.0.1:{trap.getsockname()[1]}/"))
        answer = gradio_call(http, web_server, payload)
        assert answer.status_code == 400 and answer.json()["detail"]
        with pytest.raises(TimeoutError):
            trap.accept()


def test_a_bomb_that_was_uploaded_is_refused_before_it_is_opened(http, web_server):
    data = base64.b64decode(bomb(10_000, 10_000))
    (path,) = http.post("/gradio_api/upload", files={"files": ("bomb.png", data, "image/png")}).json()
    answer = gradio_call(http, web_server, {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert answer.status_code == 400 and "1,000,000" in answer.json()["detail"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", ""]
)
def test_a_foreign_host_name_is_refused_on_a_local_server(http, host):
    assert http.get(BASE + "options", headers={"host": host}).status_code in (400, 403)


@pytest.mark.parametrize(
    "headers", [{"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}]
)
def test_other_sites_can_neither_send_nor_read(http, headers):
    assert http.post(BASE + "txt2img", json=OK, headers=headers).status_code == 403
    answer = http.get(BASE + "options", headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control-allow-origin")]
    preflight = http.options(BASE + "txt2img", headers=headers | {"access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in preflight.headers


def test_an_allowed_origin_may_call(start):
    url = start(cors_origins=("http://friend.example",)).url
    answer = httpx.post(url + BASE + "txt2img", json=OK, headers={"origin": "http://friend.example"}, timeout=60)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://friend.example"


@pytest.mark.parametrize("auth, status", [
    (None, 401), (("ann", "wrong"), 401), (("nobody", "secret:1"), 401), (("", ""), 401), (("ann", "secret:1"), 200),
    (("bob", "größe"), 200),
])  # fmt: skip
def test_every_route_asks_for_name_and_password(start, auth, status):
    url = start(users={"ann": "secret:1", "bob": "größe"}).url
    header = {}
    if auth is not None:
        header["authorization"] = "Basic " + base64.b64encode(":".join(auth).encode()).decode()
    for route in (BASE + "options", BASE + "progress", "/docs", "/openapi.json"):
        assert httpx.get(url + route, headers=header).status_code == status
    assert httpx.get(url + "/healthz").status_code == 200


@pytest.mark.parametrize("header", ["Basic", "Basic !!!", "Bearer abc", "Basic " + "A" * 100_000, "basic ", "\x00"])
def test_odd_credentials_are_wrong_credentials(start, header):
    url = start(users={"ann": "secret"}).url
    try:
        assert httpx.get(url + BASE + "options", headers={"authorization": header}).status_code in (400, 401, 431)
    except httpx.LocalProtocolError:
        pass  # not even httpx sends it


def test_accounts_see_and_stop_only_their_own(start):
    server = start(users={"ann": "a", "bob": "b"})
    ann, bob = (httpx.Client(base_url=server.url, auth=(name, name[0]), timeout=60) for name in ("ann", "bob"))
    with ann, bob:
        assert ann.post(BASE + "txt2img", json=OK | {"save_images": True}).status_code == 200
        assert len(server.backend.library.search("ann")) == 1
        assert server.backend.library.search("bob") == server.backend.library.search("") == []
        thread = threading.Thread(target=ann.post, args=(BASE + "txt2img",), kwargs={"json": OK | {"steps": 100}})
        thread.start()
        while not httpx.get(server.url + BASE + "progress", auth=("ann", "a")).json()["state"]["job_count"]:
            pass
        seen = bob.get(BASE + "progress").json()
        assert seen["state"]["job_count"] == 0 and seen["current_image"] is None
        assert bob.post(BASE + "interrupt").json() == {}
        (job,) = server.backend.queue.jobs()
        assert not job.cancelling.is_set()
        httpx.post(server.url + BASE + "interrupt", auth=("ann", "a"))
        thread.join(10)
        assert job.state == "cancelled"


@pytest.fixture(scope="module")
def guarded(tiny_pipeline_folder, tmp_path_factory):
    """A server with the page and two accounts."""
    outputs, users = tmp_path_factory.mktemp("guarded"), {"ann": "a", "bob": "b"}
    server = WebServer(Settings(port=0, model=str(tiny_pipeline_folder), outputs=outputs, users=users))
    server.start()
    yield server
    server.stop()


PAGE_ROUTES = [
    "GET /", "GET /config", "GET /gradio_api/info", "GET /theme.css", "GET /assets/x.js", "POST /gradio_api/upload",
    "GET /gradio_api/upload_progress?upload_id=x", "POST /gradio_api/queue/join", "POST /gradio_api/cancel",
    "GET /gradio_api/queue/data?session_hash=x", "GET /gradio_api/heartbeat/x", "POST /gradio_api/component_server",
    "GET /gradio_api/file=/tmp/x", "POST /gradio_api/reset", "POST /sdapi/v1/txt2img", "OPTIONS /sdapi/v1/txt2img",
    "GET //healthz/", "GET /healthz/../config",
]  # fmt: skip


@pytest.mark.parametrize("route", PAGE_ROUTES)
def test_every_route_of_the_page_asks_for_the_password_too(guarded, route):
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=30) as client:  # no library tidies the path
        client.sendall(f"{route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 401")


def test_a_websocket_is_not_opened(guarded):
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=30) as client:
        client.sendall(b"GET /gradio_api/queue/data HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
                       b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                       b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")  # fmt: skip
        assert client.recv(4096).startswith(b"HTTP/1.1 401")


def test_a_session_of_the_page_is_open_to_the_account_that_began_it_alone(guarded):
    ann, bob = (httpx.Client(base_url=guarded.url, auth=(name, name[0]), timeout=60) for name in ("ann", "bob"))
    call = {"data": [], "fn_index": 0, "session_hash": "annssession"}
    with ann, bob:
        assert ann.post("/gradio_api/queue/join", json=call).status_code == 200
        foreign = [
            bob.get("/gradio_api/queue/data", params={"session_hash": "annssession"}),
            bob.get("/gradio_api/heartbeat/annssession"),
            bob.post("/gradio_api/queue/join", json=call),
            bob.post("/gradio_api/cancel", json={"session_hash": "annssession", "fn_index": 0, "event_id": "x"}),
        ]
        for answer in foreign:
            refused(answer, 403, "somebody else's")


def test_an_allowed_site_may_ask_before_it_sends_a_password(start):
    url = start(users={"ann": "secret"}, cors_origins=("http://friend.example",)).url
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    answer = httpx.options(url + BASE + "txt2img", headers=asks | {"origin": "http://friend.example"})
    assert answer.status_code == 200 and "authorization" in answer.headers["access-control-allow-headers"].lower()
    assert httpx.options(url + BASE + "txt2img", headers=asks | {"origin": "http://evil.example"}).status_code == 401


def test_on_a_network_without_accounts_each_browser_and_each_program_has_its_own(start):
    server = start(host="0.0.0.0")
    first, second = ({"cookie": f"diptych_client={letter * 32}"} for letter in "ab")
    for headers in (first, second, {}):
        answer = httpx.post(server.url + BASE + "txt2img", json=OK | {"save_images": True}, headers=headers, timeout=60)
        assert answer.status_code == 200
    library = server.backend.library
    assert [len(library.search(owner)) for owner in ("a" * 32, "b" * 32, "address 127.0.0.1", "")] == [1, 1, 1, 0]
    gate = threading.Event()
    job = server.backend.queue.submit("api:address 127.0.0.1:", "", lambda job: iter([gate.wait(30)]))
    counts = [
        httpx.get(server.url + BASE + "progress", headers=headers, timeout=60).json()["state"]["job_count"]
        for headers in ({}, first)
    ]
    gate.set()
    assert counts == [1, 0] and job.wait(5)


def test_a_full_queue_is_told_with_its_limit(start):
    server = start(limits=Limits(waiting_jobs_per_client=1))
    gate = threading.Event()
    running = server.backend.queue.submit("api:127.0.0.1:", "", lambda job: iter([gate.wait(30)]))
    while running.state != "running":
        pass
    waiting = server.backend.queue.submit("api:127.0.0.1:", "", lambda job: ())
    answer = httpx.post(server.url + BASE + "txt2img", json=OK)
    refused(answer, 429, "at most 1")
    assert "retry-after" in answer.headers
    gate.set()
    assert waiting.wait(5)


def test_models_over_the_memory_budget_make_room_for_each_other(tiny_pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    shutil.copytree(tiny_pipeline_folder, tmp_path / "models" / "second")
    store = ModelStore(Settings(model=str(tiny_pipeline_folder), dtype="fp32"))
    first, second = store.checkpoint("tiny-model"), store.checkpoint("second")
    store.pipeline(first)
    (size,) = store.loaded().values()
    store.budget = size * 3 // 2
    again = store.pipeline(second)
    assert list(store.loaded()) == ["model second"]
    assert store.pipeline(second) is again
    store.budget = size * 3
    store.pipeline(first)
    assert list(store.loaded()) == ["model second", "model tiny-model"]


ASK = [sys.executable, "-m", "diptych", "ui", "--port", "0"]


@pytest.mark.parametrize("arguments, said", [
    (["--host", "0.0.0.0"], "--auth"), (["--auth", "ann"], "USER:PASS"), (["--port", "99999"], "port"),
    (["--memory", "-1"], "--memory"),
])  # fmt: skip
def test_a_start_that_makes_no_sense_ends_with_one_sentence(arguments, said, tmp_path):
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [*ASK, *arguments, "-o", str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_model_that_cannot_be_loaded_is_an_error_at_the_start(tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    server = WebServer(Settings(port=0, model=str(tmp_path / "damaged.safetensors"), outputs=tmp_path, page=False))
    with pytest.raises(DiptychError, match="damaged.safetensors"):
        server.warm_up()


def test_a_port_in_use_is_an_error_at_once(web_server, tmp_path, tiny_pipeline_folder):
    with pytest.raises(DiptychError, match="--port"):
        WebServer(Settings(port=web_server.port, outputs=tmp_path, model=str(tiny_pipeline_folder)))
