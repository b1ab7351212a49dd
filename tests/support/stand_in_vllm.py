"""A server in the place of vLLM's, for what stands around it: `python -m tests.support.stand_in_vllm PORT`.

It serves the base "base" and adapters "a0" to "a9". An answer, after 0.2 s, is the model's name and the server's port;
a stream has it in five events.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER_S = 0.2
PIECES = 5


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/metrics":
            port = self.server.server_address[1]
            page = f'# HELP port Its own.\n# TYPE port gauge\nport{{model_name="base"}} {port}\n'
            self._send(200, "text/plain", page.encode())
            return
        self._answer(200, {"data": [{"id": "base", "parent": None}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        name = asked["model"]
        if name != "base" and not (len(name) == 2 and name[0] == "a" and name[1].isdigit()):
            self._answer(404, {"error": {"message": f"The model `{name}` does not exist.", "code": 404}})
            return
        answer = {"model": name, "port": self.server.server_address[1]}
        if not asked.get("stream"):
            time.sleep(ANSWER_S)
            self._answer(200, answer)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in [json.dumps(answer)] * PIECES + ["[DONE]"]:
            time.sleep(ANSWER_S / PIECES)
            data = f"data: {event}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _answer(self, status: int, body: Any) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


if __name__ == "__main__":
    _Server(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()
