"""What a store says about its data: moments of fields.

Read from the manifest; no field is read.
"""

from __future__ import annotations

from simlab.store.schema import FieldSpec
from simlab.store.stats import Moments, merged
from simlab.store.store import SnapshotStore

__all__ = ["field_moments"]


def field_moments(store: SnapshotStore) -> list[tuple[FieldSpec, Moments]]:
    """Return count, extremes, mean and deviation of every field over all splits."""
    store.refresh()
    live = [shard for shard in store.catalogue.live_shards if shard.split in store.fractions]
    found = merged(shard.moments for shard in live)
    return [(spec, found[spec.name]) for spec in store.schema.fields if spec.name in found]
