"""A Hub on the loopback: the one of ``hub_routes``, over real HTTP, with the faults of real networks."""

from __future__ import annotations

import math
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from hub_repos import RefusedError
from hub_routes import Answer, Hub, Request, refusal

PIECE = 1 << 14
"""Bytes between two looks at whether the connection is to be cut."""


class DroppedError(Exception):
    """The connection ends here, without an answer."""


@dataclass
class Fault:
    pattern: str
    status: int | None
    is_late: bool


class HubServer(Hub):
    """A ``Hub`` at ``url`` while its context lasts.

    Attributes:
        requests: those that came whole, as ``METHOD /path``.
    """

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.requests: list[str] = []
        self._faults: list[Fault] = []
        self._left = {"PUT": math.inf, "GET": math.inf}
        self._lock = threading.RLock()
        self._http: Any = None

    def __enter__(self) -> HubServer:
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.storage = f"http://localhost:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on there is nobody at its address."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def cut_uploads_after(self, num_bytes: float) -> None:
        """After so many bytes of large files from now, uploads of them lose their connection, until called
        with ``math.inf``.
        """
        self._left["PUT"] = num_bytes

    def cut_downloads_after(self, num_bytes: float) -> None:
        """As ``cut_uploads_after``, for what is read of large files."""
        self._left["GET"] = num_bytes

    def fail_next(self, pattern: str, status: int | None, is_late: bool = False) -> None:
        """The next request whose ``METHOD /path`` has this pattern fails.

        Args:
            pattern: a regular expression.
            status: what it is answered with; None loses the connection.
            is_late: what was asked for is done all the same.
        """
        self._faults.append(Fault(pattern, status, is_late))

    def take(self, direction: str, num_bytes: int) -> None:
        """Count bytes of large files on their way; raises ``DroppedError`` where they are to be cut."""
        with self._lock:
            self._left[direction] -= num_bytes
            if self._left[direction] < 0:
                raise DroppedError

    def answer(self, request: Request) -> Answer:
        asked = f"{request.method} {request.path}"
        with self._lock:
            self.requests.append(asked)
            fault = next((fault for fault in self._faults if re.search(fault.pattern, asked)), None)
            if fault is not None:
                self._faults.remove(fault)
                if fault.is_late:
                    self.respond(request)
                if fault.status is None:
                    raise DroppedError
                return refusal(RefusedError(fault.status, "This server was told to fail here"))
            return self.respond(request)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: HubServer

    def __init__(self, *arguments: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for connection in list(self.connections):  # those that the client keeps for its next request
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer with a body waits 40 ms for the client
    server: _Http

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (DroppedError, OSError):
            self.close_connection = True

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        is_storage = url.path.startswith("/storage/")
        body = self._body(is_storage)
        answer = self.server.hub.answer(Request(self.command, url.path, query, self.headers, body))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, quote(value, safe=" !\"#$%&'()*+,-./:;<=>?@[]_"))
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(answer.body), PIECE):
            piece = answer.body[start : start + PIECE]
            if is_storage:
                self.server.hub.take("GET", len(piece))
            self.wfile.write(piece)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _body(self, is_storage: bool) -> bytes:
        body, size = bytearray(), int(self.headers.get("Content-Length") or 0)
        while len(body) < size:
            piece = self.rfile.read(min(PIECE, size - len(body)))
            if not piece:
                raise DroppedError
            body += piece
            if is_storage:
                self.server.hub.take("PUT", len(piece))
        return bytes(body)

    def log_message(self, *_: object) -> None:
        """Requests are in ``HubServer.requests``."""


def use_hub(server: HubServer, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Let this process and its children know no other Hub, with a cache of their own, and never wait."""
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    environment = {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": server.token,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    for name, value in environment.items():
        patch.setenv(name, value)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        patch.delenv(name, raising=False)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, constant in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        patch.setattr(constants, name, constant)
    patch.setattr(hf_api.api, "endpoint", server.url)
    patch.setattr(import_module("huggingface_hub.utils.tqdm"), "HF_HUB_DISABLE_PROGRESS_BARS", True)
    # Between its tries of a failed request the client waits up to 23 s in all.
    for module in (_http, file_download):
        patch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The only Hub that this process and its children know."""
    with HubServer() as server:
        use_hub(server, tmp_path / "hf", monkeypatch)
        yield server
