"""What a follower is told: a trajectory begins, has a step, ends. As values and as records.

Records are bytes as in a segment, so that whoever gets them checks the same checksums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simlab.core.reports import Provenance
from simlab.core.samples import Sample
from simlab.store.records import Group, Kind, Record, pack, pack_field, pack_step
from simlab.store.schema import FieldSpec, Schema
from simlab.store.segments import stored_dtype

__all__ = ["Begin", "End", "Event", "StepRecord", "as_event", "as_records", "field_values"]

_UNKNOWN = Provenance()


@dataclass(frozen=True, eq=False)
class Begin:
    """A trajectory begins; a higher attempt than one seen before replaces it."""

    traj: int
    attempt: int
    split: str
    sample: Sample


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One stored step; ``fields`` holds every output field, in the stored type, read-only."""

    traj: int
    attempt: int
    step: int
    time: float
    fields: dict[str, np.ndarray]


@dataclass(frozen=True)
class End:
    """A trajectory that had begun ends.

    ``status`` is "done", "failed" or, when its writer died or gave this attempt up, "abandoned".
    """

    traj: int
    attempt: int
    status: str


Event = Begin | StepRecord | End


def as_event(schema: Schema, group: Group) -> Event:
    """Return what a BEGIN, STEP or END says, with the fields before it."""
    record = group.commit
    traj, attempt = record.traj, record.attempt
    if record.kind == Kind.STEP:
        fields = field_values(schema, schema.outputs, group.fields)
        return StepRecord(traj, attempt, record.step, record.time, fields)
    body = record.json()
    if record.kind == Kind.END:
        return End(traj, attempt, body["status"])
    stored = field_values(schema, schema.inputs, group.fields)
    inputs = {name: values.astype(np.float64) for name, values in stored.items()}
    return Begin(
        traj,
        attempt,
        body["split"],
        Sample(body["index"], body["seed"], body["parameters"], inputs),
    )


def as_records(schema: Schema, event: Event) -> bytes:
    """Return the records that :func:`as_event` reads the event from."""
    traj, attempt = event.traj, event.attempt
    buffers: list[bytes | memoryview] = []

    def add(kind: Kind, spec: FieldSpec, number: int, values: np.ndarray) -> None:
        stored = np.ascontiguousarray(values, dtype=stored_dtype(spec)).reshape(-1)
        buffers.extend(pack_field(kind, number, traj, attempt, 0, 0.0, stored, False)[0])

    if isinstance(event, End):
        buffers += pack(Kind.END, traj, attempt, body={"status": event.status})[0]
    elif isinstance(event, Begin):
        sample = event.sample
        for number, spec in enumerate(schema.inputs):
            add(Kind.INPUT, spec, number, sample.fields[spec.name])
        body = {
            "index": sample.index,
            "seed": sample.seed,
            "parameters": dict(sample.parameters),
            "split": event.split,
        }
        buffers += pack(Kind.BEGIN, traj, attempt, body=body)[0]
    else:
        for number, spec in enumerate(schema.outputs):
            add(Kind.OUTPUT, spec, number, event.fields[spec.name])
        buffers += pack_step(traj, attempt, event.step, event.time, _UNKNOWN, 0)[0]
    return b"".join(buffers)


def field_values(
    schema: Schema, specs: tuple[FieldSpec, ...], records: list[Record], *, exact: bool = False
) -> dict[str, np.ndarray]:
    """Return the fields that a group of records holds, by name; read-only where not converted.

    They are in the type that Well groups have, or with ``exact`` in that of the records.
    """
    return {
        spec.name: record.values()
        .reshape(schema.field_shape(spec))
        .astype(record.dtype if exact else stored_dtype(spec), copy=False)
        for spec, record in zip(specs, records, strict=True)
    }
