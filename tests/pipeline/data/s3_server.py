"""A real S3 server (moto's) behind a proxy that loses connections, fails and damages bytes."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import remote

Trouble = Callable[[str, int], str]


class Proxy:
    """Forwards to `port`; `trouble(path, count)` says what befalls the count-th read of a path.

    "" nothing, "error" an answer of 503, "drop" half an answer, "flip" one bit of it wrong.
    """

    def __init__(self, port: int) -> None:
        self.trouble: Trouble = lambda path, count: ""
        self.reads: Counter[str] = Counter()
        self.port = port
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                what = ""
                if self.command == "GET" and "list-type" not in self.path:
                    path = self.path.partition("?")[0]
                    proxy.reads[path] += 1
                    what = proxy.trouble(path, proxy.reads[path])
                if what == "error":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                server = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                server.request(self.command, self.path, body, dict(self.headers))
                answer = server.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if what == "flip" and name.lower().startswith("x-amz-checksum"):
                        # Without it nothing but the manifest's hash can tell.
                        continue
                    if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                        self.send_header(name, value)
                self.end_headers()
                if what == "drop":
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                    return
                if what == "flip" and content:
                    content = bytes([content[0] ^ 1]) + content[1:]
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_POST = forward

            def log_message(self, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def client(self) -> Any:
        """Of the server itself, past all trouble."""
        import boto3

        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@contextlib.contextmanager
def serving(folder: Path, bucket: str) -> Iterator[Proxy]:
    """The proxy before a server whose bucket holds every file of `folder`; s3fs goes there."""
    s3fs = pytest.importorskip(
        "s3fs", reason="s3fs is not installed; pip install 'isoflop[cluster]'"
    )
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # Its own patience is not what is tested.
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr(remote, "_FIRST_WAIT", 0.01)
        server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        _, port = server.get_host_and_port()
        proxy = Proxy(port)
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        # fsspec would give out the file system of another test, with that one's server.
        s3fs.S3FileSystem.clear_instance_cache()
        client = proxy.client()
        client.create_bucket(Bucket=bucket)
        for file in folder.rglob("*"):
            if file.is_file():
                name = file.relative_to(folder).as_posix()
                client.put_object(Bucket=bucket, Key=name, Body=file.read_bytes())
        yield proxy
        proxy.server.shutdown()
        proxy.server.server_close()
        server.stop()
