"""Reads what an offline run of W&B wrote: a log in LevelDB's format, each record a message of wandb's."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2 as messages

BLOCK = 1 << 15
HEADER = 7  # of a block's piece: checksum (4), length (2), kind (1); the file begins with 7 more bytes
WHOLE, LAST = 1, 4


def new_client() -> None:
    """End the client of this process, which reads its environment once, and forget where its service was.

    A test that gives a variable its old value back may give it the place of a service that has ended.
    """
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)


def records(path: Path) -> Iterator[messages.Record]:
    """All records, in order; a piece cut off at the end is left out."""
    data, at, record = path.read_bytes(), HEADER, b""
    assert data.startswith(b":W&B"), path
    while at + HEADER <= len(data):
        rest = BLOCK - at % BLOCK
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        if rest < HEADER or kind == 0:  # the end of a block is left empty
            at += rest
            continue
        if at + HEADER + length > len(data):
            return
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (WHOLE, LAST):
            yield messages.Record.FromString(record)
            record = b""


class Piece:
    """One start of a run: what it logged until it ended."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("run-*.wandb")
        self.records = list(records(path))
        self.runs = [record.run for record in self.records if record.WhichOneof("record_type") == "run"]

    @property
    def id(self) -> str:
        """The run's id."""
        return str(self.runs[0].run_id)

    @property
    def config(self) -> dict[str, Any]:
        """The run's config."""
        updates = [update for record in self.records for update in record.config.update]
        updates += [update for run in self.runs for update in run.config.update]
        return {update.key: json.loads(update.value_json) for update in updates if update.key != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was logged, one row a call; parts of nested values have names like a/b."""
        items = [record.history.item for record in self.records if record.HasField("history")]
        return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row} for row in items]

    @property
    def artifacts(self) -> dict[str, messages.ArtifactRecord]:
        """Artifacts by type, tables aside."""
        found = [
            record.request.log_artifact.artifact
            for record in self.records
            if record.request.HasField("log_artifact")
        ]
        found += [record.artifact for record in self.records if record.HasField("artifact")]
        return {artifact.type: artifact for artifact in found if artifact.type != "run_table"}

    @property
    def step_metric(self) -> list[str]:
        """Over what metrics are drawn."""
        return [record.metric.name for record in self.records if record.HasField("metric")]

    @property
    def preempted(self) -> bool:
        """Whether the end of this start is not that of the run."""
        return any(record.HasField("preempting") for record in self.records)

    @property
    def exit_codes(self) -> list[int]:
        """The run's exit code, if it has ended."""
        return [record.exit.exit_code for record in self.records if record.HasField("exit")]


def read(folder: Path) -> Piece:
    """What a run wrote that has ended; the client's process may still be writing it."""
    for _ in range(100):
        piece = Piece(folder)
        if piece.exit_codes:
            return piece
        time.sleep(0.1)
    raise TimeoutError(f"{folder} is not finished")


def pieces(run_folder: Path) -> list[Piece]:
    """The starts of the run of a run folder, oldest first."""
    return [read(folder) for folder in sorted((run_folder / "wandb").glob("offline-run-*"))]
