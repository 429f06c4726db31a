"""A server on the loopback that speaks as much of W&B's API as the real SDK asks of it here.

It keeps what it is sent, and fails on demand: it hangs, refuses, breaks off or answers with errors.
"""

import base64
import gzip
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"
"""The one API key that it knows."""
ENTITY = "the-team"
Json = dict[str, Any]


@dataclass
class Run:
    """What the server knows of one run."""

    project: str
    name: str
    lines: list[str] = field(default_factory=list)
    """Its history, as it came."""
    config: Json = field(default_factory=dict)
    display_name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    alerts: list[Json] = field(default_factory=list)
    inits: int = 0
    """How often a process has begun to log it."""
    exit_codes: list[int] = field(default_factory=list)
    preempting: bool = False
    artifacts: list[Json] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)
    """Writers that sent system metrics in shared mode."""

    @property
    def rows(self) -> list[Json]:
        """Its history, without what the SDK adds to every row."""
        own = ("_step", "_runtime", "_timestamp")
        rows = [json.loads(line) for line in self.lines]
        return [{name: row[name] for name in row if name not in own} for row in rows]


class Stub:
    """The server; `fault` decides what becomes of a request that comes from now on."""

    def __init__(self) -> None:
        """Listen; `close` ends it."""
        self.fault: str | None = None
        """`hang`, `reset`, `500`, `429` or any other status. None: answers."""
        self.runs: dict[str, Run] = {}
        self.views: list[Json] = []
        self.uploads: dict[str, bytes] = {}
        self.received: list[bytes] = []
        """Every request: method, path, headers and body, without the Authorization header."""
        self.authorizations: set[str] = set()
        self.unknown: list[str] = []
        """GraphQL operations that it had no answer to."""
        self.lock = threading.Lock()
        self._closing = threading.Event()
        self._server = self._listen(0)
        self.port: int = self._server.server_address[1]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def run(self, name: str | None = None) -> Run:
        """Return a run, by default the only one."""
        if name is None:
            (only,) = self.runs.values()
            return only
        return self.runs[name]

    def refuse(self) -> None:
        """Stop listening: connections are refused from now on, and open ones broken off."""
        self.fault = "reset"
        self._server.shutdown()
        self._server.server_close()

    def listen_again(self) -> None:
        """Undo `refuse`."""
        self.fault = None
        self._server = self._listen(self.port)

    def close(self) -> None:
        """End the server and whatever hangs in it."""
        self._closing.set()
        self.refuse()

    def _listen(self, port: int) -> ThreadingHTTPServer:
        stub = self

        class Handler(_Handler):
            owner = stub

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            allow_reuse_address = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Keep the log of the tests free of clients that hang up."""

        server = Server(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def hang(self) -> None:
        """Keep a request waiting for as long as `fault` says so."""
        while self.fault == "hang" and not self._closing.is_set():
            time.sleep(0.05)

    def graphql(self, operation: str, variables: Json) -> Json:
        """Return the data of an answer."""
        answer = getattr(self, f"_on_{operation.lower()}", None)
        if answer is None:
            self.unknown.append(operation)
            return {}
        with self.lock:
            found: Json = answer(variables)
            return found

    def file_stream(self, run: Run, body: Json) -> None:
        """Take rows and the end of a run; rows lie where their offset says."""
        with self.lock:
            files = body.get("files") or {}
            history = files.get("wandb-history.jsonl")
            if history:
                begin, content = history["offset"], history["content"]
                assert begin <= len(run.lines), "a gap in the history"
                run.lines[begin : begin + len(content)] = content
            for line in files.get("wandb-events.jsonl", {}).get("content", ()):
                run.labels |= set(re.findall(r"/l:([\w.-]+)", line))
            run.preempting |= bool(body.get("preempting"))
            if body.get("complete"):
                run.exit_codes.append(body.get("exitcode", 0))

    def _on_viewer(self, _variables: Json) -> Json:
        return {"viewer": {"id": "V", "username": "someone", "email": "", "entity": ENTITY,
                           "admin": False, "flags": "{}", "teams": {"edges": []},
                           "apiKeys": {"edges": []}}}  # fmt: skip

    def _on_getdefaultentity(self, _variables: Json) -> Json:
        return {"viewer": {"id": "V", "entity": ENTITY}}

    def _on_runresumestatus(self, variables: Json) -> Json:
        project = {"id": "P", "name": variables["project"], "entity": {"id": "E", "name": ENTITY}}
        run = self.runs.get(variables["name"])
        if run is None or run.project != variables["project"]:
            return {"model": {**project, "bucket": None}}
        bucket = {
            "id": "B", "name": run.name, "summaryMetrics": "{}", "displayName": run.display_name,
            "logLineCount": 0, "historyLineCount": len(run.lines), "eventsLineCount": 0,
            "historyTail": json.dumps(run.lines[-1:]), "eventsTail": "[]", "tags": run.tags,
            "config": json.dumps(run.config), "notes": None, "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        return {"model": {**project, "bucket": bucket}}

    def _on_upsertbucket(self, variables: Json) -> Json:
        name = variables["name"]
        run = self.runs.get(name)
        inserted = run is None
        if run is None:
            run = self.runs[name] = Run(variables["project"], name)
        if variables.get("displayName"):
            run.inits += 1
            run.display_name, run.group = variables["displayName"], variables.get("groupName")
            run.tags = list(variables.get("tags") or ())
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        project = {"id": "P", "name": run.project, "entity": {"id": "E", "name": ENTITY}}
        bucket = {"id": "B", "name": name, "displayName": run.display_name, "description": "",
                  "config": json.dumps(run.config), "sweepName": None, "project": project,
                  "historyLineCount": len(run.lines)}  # fmt: skip
        return {"upsertBucket": {"inserted": inserted, "bucket": bucket}}

    def _on_run(self, variables: Json) -> Json:
        """Answer wandb.Api().run(...)."""
        run = self.runs.get(variables["name"])
        if run is None:
            return {"project": {"internalId": "1", "run": None}}
        found = {
            "id": "B", "tags": run.tags, "name": run.name, "displayName": run.display_name,
            "sweepName": None, "state": "finished", "config": json.dumps(run.config),
            "group": run.group, "jobType": None, "commit": None, "readOnly": False,
            "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00",
            "description": "", "notes": None, "systemMetrics": "{}", "summaryMetrics": "{}",
            "historyLineCount": len(run.lines), "user": {"name": "someone", "username": "someone"},
            "historyKeys": None, "projectId": "1",
        }  # fmt: skip
        return {"project": {"internalId": "1", "run": found}}

    def _on_runhistorykeys(self, variables: Json) -> Json:
        run = self.runs[variables["name"]]
        last = json.loads(run.lines[-1])["_step"] if run.lines else -1
        return {"project": {"run": {"historyKeys": {"lastStep": last, "keys": {}, "sets": []}}}}

    def _on_artifacttype(self, _variables: Json) -> Json:
        return {"project": {"artifact": None}}

    def _on_serverfeaturesquery(self, _variables: Json) -> Json:
        return {"serverInfo": {"features": []}}

    def _on_createartifact(self, variables: Json) -> Json:
        asked = variables["input"]
        run = self.runs[asked["runName"]]
        known = [one for one in run.artifacts if one["digest"] == asked["digest"]]
        if not known:
            name, kind = asked["artifactCollectionName"], asked["artifactTypeName"]
            number = sum(len(one.artifacts) for one in self.runs.values())
            known = [{"id": f"A{number}", "name": name, "type": kind,
                      "digest": asked["digest"], "state": "PENDING", "files": {}}]  # fmt: skip
            run.artifacts += known
        sequence = {"latestArtifact": None}
        return {"createArtifact": {"artifact": {**known[0], "artifactSequence": sequence}}}

    def _artifact(self, identifier: str) -> Json:
        found: Json = next(one for run in self.runs.values() for one in run.artifacts
                           if one["id"] == identifier)  # fmt: skip
        return found

    def _on_createartifactmanifest(self, variables: Json) -> Json:
        upload = f"{self.url}/put/{variables['artifactID']}/manifest"
        file = {"id": "F", "name": "manifest", "displayName": "manifest", "uploadUrl": upload,
                "uploadHeaders": [], "storagePath": "m"}  # fmt: skip
        manifest = {"id": "M", "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _on_createartifactfiles(self, variables: Json) -> Json:
        nodes = []
        for asked in variables.get("artifactFiles") or variables["input"]["artifactFiles"]:
            self._artifact(asked["artifactID"])["files"][asked["name"]] = asked["md5"]
            upload = f"{self.url}/put/{asked['artifactID']}/{asked['name']}"
            nodes.append({"node": {
                "id": "F", "name": asked["name"], "displayName": asked["name"],
                "uploadUrl": upload, "uploadHeaders": [], "storagePath": asked["name"],
                "uploadMultipartUrls": None, "artifact": {"id": asked["artifactID"]},
            }})  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _on_artifactbyid(self, variables: Json) -> Json:
        one = self._artifact(variables["id"])
        project = {"id": "P", "internalId": "1", "name": "p", "entity": {"name": ENTITY}}
        collection = {"__typename": "ArtifactSequence", "name": one["name"], "project": project}
        return {"artifact": {
            "__typename": "Artifact", "id": one["id"], "artifactSequence": collection,
            "versionIndex": 0, "artifactType": {"name": one["type"]}, "description": None,
            "metadata": None, "ttlDurationSeconds": -1, "ttlIsInherited": True, "tags": [],
            "historyStep": None, "state": one["state"], "size": 1, "digest": one["digest"],
            "commitHash": "c", "fileCount": len(one["files"]), "createdAt": "2026-01-01T00:00:00",
            "updatedAt": None, "aliases": [],
        }}  # fmt: skip

    def _on_commitartifact(self, variables: Json) -> Json:
        artifact = self._artifact(variables["artifactID"])
        artifact["state"] = "COMMITTED"
        return {
            "commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}
        }

    def _on_view(self, variables: Json) -> Json:
        wanted = [view for view in self.views if view["name"] == variables["viewName"]]
        nodes = [{k: view[k] for k in ("id", "displayName", "spec")} for view in wanted]
        if variables["name"] not in {run.project for run in self.runs.values()}:
            return {"project": None}
        return {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}

    def _on_upsertview2(self, variables: Json) -> Json:
        if variables.get("id"):
            (view,) = [view for view in self.views if view["id"] == variables["id"]]
            view |= variables
        else:
            view = {**variables, "id": f"W{len(self.views)}"}
            self.views.append(view)
        shown = {"id": view["id"], "name": view["name"]}
        return {"upsertView": {"view": shown, "inserted": not variables.get("id")}}

    def _on_organizationcoreweaveorganizationid(self, _variables: Json) -> Json:
        return {"entity": None}

    def _on_createrunfiles(self, variables: Json) -> Json:
        files = [{"name": name, "uploadUrl": f"{self.url}/put/run/{name}"}
                 for name in variables["files"]]  # fmt: skip
        return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}

    def _on_notifyscriptablerunalert(self, variables: Json) -> Json:
        self.runs[variables["runName"]].alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}


class _Handler(BaseHTTPRequestHandler):
    owner: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        stub = self.owner
        body = self._body()
        kept = "\n".join(f"{k}: {v}" for k, v in self.headers.items() if k != "Authorization")
        with stub.lock:
            stub.received.append(f"{self.command} {self.path}\n{kept}\n\n".encode() + body)
            stub.authorizations.add(self.headers.get("Authorization", ""))
        if stub.fault == "hang":
            stub.hang()
        if stub.fault == "reset":
            linger = struct.pack("ii", 1, 0)  # close() then resets the connection
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.shutdown(socket.SHUT_RD)
            self.close_connection = True
            self.connection.close()
            return
        if stub.fault is not None and stub.fault.isdecimal():
            self._answer({"error": "on demand"}, status=int(stub.fault))
            return
        if self.command == "PUT":
            stub.uploads[self.path.removeprefix("/put/")] = body
            self._answer({})
        elif not self._is_known():
            self._answer({"errors": [{"message": "user is not logged in"}]}, status=401)
        elif self.path == "/graphql":
            asked = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            operation = asked.get("operationName") or (named.group(1) if named else "")
            self._answer({"data": stub.graphql(operation, asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            stub.file_stream(stub.runs[self.path.split("/")[-2]], json.loads(body))
            self._answer({})
        else:
            self._answer({}, status=404)

    do_GET = do_POST = do_PUT = _handle

    def _is_known(self) -> bool:
        scheme, _, text = self.headers.get("Authorization", "").partition(" ")
        with suppress(ValueError):
            return scheme == "Basic" and base64.b64decode(text).decode().partition(":")[2] == KEY
        return False

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, content: Json, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def wandb_stub() -> Iterator[Stub]:
    """Run a server for the length of a `with`."""
    stub = Stub()
    try:
        yield stub
    finally:
        stub.close()
