"""Code that loads what a run made, ready to paste: the report shows it, a test runs it."""

from __future__ import annotations

from pathlib import Path

from simlab.store.store import SnapshotStore

__all__ = ["snippets"]


def snippets(run_dir: str | Path, store: SnapshotStore) -> list[dict[str, str]]:
    """Return code that loads the run's data and model, five lines each, as the page shows it.

    Returns
    -------
    list of dict
        ``name``, ``title`` and ``code``; only what the run has data for.
    """
    run = _shown_path(run_dir)
    schema = store.schema
    filled = [name for name in ("train", "valid", "test") if len(store.split(name))]
    if not filled:
        return []
    output = schema.outputs[0].name
    n_next = min(len(schema.times) - 1, 1)
    found = [
        {
            "name": "data",
            "title": "The data, as simlab samples and trajectories",
            "code": f"""import simlab as sl
store = sl.SnapshotStore.open({f"{run}/store"!r})
trajectories = list(store.split({filled[0]!r}))
sample, outputs = trajectories[0].sample, trajectories[0].outputs
print(len(trajectories), dict(sample.parameters), outputs[{output!r}].shape)""",
        },
        {
            "name": "well",
            "title": "The same files, through The Well's own loader (PyTorch)",
            "code": f"""from the_well.data import WellDataset
data = WellDataset(path={f"{run}/store"!r}, well_split_name={filled[0]!r},
                   n_steps_input=1, n_steps_output={n_next})
item = data[0]
print(len(data), {{name: tuple(values.shape) for name, values in item.items()}})""",
        },
    ]
    if (Path(run_dir) / "model" / "model.json").is_file():
        split = "test" if "test" in filled else filled[0]
        found.append(
            {
                "name": "model",
                "title": "The trained model, asked about a sample",
                "code": f"""import simlab as sl
model = sl.NeuralSurrogate.load({f"{run}/model"!r})
store = sl.SnapshotStore.open({f"{run}/store"!r})
sample = next(iter(store.split({split!r}))).sample
print(model.predict([sample])[{output!r}].shape, model.estimate([sample]))""",
            }
        )
    return found


def _shown_path(run_dir: str | Path) -> str:
    """Return the path relative to the working directory when the run is inside it."""
    path = Path(run_dir).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
