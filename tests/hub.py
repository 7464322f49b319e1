"""A stand-in for the Hub's HTTP interface on this machine: what an upload asks, answered from memory."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

from huggingface_hub import constants


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a dict of files; `broken` refuses that many commits first.

    Attributes:
        files: What was committed, by repository.
        tokens: Every Authorization header seen.
        private: Whether each repository was made private.
    """

    daemon_threads = True

    def __init__(self, broken=0):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.broken, self.files, self.tokens, self.private = broken, {}, set(), {}

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def _say(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._say({"name": "somebody", "type": "user", "siblings": [], "id": "somebody/small"})

    def do_POST(self):
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            hub.files.setdefault(name, {})
            hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
            kind = "datasets/" if asked.get("type") == "dataset" else ""
            self._say({"url": f"{hub.address}/{kind}{name}", "name": name, "id": "1"})
        elif self.path == "/api/validate-yaml":
            self._say({"warnings": [], "errors": []})
        elif found := re.fullmatch(r"/api/(?:models|datasets)/(.+)/preupload/main", self.path):
            asked = json.loads(body)["files"]
            have = hub.files[found[1]]
            self._say(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "regular",
                            "shouldIgnore": False,
                            "oid": have.get(file["path"], {}).get("oid"),
                        }
                        for file in asked
                    ]
                }
            )
        elif found := re.fullmatch(r"/api/(?:models|datasets)/(.+)/commit/main", self.path):
            if hub.broken:
                hub.broken -= 1
                self._say({"error": "storage is full"}, status=403)
                return
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    hub.files[found[1]][entry["value"]["path"]] = {"content": content, "oid": None}
            self._say({"commitUrl": f"{hub.address}/{found[1]}/commit/abc", "commitOid": "abc" * 13 + "a"})
        else:
            self._say({"error": f"no such place: {self.path}"}, status=404)


@contextlib.contextmanager
def hub(broken=0, token="hf_x"):
    """Run it, as the Hub that this process knows: what HF_ENDPOINT and HF_TOKEN do when a process starts."""
    server = Hub(broken)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    here = mock.patch.multiple(constants, ENDPOINT=server.address, HF_HUB_OFFLINE=False)
    try:
        with here, mock.patch.dict(os.environ, {"HF_TOKEN": token}):
            yield server
    finally:
        server.shutdown()
        server.server_close()
