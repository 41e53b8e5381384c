"""An OpenAI-compatible endpoint on 127.0.0.1 for tests; it behaves, and misbehaves, as it is told."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes]


def said(text: str, tokens_in: int = 100, tokens_out: int = 10) -> Reply:
    """A well-formed answer."""
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return 200, json.dumps(body).encode()


def backwards(request: dict[str, Any]) -> Reply:
    """The candidates from the last to the first."""
    numbers = re.findall(r"^(\d+)\.", request["messages"][1]["content"].split("Candidates:")[1], re.MULTILINE)
    return said(", ".join(reversed(numbers)))


class Server:
    """An endpoint on 127.0.0.1; `behave` decides what comes back."""

    def __init__(self) -> None:
        self.behave: Callable[[dict[str, Any]], Reply] = backwards
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.open, self.most_open = 0, 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(request)
                    outer.keys.append(self.headers["Authorization"])
                    outer.open += 1
                    outer.most_open = max(outer.most_open, outer.open)
                status, body = outer.behave(request)
                with lock:
                    outer.open -= 1
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    # the client waits as long as it is told before it tries again
                    self.send_header("retry-after-ms", "1")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client had enough

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Ends the server."""
        self.http.shutdown()
        self.http.server_close()
