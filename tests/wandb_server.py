"""A stand-in for a W&B server on the loopback device: enough for runs, resuming, files and artifacts."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40
"""An API key of the right form."""
ENTITY = {"id": "entity", "name": "tester"}


class WandbServer:
    """Accepts everything and remembers it; a context, listening inside.

    Args:
        dies_at_history: stop answering when the first metrics come.
    """

    def __init__(self, dies_at_history: bool = False) -> None:
        self.started: list[str] = []
        """Ids of runs, each time that one starts."""
        self.history: dict[str, list[dict[str, Any]]] = {}
        """Rows by run id."""
        self.config: dict[str, Any] = {}
        self.artifact_types: list[str] = []
        self.uploads: dict[str, int] = {}
        """Sizes of files by name."""
        self.dies_at_history, self.dead = dies_at_history, False
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer a query; operations that do not matter here get nothing."""
        answer = getattr(self, f"answer_{operation}", None)
        return {} if answer is None else answer(variables)

    def answer_Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        person = {"id": "user", "username": "tester", "entity": "tester", "email": "", "flags": "{}"}
        return {"viewer": {**person, "teams": {"edges": []}}}

    def answer_ServerFeaturesQuery(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def answer_(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The type of an artifact that the name has had before: none."""
        return {"project": None}

    def answer_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name, bucket = variables["name"], None
        if name in self.started:
            rows = self.history.get(name, [])
            bucket = {
                **{"id": name, "name": name, "displayName": name, "summaryMetrics": "{}", "config": "{}"},
                **{"logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0, "tags": []},
                **{"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]"},
                "wandbConfig": '{"t": 1}',
            }
        return {"model": {"id": "p", "name": "project", "entity": ENTITY, "bucket": bucket}}

    def answer_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = variables["name"]
        if variables["program"]:  # not an update of a run that is going on
            self.started.append(name)
        self.config.update(json.loads(variables["config"] or "{}"))
        bucket = {
            **{"id": name, "name": name, "displayName": name, "description": "", "config": "{}"},
            **{"sweepName": None, "historyLineCount": len(self.history.get(name, []))},
            "project": {"id": "p", "name": variables["project"], "entity": ENTITY},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": self.started.count(name) < 2}}

    def answer_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}

    def answer_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.artifact_types.append(variables["input"]["artifactTypeName"])
        sequence = {"id": "sequence", "latestArtifact": None}
        artifact = {"id": "artifact", "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def answer_CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        file = {"id": "file", "uploadUrl": f"{self.url}/manifest", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "manifest", "file": file}}}

    def answer_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        nodes = [
            {
                **{"storagePath": "path", "uploadUrl": f"{self.url}/{file['name']}", "uploadHeaders": []},
                **{"uploadMultipartUrls": None, "artifact": {"id": "artifact"}},
            }
            for file in variables["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def answer_UpdateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        file = {"id": "file", "uploadUrl": f"{self.url}/manifest", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": "manifest", "file": file}}}

    def answer_CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"commitArtifact": {"artifact": {"id": "artifact", "digest": "digest"}}}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Take lines of a run's files."""
        lines = files.get("wandb-history.jsonl", {"content": []})["content"]
        if lines and self.dies_at_history:
            self.dead = True
            return
        self.history.setdefault(run, []).extend(json.loads(line) for line in lines)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: WandbServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # a client that gave up
            self.close_connection = True

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def _answer(self, content: dict[str, Any]) -> None:
        if self.stand_in.dead:
            self.close_connection = True
            return
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self.stand_in.uploads[self.path.lstrip("/")] = len(self._body())
        self._answer({})

    def do_POST(self) -> None:
        body, answer = self._body(), {}
        if self.path.endswith("/graphql") and not self.stand_in.dead:
            query = json.loads(body)
            operation, variables = query.get("operationName") or "", query.get("variables") or {}
            answer = {"data": self.stand_in.graphql(operation, variables)}
        elif "/file_stream" in self.path:
            self.stand_in.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
            answer = {"limits": {}}
        self._answer(answer)
