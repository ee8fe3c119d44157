"""A web server in a thread, which breaks off, or can't resume, when told to."""

import contextlib
import hashlib
import http.server
import re
import threading
from collections.abc import Iterator


class Server(http.server.ThreadingHTTPServer):
  """Serves `files`, and keeps what it was asked for.

  Attributes:
    files: content by path.
    breaks: how many bytes it sends of each of the next answers before it hangs
      up; once they are used up it sends all.
    ranges: whether it can send a file from its middle on.
    headers: sent with each answer.
    asked: (path, first byte) of each request.
  """

  daemon_threads = True

  @property
  def handler(self) -> type[http.server.BaseHTTPRequestHandler]:
    return _Handler

  def __init__(self):
    super().__init__(("127.0.0.1", 0), self.handler)
    self.files: dict[str, bytes] = {}
    self.breaks: list[int] = []
    self.ranges = True
    self.headers: dict[str, str] = {}
    self.asked: list[tuple[str, int]] = []

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Server

  def do_HEAD(self) -> None:
    content = self.server.files.get(self.path)
    if content is None:
      return self.send_error(404, "EntryNotFound")
    self.send_response(200)
    self.send_header("Content-Length", str(len(content)))
    self._end()

  def _end(self) -> None:
    # The hub's cache takes files of one ETag for the same.
    etag = hashlib.md5(self.path.encode()).hexdigest()
    self.send_header("ETag", f'"{etag}"')
    for name, value in self.server.headers.items():
      self.send_header(name, value)
    self.end_headers()

  def do_GET(self) -> None:
    match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
    start = int(match[1]) if match else 0
    self.server.asked.append((self.path, start))
    content = self.server.files.get(self.path)
    if content is None:
      return self.send_error(404)
    if start >= len(content) > 0 and self.server.ranges and match:
      return self.send_error(416)
    if match and self.server.ranges:
      self.send_response(206)
      end = len(content) - 1
      self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
      content = content[start:]
    else:
      self.send_response(200)
    self.send_header("Content-Length", str(len(content)))
    self._end()
    breaks = self.server.breaks
    self.wfile.write(content[: breaks.pop(0)] if breaks else content)

  def log_message(self, *_) -> None:
    pass


@contextlib.contextmanager
def serving(kind: type[Server] = Server) -> Iterator[Server]:
  with kind() as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()
