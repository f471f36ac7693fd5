"""Buffers between a stream of samples and a training loop that draws batches at its own pace.

    FIFO             oldest first, each item once
    FIRO(t)          uniform among what is there once more than t are, each item once
    Reservoir(t)     two sets, unseen U and seen S. put: refused while U fills the buffer, else a
                     uniform victim leaves S when there is no room. get: uniform over U and S once
                     more than t are there; what was drawn from U moves to S
    BatchReservoir   a reservoir that hands out whole batches only
    TimeStratified   a reservoir that first draws the time, uniformly among those it holds
    ReplayMix(q)     each pick is, with probability q, one of all committed samples, read back from
                     the store; else a reservoir's pick

So a reservoir repeats samples as often as the pace asks for, forgets only what was drawn at least
once, and never loses an unseen sample: put returns False instead, and the producer has to wait
(Meyer et al., "High Throughput Training of Deep Surrogates from Large Ensemble Runs", SC'23). No
kind puts an item of the buffer twice into a batch. Departure from the paper: when the stream has
ended (`finish`) a reservoir keeps what was drawn instead of draining, because the trainer has a
budget of batches.

Items are rows of one preallocated float32 array; the sets are lists of row numbers, so put costs
one copy and O(1), get O(batch). Not thread safe: one loop polls, puts, gets and steps.

    >>> buffer = Reservoir(capacity=8, threshold=0).build(row_size=2, seed=5)
    >>> buffer.put(np.ones(2, dtype=np.float32))
    True
    >>> buffer.get(4).shape
    (1, 2)
"""

from simlab.learn.buffers.base import Archive, Buffer, BufferSettings, Recall, buffers
from simlab.learn.buffers.queues import FIFO, FIRO
from simlab.learn.buffers.reservoirs import BatchReservoir, Reservoir
from simlab.learn.buffers.variants import ReplayMix, TimeStratified

__all__ = [
    "FIFO",
    "FIRO",
    "Archive",
    "BatchReservoir",
    "Buffer",
    "BufferSettings",
    "Recall",
    "ReplayMix",
    "Reservoir",
    "TimeStratified",
    "buffers",
]
