"""What a teacher says, kept on disk: written once, read by every student, epoch and run."""

from __future__ import annotations

from .codec import SparseCodec
from .reader import MISSES, CachedTeacher
from .sampling import threshold_sample
from .store import FIDELITIES, CacheError, Manifest
from .writer import CacheWriter

__all__ = [
    "FIDELITIES",
    "MISSES",
    "CacheError",
    "CacheWriter",
    "CachedTeacher",
    "Manifest",
    "SparseCodec",
    "threshold_sample",
]
