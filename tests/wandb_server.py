"""A pretended W&B server: it keeps what it is sent, and can fail as real ones do."""

import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Run:
    """What the server has of one run. `history`: line -> row."""

    history: dict[int, dict] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    display_name: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    sweep: str | None = None
    commit: str | None = None
    program: str | None = None
    state: str = "running"
    exit_code: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)  # name -> content, such as media

    def rows(self) -> list[dict]:
        """The history, in order."""
        return [self.history[line] for line in sorted(self.history)]

    def epochs(self) -> list[int]:
        return [row["epoch"] for row in self.rows() if "epoch" in row]


@dataclass
class Artifact:
    """One version of an artifact, and the ids of the runs that logged it and that used it."""

    id: str
    name: str
    type: str
    digest: str
    metadata: dict[str, Any]
    aliases: set[str] = field(default_factory=set)
    logged_by: list[str] = field(default_factory=list)
    used_by: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    state: str = "PENDING"


VARIABLES = {
    "project": "project",
    "entity": "entity",
    "groupName": "group",
    "jobType": "job_type",
    "tags": "tags",
    "displayName": "display_name",
    "notes": "notes",
    "sweep": "sweep",
    "commit": "commit",
    "program": "program",
}


class Server(ThreadingHTTPServer):
    """As much of W&B's interface as a run, `wandb sync` and `wandb agent` need.

    runs: run id -> what is known of it.
    requests: each GraphQL operation (such as "UpsertBucket") with its variables, in order.
    errors: operation ("FileStream" for the stream of history; "*" for all) -> (status, message),
    which is answered instead.
    gate: while it is cleared nothing is answered.
    command: that of a sweep.
    commands: what a `wandb agent` is to do next, such as
    {"type": "run", "run_id": "x", "program": "kd", "args": {...}}.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.runs: dict[str, Run] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.artifacts: list[Artifact] = []  # one for each name and digest, as on W&B's server
        self.alerts: list[dict[str, Any]] = []
        self.errors: dict[str, tuple[int, str]] = {}
        self.command: list[str] = []
        self.commands: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.gone = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def history(self) -> dict[str, dict[int, dict]]:
        """Run id -> line -> row, of the runs that have any."""
        return {name: run.history for name, run in self.runs.items() if run.history}

    def of(self, job_type: str) -> list[Run]:
        """The runs of that job type, such as "teacher"."""
        return [run for run in self.runs.values() if run.job_type == job_type]

    def begin(self) -> None:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def go_away(self) -> None:
        """From now on close every connection without an answer, as a proxy whose server is gone."""
        self.gone = True

    def come_back(self) -> None:
        self.gone = False

    def end(self) -> None:
        self.gate.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that does not wait for the answer is no error here."""

    def answer(self, operation: str, asked: dict[str, Any]) -> Any:
        name = str(asked.get("name"))
        if operation == "RunResumeStatus":
            return {"model": self._resume(name)}
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": self._upsert(name, asked), "inserted": True}}
        if "Artifact" in operation:
            return self._artifact(operation, asked.get("input") or asked)
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(asked)
            return {"notifyScriptableRunAlert": {"success": True}}
        if operation == "CreateRunFiles":
            run = asked.get("run") or asked.get("runName") or name
            files = [
                {"name": file, "uploadUrl": f"{self.url}/upload/{run}/{file}"}
                for file in asked["files"]
            ]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if operation == "SweepWithRuns":
            config = json.dumps(
                {"program": "kd", "command": self.command, "method": "random", "parameters": {}}
            )
            sweep = {
                "id": "s",
                "name": asked["sweep"],
                "state": "RUNNING",
                "config": config,
                "runs": {"edges": []},
            }
            return {"project": {"sweep": sweep}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent"}}}
        if operation == "Heartbeat":
            commands, self.commands = self.commands[:1], self.commands[1:]
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        return {
            "viewer": {
                "id": "v",
                "username": "me",
                "entity": "me",
                "flags": "{}",
                "teams": {"edges": []},
            }
        }

    def models(self) -> list[Artifact]:
        """The artifacts of weights."""
        return [artifact for artifact in self.artifacts if artifact.type == "model"]

    def _artifact(self, operation: str, asked: dict[str, Any]) -> Any:
        known = {artifact.id: artifact for artifact in self.artifacts}
        if operation == "CreateArtifact":
            artifact = self._created(asked)
            version = {
                "id": artifact.id,
                "state": artifact.state,
                "artifactSequence": {"latestArtifact": None},
            }
            return {"createArtifact": {"artifact": version}}
        if operation == "CreateArtifactManifest":
            file = {
                "uploadUrl": f"{self.url}/manifest/{asked['artifactID']}/manifest.json",
                "uploadHeaders": [],
            }
            return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if operation == "CreateArtifactFiles":
            edges = []
            for file in asked["artifactFiles"]:
                id_, name = file["artifactID"], file["name"]
                node = {
                    "id": "f",
                    "name": name,
                    "storagePath": name,
                    "uploadHeaders": [],
                    "artifact": {"id": id_},
                }
                edges.append({"node": {**node, "uploadUrl": f"{self.url}/artifact/{id_}/{name}"}})
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation == "CommitArtifact":
            known[asked["artifactID"]].state = "COMMITTED"
            return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}
        if operation == "UseArtifact":
            known[asked["artifactID"]].used_by.append(asked["runName"])
            return {"useArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}
        return {"project": None}  # no such artifact

    def _created(self, asked: dict[str, Any]) -> Artifact:
        name, digest = asked["artifactCollectionName"], asked["digest"]
        for artifact in self.artifacts:
            if (artifact.name, artifact.digest) == (name, digest):
                break
        else:
            metadata = json.loads(asked.get("metadata") or "{}")
            artifact = Artifact(
                f"a{len(self.artifacts)}", name, asked["artifactTypeName"], digest, metadata
            )
            self.artifacts.append(artifact)
        artifact.aliases |= {alias["alias"] for alias in asked.get("aliases") or ()}
        artifact.logged_by.append(asked["runName"])
        return artifact

    def _resume(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        tail = json.dumps([json.dumps(run.history[max(run.history)])] if run.history else [])
        config = {key: {"value": value} for key, value in run.config.items()}
        bucket = {
            "id": "b",
            "name": name,
            "displayName": run.display_name or "",
            "tags": run.tags,
            "summaryMetrics": json.dumps(run.summary),
            "config": json.dumps(config),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyLineCount": len(run.history),
            "historyTail": tail,
            "eventsTail": "[]",
            "wandbConfig": '{"t": 1}',
        }
        return {**self._place(run), "bucket": bucket}

    def _place(self, run: Run) -> dict[str, Any]:
        return {
            "id": "p",
            "name": run.project or "kd",
            "entity": {"id": "e", "name": run.entity or "me"},
        }

    def _upsert(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(name, Run())
        for variable, attribute in VARIABLES.items():
            if asked.get(variable) is not None:
                setattr(run, attribute, asked[variable])
        if asked.get("config"):
            run.config = {key: node["value"] for key, node in json.loads(asked["config"]).items()}
        if asked.get("summaryMetrics"):
            run.summary |= json.loads(asked["summaryMetrics"])
        run.state = "running"
        bucket = {
            "id": "b",
            "name": name,
            "displayName": run.display_name or "",
            "description": "",
            "config": "{}",
        }
        # Without `resume` a run begins anew.
        bucket |= {"sweepName": run.sweep, "historyLineCount": 0}
        return {**bucket, "project": self._place(run)}

    def stream(self, name: str, sent: dict[str, Any]) -> Any:
        run = self.runs.setdefault(name, Run())
        files = sent.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            for number, line in enumerate(history["content"], history["offset"]):
                run.history[number] = json.loads(line)
        if summary := files.get("wandb-summary.json"):
            run.summary = json.loads(summary["content"][-1])
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode") or 0
            run.state = "failed" if run.exit_code else "finished"
        return {"exitcode": None, "limits": {}}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
        sent = json.loads(body) if body[:1] == b"{" else {}
        streamed = self.path.endswith("/file_stream")
        operation = "FileStream" if streamed else _operation(sent.get("query", ""))
        self.server.gate.wait()
        if self.server.gone:
            self.close_connection = True
            return
        self.server.requests.append((operation, sent if streamed else sent.get("variables") or {}))
        if error := self.server.errors.get(operation) or self.server.errors.get("*"):
            status, message = error
            self._send(status, {"errors": [{"message": message}], "error": message})
        elif streamed:
            self._send(200, self.server.stream(self.path.split("/")[-2], sent))
        else:
            self._send(200, {"data": self.server.answer(operation, sent.get("variables") or {})})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        _, kind, run, name = self.path.split("/", 3)
        if kind == "upload" and run in self.server.runs:
            self.server.runs[run].files[name] = content
        if kind == "artifact":
            next(artifact for artifact in self.server.artifacts if artifact.id == run).files[
                name
            ] = content
        self._send(200, {})

    def _send(self, status: int, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _operation(query: str) -> str:
    """The name of the query or mutation, such as "UpsertBucket"."""
    found = re.search(r"(?:query|mutation)\s+(\w+)", query)
    return found[1] if found else ""
