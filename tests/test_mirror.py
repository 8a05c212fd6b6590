"""Interrupted runs on a W&B server (a pretended one that keeps what it is sent): every epoch is there once."""

import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb

from kd import record

EPOCHS = 4
WORDS = ["data=digits", "student.scale=1", f"student.epochs={EPOCHS}", "method=standard", "device=cpu", "threads=1",
         "tracker.timeout=300"]  # fmt: skip


class Server(ThreadingHTTPServer):
    """As much of W&B's interface as a run and `wandb sync` need. `history`: run id -> line -> row."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, dict[int, dict]] = {}

    def answer(self, query: str, asked: dict[str, Any]) -> Any:
        name = asked.get("name")
        place = {"id": "p", "name": "kd", "entity": {"id": "e", "name": "me"}}
        if "RunResumeStatus" in query:
            lines = self.history.get(str(name))
            if not lines:
                return {"model": None}
            tail = json.dumps([json.dumps(lines[max(lines)])])
            bucket = {"id": "b", "name": name, "displayName": "", "summaryMetrics": "{}", "config": "{}", "tags": []}
            bucket |= {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(lines), "eventsTail": "[]"}
            return {"model": {**place, "bucket": {**bucket, "historyTail": tail, "wandbConfig": '{"t": 1}'}}}
        if "upsertBucket" in query:
            bucket = {"id": "b", "name": name, "displayName": "", "description": "", "config": "{}", "sweepName": None}
            return {"upsertBucket": {"bucket": {**bucket, "project": place, "historyLineCount": 0}, "inserted": True}}
        if "createArtifact" in query:
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": {}}}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        return {"viewer": {"id": "v", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
        said = json.loads(body) if body[:1] == b"{" else {}
        if self.path.endswith("/file_stream"):
            found = (said.get("files") or {}).get("wandb-history.jsonl")
            lines = self.server.history.setdefault(self.path.split("/")[-2], {})
            for number, line in enumerate(found["content"], found["offset"]) if found else ():
                lines[number] = json.loads(line)
            answer: Any = {"exitcode": None, "limits": {}}
        else:
            answer = {"data": self.server.answer(said.get("query", ""), said.get("variables") or {})}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{made.server_port}")
        yield made
        made.shutdown()


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_an_interrupted_run_is_one_run_with_every_epoch_once(
    mode: str, server: Server, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = record.Record.epoch

    def stopped(after: int) -> Callable:
        def write(self: record.Record, row: dict[str, Any]) -> None:
            epoch(self, row)
            if row["epoch"] == after:
                raise KeyboardInterrupt

        return write

    def sync() -> None:
        segments = [str(path) for path in Path("runs").glob("*/wandb/offline-run-*")]
        command = [sys.executable, "-m", "wandb", "sync", *segments]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        assert "ERROR" not in said.stdout + said.stderr, "it ends with 0 even so"

    # all starts are of one second, and in time's order all the same
    monkeypatch.setattr(wandb.Settings, "timespec", "20260101_000000")
    for after in (2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(record.Record, "epoch", stopped(after))
            assert kd(*WORDS, f"tracker.mode={mode}").code == 130
        if mode == "offline":
            sync()
        (history,) = server.history.values()
        assert [history[line]["epoch"] for line in sorted(history)] == list(range(1, after)), "what was told so far"
    said = kd(*WORDS, f"tracker.mode={mode}")
    assert said.code == 0
    assert "Tried to log to step" not in said.out + said.err
    if mode == "offline":
        sync()
    ((name, history),) = server.history.items()
    rows = [history[line] for line in sorted(history)]
    assert [row["epoch"] for row in rows if "epoch" in row] == list(range(1, EPOCHS + 1))
    assert [row["_step"] for row in rows][:EPOCHS] == list(range(1, EPOCHS + 1))
    (folder,) = Path("runs").glob("standard-*")
    assert json.loads((folder / "wandb.json").read_text()) == {"id": name}
    assert len(list(folder.glob("wandb/*run-*"))) == 1
    assert len(list(folder.glob("wandb/superseded/*"))) == 2
