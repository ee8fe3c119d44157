"""What Hugging Face's hub answers to whoever uploads, on this machine."""

import base64
import http.server
import json
import re

from tests import web

TOKEN = "hf_writes"


class Hub(web.Server):
  """Keeps what is committed, by repository and path, in `files`.

  Attributes:
    repos: those that are there.
    large: what was uploaded of large files, by the SHA-256 of their content.
    tokens: those that were shown.
  """

  handler = property(lambda self: _Handler)

  def __init__(self):
    super().__init__()
    self.repos: set[str] = set()
    self.large: dict[str, bytes] = {}
    self.tokens: set[str] = set()


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Hub

  def do_POST(self) -> None:
    content = self.rfile.read(int(self.headers["Content-Length"]))
    token = self.headers.get("Authorization", "").removeprefix("Bearer ")
    self.server.tokens.add(token)
    if token != TOKEN:
      return self._answer({"error": "Invalid username or password."}, 401)
    for pattern, answer in (
      ("/api/repos/create", self._create),
      ("/api/validate-yaml", self._validate),
      ("/api/models/(.+)/preupload/main", self._preupload),
      ("/(.+).git/info/lfs/objects/batch", self._batch),
      ("/api/models/(.+)/commit/main", self._commit),
    ):
      match = re.fullmatch(pattern, self.path)
      if match:
        return self._answer(answer(content, *match.groups()))
    return self._answer({"error": "Not found"}, 404)

  def do_PUT(self) -> None:
    content = self.rfile.read(int(self.headers["Content-Length"]))
    self.server.large[self.path.removeprefix("/large/")] = content
    self._answer({})

  def _create(self, content):
    asked = json.loads(content)
    repo = f"{asked['organization']}/{asked['name']}"
    self.server.repos.add(repo)
    return {"url": f"{self.server.url}/{repo}"}

  def _validate(self, content):
    assert json.loads(content)["content"]
    return {"errors": [], "warnings": []}

  def _preupload(self, content, repo):
    files = [
      {
        "path": file["path"],
        "uploadMode": "lfs" if file["path"].endswith("tensors") else "regular",
        "shouldIgnore": False,
      }
      for file in json.loads(content)["files"]
    ]
    return {"files": files}

  def _batch(self, content, repo):
    actions = [
      {**one, "actions": {"upload": {"href": self._large(one["oid"])}}}
      for one in json.loads(content)["objects"]
    ]
    return {"transfer": "basic", "objects": actions}

  def _large(self, oid):
    return f"{self.server.url}/large/{oid}"

  def _commit(self, content, repo):
    assert repo in self.server.repos
    for line in map(json.loads, content.splitlines()):
      value = line["value"]
      if line["key"] == "file":
        kept = base64.b64decode(value["content"])
      elif line["key"] == "lfsFile":
        kept = self.server.large[value["oid"]]
      else:
        continue
      self.server.files[f"{repo}/{value['path']}"] = kept
    return {
      "commitUrl": f"{self.server.url}/{repo}/commit/abc",
      "commitOid": "abc",
    }

  def _answer(self, value, status=200):
    content = json.dumps(value).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *_) -> None:
    pass
