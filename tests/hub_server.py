"""A little Hugging Face hub on loopback, with just what the hub client asks of one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repos: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repositories; yields the address and a growing list of files sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(head=True)

        def do_GET(self) -> None:
            self.answer(head=False)

        def answer(self, head: bool) -> None:
            path = self.path.partition("?")[0]
            for repo, folder in repos.items():
                files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*.*"))
                if path.startswith(f"/api/models/{repo}/tree/"):
                    tree = [
                        {
                            "type": "file",
                            "path": name,
                            "size": (folder / name).stat().st_size,
                            "oid": etag(folder / name),
                        }
                        for name in files
                    ]
                    return self.send(json.dumps(tree).encode(), "application/json", head)
                if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
                    siblings = [{"rfilename": name} for name in files]
                    info = {"id": repo, "sha": SHA, "siblings": siblings}
                    return self.send(json.dumps(info).encode(), "application/json", head)
                for name in files:
                    if path in (f"/{repo}/resolve/{SHA}/{name}", f"/{repo}/resolve/main/{name}"):
                        if not head:
                            sent.append(name)
                        data = (folder / name).read_bytes()
                        return self.send(
                            data, "application/octet-stream", head, etag(folder / name)
                        )
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def send(self, data: bytes, kind: str, head: bool, tag: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", SHA)
            if tag:
                self.send_header("ETag", f'"{tag}"')
            self.end_headers()
            if not head:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
