"""How far two vectors are apart: for embeddings, where there is no distribution to compare.

Each function maps `(student[N, H], teacher[N, H]) -> [N]`, in fp32 or fp64, without a mean over rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """`1 - cos(s, t)`: direction only, so scales need not agree (DistilBERT, Sanh et al. 2019, section 3).

    Use it for encoders whose similarity is the cosine, which is most of them.
    """
    return 1.0 - F.cosine_similarity(student, teacher, dim=-1)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the H coordinates of `(s - t)^2`: direction and length (Reimers, Gurevych 2020, eq. 1)."""
    return (student - teacher).square().mean(-1)


#: Name -> function, for the option `divergence` of the task "embedding".
VECTOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine, "mse": mse}
