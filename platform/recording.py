"""Recordings: what controllers saw and chose in runs, as parquet tables beside a manifest. Nothing is pickled.

A run's own file has the columns `SEEN`, a row a decision and one for the end. A recording is a folder of `decisions`
(these, with run, reward and loss), `runs`, and `manifest.json`, which holds the SHA-256 of both.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esper.platform.errors import UserError, in_a_sentence
from esper.platform.frozen import Count, Frozen
from esper.platform.spec import RunSpec
from esper.platform.storage import read_json, write_bytes, write_text
from esper.platform.telemetry import CANDIDATE, SITE, VERSION, Candidate, Telemetry, TelemetrySpace

SEEN_FILE, MANIFEST, FILES = "telemetry.parquet", "manifest.json", ("decisions.parquet", "runs.parquet")
FLOATS, WORDS = pa.list_(pa.float32()), pa.list_(pa.string())
SEEN = pa.schema(
    {
        "sequence": pa.int32(),
        **dict.fromkeys(("globals", "sites", "candidates"), FLOATS),  # of tables the present rows, one after another
        "mask": pa.list_(pa.bool_()),  # of the present candidates
        **dict.fromkeys(("site_ids", "actions"), WORDS),  # of the present rows
        "row": pa.int32(),  # that was chosen; none at the end
    }
)
DECISIONS = pa.schema(
    [
        pa.field("run", pa.int32()),
        *SEEN,
        pa.field("reward", pa.float64()),  # of the row chosen, in nats
        pa.field("val_loss", pa.float64()),  # nats per token; at the end on the whole held-out set
        pa.field("budget_fraction", pa.float64()),
    ]
)
RUNS = pa.schema(
    {
        "run": pa.int32(),
        "instance": pa.int32(),  # runs of one have equal seed, budget and start
        "seed": pa.int64(),
        "budget": pa.float64(),  # on the spec's axis
        "start": pa.string(),  # the host's layers at the start, as JSON
        "arm": pa.string(),
        "val_loss": pa.float64(),  # at the end
        "parameters": pa.int64(),
        "grafts": pa.int32(),
        **dict.fromkeys(("seconds", "parameter_seconds", "steps", "tokens", "flops", "wall_seconds"), pa.float64()),
    }
)


class Manifest(Frozen):
    """`manifest.json`."""

    version: Literal[1] = 1
    telemetry: int = VERSION
    spec: RunSpec  # of every run, but for its budget and start
    sites: Count  # of the telemetry space
    candidates: Count
    text: str  # fingerprint
    commits: tuple[str, ...]  # of the code that trained
    torch: tuple[str, ...]
    runs: Count
    instances: Count
    decisions: Count
    files: dict[str, str] = {}  # noqa: RUF012  (name → SHA-256; frozen)

    @property
    def space(self) -> TelemetrySpace:
        return TelemetrySpace(self.sites, self.candidates)

    def write(self, out: Path, tables: Mapping[str, pa.Table]) -> None:
        """Write a recording: the tables by file name, then this, with their digests."""
        contents = {name: packed(table) for name, table in tables.items()}
        for name, content in contents.items():
            write_bytes(out / name, content)
        files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        write_text(out / MANIFEST, self.model_copy(update={"files": files}).model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> tuple[Self, pa.Table, pa.Table]:
        """A recording's manifest, decisions and runs; raises UserError where it is none, or a file has changed."""
        path = folder / MANIFEST
        manifest = cls.checked(read_json(path, str(path), "a folder that `esper record` wrote"), str(path))
        if manifest.telemetry != VERSION:
            what = f"{path} is of telemetry version {manifest.telemetry}, and this code reads version {VERSION}"
            raise UserError(f"{what}: take the Esper that wrote it, or record runs of this one.")
        decisions, runs = (unpacked(folder / name, manifest.files.get(name)) for name in FILES)
        if decisions.schema != DECISIONS or runs.schema != RUNS:
            raise UserError(f"the tables in {folder} lack columns, or have others: record the runs again.")
        return manifest, decisions, runs


def packed(table: pa.Table) -> bytes:
    """A table as the bytes of a parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=9)
    return sink.getvalue()


def unpacked(path: Path, digest: str | None) -> pa.Table:
    """A parquet file of this SHA-256; raises UserError where it is missing, another, or damaged."""
    with in_a_sentence(f"{path} cannot be read", "restore it from a copy, or record the runs again"):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError("its checksum is not the manifest's")
        return pq.read_table(io.BytesIO(content))


def seen_row(telemetry: Telemetry, row: int | None) -> dict[str, Any]:
    """A row of `SEEN`."""
    sites, candidates = len(telemetry.site_ids), len(telemetry.actions)
    return {
        "sequence": telemetry.sequence,
        "globals": telemetry.globals,
        "sites": telemetry.sites[:sites].ravel(),
        "candidates": telemetry.candidates[:candidates].ravel(),
        "mask": telemetry.mask[:candidates],
        "site_ids": list(telemetry.site_ids),
        "actions": [str(action) for action in telemetry.actions],
        "row": row,
    }


def telemetry_of(row: Mapping[str, Any], space: TelemetrySpace) -> Telemetry:
    """What `seen_row` was made of, to the bit; raises ValueError for what no run can see."""
    mask = np.zeros(space.candidates, dtype=bool)
    mask[: len(row["mask"])] = row["mask"]
    telemetry = Telemetry(
        row["sequence"],
        np.asarray(row["globals"], np.float32),
        _table(row["sites"], len(SITE), space.sites),
        _table(row["candidates"], len(CANDIDATE), space.candidates),
        mask,
        tuple(row["site_ids"]),
        tuple(map(_candidate, row["actions"])),
    )
    if wrong := telemetry.problems(space):
        raise ValueError(wrong)
    return telemetry


def _table(values: Sequence[float], fields: int, rows: int) -> np.ndarray:
    table, present = np.zeros((rows, fields), np.float32), np.asarray(values, np.float32).reshape(-1, fields)
    table[: len(present)] = present
    return table


def _candidate(words: str) -> Candidate:
    operation, blueprint, _, site = [*words.split(" "), None, None, None][:4]
    return Candidate(operation, site, blueprint)  # pyright: ignore[reportArgumentType]  (`problems` counts them)
