"""simlab: sequences of PDE systems, crash-safe data campaigns, online training of neural operators.

Importing this package loads none of torch, PETSc, MPI or matplotlib; names are found on first use::

    import simlab as sl
    store = sl.generate(sl.Darcy(cells=64), n=200, out="runs/darcy")
    model = sl.NeuralSurrogate(sl.FNO(modes=12)).fit(store.split("train"))
    print(sl.evaluate(model, store.split("test")))
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AdvectionBurgers": "simlab.problems.advection_burgers",
    "Burgers": "simlab.problems.burgers",
    "ConvectionDiffusion": "simlab.problems.convection",
    "Darcy": "simlab.problems.darcy",
    "Heat": "simlab.problems.heat",
    "Helmholtz": "simlab.problems.helmholtz",
    "Lorenz": "simlab.problems.lorenz",
    "Poisson": "simlab.problems.poisson",
    "ReactionDiffusion": "simlab.problems.reaction_diffusion",
    "DeepONet": "simlab.learn.operators",
    "FNO": "simlab.learn.operators",
    "MLP": "simlab.learn.operators",
    "GINO": "simlab.learn.operators.geometry",
    "MPPDE": "simlab.learn.operators.marching",
    "PODNet": "simlab.learn.operators.podnet",
    "PointOperator": "simlab.learn.operators.points",
    "TFNO": "simlab.learn.operators.fourier",
    "UNO": "simlab.learn.operators.fourier",
    "UNet": "simlab.learn.operators.unet",
    "NeuralSurrogate": "simlab.learn.surrogate",
    "SnapshotStore": "simlab.store.store",
    "TrainSettings": "simlab.learn.settings",
    "evaluate": "simlab.pipeline.evaluate",
    "generate": "simlab.pipeline.campaign",
    "load_case": "simlab.pipeline.case",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'simlab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
