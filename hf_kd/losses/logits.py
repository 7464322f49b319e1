"""Losses on logits that are more than a divergence of two distributions, one number a row.

They have the shape of a divergence, `(log_q[N, C], log_p[N, C]) -> [N]`, and are named by the option
`divergence`. Those in `LOGIT_LOSSES` read more: labels, raw logits or the temperature, as keyword arguments
that the objective fills in (`needs.py` lists them), or the rows beside a row. `T^2`, mask and mean stay
outside, so a term that the paper takes at temperature 1 is divided by `T^2` in here.

| name | what it compares | source |
|---|---|---|
| `dkd` | target against the rest, and the rest among itself, weighted apart | Zhao 2022 |
| `nkd` | the target's probability, and the rest among itself | Yang 2023 |
| `dist` | correlation over classes, and over the rows of the batch | Huang 2022 |
| `standardised_kl` | logits with their mean and spread removed | Sun 2024 |
| `adaptive_kl` | forward and reverse KL, weighted by where the gap is | Wu 2024 |
| `hard_labels` | the teacher's decisions | Touvron 2021 |
| `uld` | sorted probabilities, of models with unlike vocabularies | Boizard 2024 |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .needs import couples_rows, unlike_classes
from .rows import log_probs, sum_over_classes

# In place of -inf, whose difference to itself is NaN; the same as in rows.py.
_FLOOR = -1e30
# A vector with less spread than this has no direction that its rounding errors didn't make.
_NO_SPREAD = 1e-6


def _forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return sum_over_classes(log_q, log_p, kernels.kl_terms, kernels.forward_slopes)


def dkd(
    log_q: Tensor, log_p: Tensor, *, labels: Tensor | None, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    r"""Decoupled knowledge distillation (Zhao et al. 2022): target and other classes, weighted apart.

        DKD = alpha KL(b || b_q) + beta KL(r || r_q)
        b = (p_y, 1 - p_y),    r_c = p_c / (1 - p_y) for c != y

    The first term (TCKD) says how sure the teacher is of the target, the second (NCKD) how it ranks all other
    classes. Plain KL is the same sum with `alpha = 1` and `beta = 1 - p_y`: on the rows that the teacher is
    sure of, which are most, it drops the second term. `alpha = 1, beta = 8` suits CIFAR, 0.5 ImageNet.

    The target `y` is the label; a row without one takes the teacher's most likely class.

    When: many classes, a confident teacher. With two classes there is no rest to rank, and with `alpha = 1`
    it **is** `forward_kl`. For large `beta`, warm up the learning rate.
    Siblings: `nkd` replaces the first term by a cross-entropy.
    Source: Zhao et al. 2022, arXiv:2203.08679, section 3.

    Args:
        log_q: `[N, C]` student log-probabilities.
        log_p: `[N, C]` teacher log-probabilities.
        labels: `[N]` target classes, negative where there is none; None: none at all.
        alpha: Weight of the target term, at least 0 (not the option `alpha`, which weighs the whole loss).
        beta: Weight of the other classes' term, at least 0.

    Returns:
        `[N]` nats, at least 0; 0 with zero gradient for equal models.

    Raises:
        ValueError: If a weight is negative, or both are 0.

    Example:
        >>> DistillationArguments(
        ...     "out", divergence="dkd", divergence_options={"beta": 8}, temperature=4
        ... )  # doctest: +SKIP
    """
    _check_weights("dkd", {"alpha": alpha, "beta": beta})
    log_q, log_p = _same(log_q, log_p)
    target = _targets(labels, log_p)
    pair_q, rest_q = _split(log_q, target)
    pair_p, rest_p = _split(log_p, target)
    return alpha * _forward_kl(pair_q, pair_p) + beta * _forward_kl(rest_q, rest_p)


def nkd(
    log_q: Tensor,
    log_p: Tensor,
    *,
    labels: Tensor | None,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    gamma: float = 1.5,
) -> Tensor:
    r"""Normalised knowledge distillation (NKD, Yang et al. 2023): a soft target, and the rest among itself.

        T^2 NKD = -p_y(1) log q_y(1) + gamma T^2 KL(r || r_q),    r_c = p_c / (1 - p_y) for c != y

    The first term is a cross-entropy with the target, as strong as the teacher is sure, at temperature 1. The
    second, at temperature T, is NCKD of `dkd`. The paper writes it as a cross-entropy, which differs by the
    teacher's entropy and so not in its gradient, and adds the sum to the task loss: that is `alpha=0.5`, with
    both halved.

    The target `y` is the label; a row without one takes the teacher's most likely class.

    When: image classification with many classes. It is **not** 0 for equal models, since the first term
    pulls to the target with whatever mass the teacher gives it.
    Siblings: `dkd`, whose first term is 0 for equal models.
    Source: Yang et al. 2023, arXiv:2303.13005.

    Args:
        log_q: `[N, C]` student log-probabilities at T.
        log_p: `[N, C]` teacher log-probabilities at T.
        labels: `[N]` target classes, negative where there is none; None: none at all.
        student_logits: `[N, C]` the student's logits.
        teacher_logits: `[N, C]` the teacher's logits.
        temperature: T, of the second term; the first is divided by `T^2`, which is multiplied outside.
        gamma: Weight of the other classes' term, at least 0.

    Returns:
        `[N]` nats, at least 0.

    Raises:
        ValueError: If `gamma` is negative.

    Example:
        >>> DistillationArguments("out", divergence="nkd", temperature=1)  # doctest: +SKIP
    """
    _check_weights("nkd", {"gamma": gamma}, all_zero=True)
    log_q, log_p = _same(log_q, log_p)
    target = _targets(labels, log_p)
    plain_q, plain_p = _same(*log_probs(student_logits, teacher_logits, temperature=1.0))
    sure = plain_p.gather(-1, target.unsqueeze(-1)).squeeze(-1).exp()
    hit = plain_q.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    rest = _forward_kl(_split(log_q, target)[1], _split(log_p, target)[1])
    return -sure * hit / temperature**2 + gamma * rest


@couples_rows(unless_zero="gamma")
def dist(log_q: Tensor, log_p: Tensor, *, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    r"""DIST (Huang et al. 2022): Pearson correlation instead of equality, over classes and over rows.

        DIST_i = beta (1 - corr_c(q_i, p_i)) + gamma mean_c (1 - corr_i(q_c, p_c))

    The first term keeps each row's ranking of the classes, the second each class's ranking of the rows. Both
    are blind to scale and shift of the probabilities, so a student that can't be as sure as a strong teacher
    isn't pressed to be. `1 - corr` is computed as half the squared distance of the two directions, which
    keeps its digits near convergence.

    **The second term compares the rows of a micro-batch**: its size is part of the loss, accumulation over
    two of them is not one of both, and one row alone has nothing to correlate (an error, as is a last batch
    of one row: set `dataloader_drop_last=True`). With `gamma=0` rows don't touch.

    When: a teacher far stronger than the student; batches of 32 rows or more. A vector without spread (a
    uniform student) has no direction and a steep gradient: keep `max_grad_norm` on.
    Source: Huang et al. 2022, arXiv:2205.10536, section 4.

    Args:
        log_q: `[N, C]` student log-probabilities.
        log_p: `[N, C]` teacher log-probabilities.
        beta: Weight of the correlation over classes, at least 0.
        gamma: Weight of the correlation over rows, at least 0.

    Returns:
        `[N]`, without a unit, from 0 to `2 (beta + gamma)`; 0 with zero gradient for equal models.

    Raises:
        ValueError: If a weight is negative, both are 0, or there is one row and `gamma` is above 0.

    Example:
        >>> DistillationArguments("out", divergence="dist", temperature=4)  # doctest: +SKIP
    """
    _check_weights("dist", {"beta": beta, "gamma": gamma})
    log_q, log_p = _same(log_q, log_p)
    if log_q.ndim != 2:
        raise ValueError(f"dist: log-probabilities of shape {list(log_q.shape)} must be rows, [N, C]")
    if gamma > 0 and len(log_q) == 1:
        raise ValueError(
            "divergence='dist' compares the rows of a micro-batch with each other, but this one has 1 "
            "supervised row. Set per_device_train_batch_size to 2 or more (32 is sensible) and "
            "dataloader_drop_last=True, or divergence_options={'gamma': 0} for its first term alone."
        )
    q, p, seen = log_q.exp(), log_p.exp(), log_p > _FLOOR
    loss = beta * _one_minus_correlation(q, p, seen)
    if gamma > 0 and len(log_q) > 1:
        columns = _one_minus_correlation(q.T, p.T, seen.T)
        loss = loss + gamma * columns.sum() / (seen.sum(0) > 1).sum().clamp_min(1)
    return loss


def standardised_kl(
    log_q: Tensor, log_p: Tensor, *, temperature: float, teacher_temperature: float | None = None
) -> Tensor:
    r"""KL of standardised logits (Sun et al. 2024): each row's mean and spread are removed first.

        KL(softmax(Z(t) / T) || softmax(Z(z) / T)),    Z(x) = (x - mean(x)) / std(x)

    Each row gets a temperature of its own, and student and teacher different ones: the student learns the
    teacher's relations of logits, not their size, which a small model can't always reach. So its confidence
    is not the teacher's: look at `eval_kl` and calibration before you use probabilities.

    When: a teacher with much larger logits than the student can make. The paper takes T = 2 and a weight of 9
    beside the task loss.
    Siblings: `dist` is blind to scale and shift of probabilities instead of logits.
    Source: Sun et al. 2024, arXiv:2403.01427, algorithm 1.

    Args:
        log_q: `[N, C]` student log-probabilities: logits but for scale and shift.
        log_p: `[N, C]` teacher log-probabilities.
        temperature: T, the base temperature.
        teacher_temperature: The teacher's; None: the same.

    Returns:
        `[N]` nats, at least 0; 0 with zero gradient for models with equal logits up to scale and shift.

    Example:
        >>> DistillationArguments(
        ...     "out", divergence="standardised_kl", temperature=2, alpha=0.9
        ... )  # doctest: +SKIP
    """
    log_q, log_p = _same(log_q, log_p)
    scaled_q, scaled_p = log_probs(
        _standardised(log_q),
        _standardised(log_p),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
    )
    return _forward_kl(scaled_q, scaled_p)


def adaptive_kl(log_q: Tensor, log_p: Tensor, *, mu: float = 0.5) -> Tensor:
    r"""Adaptive KL (AKL, Wu et al. 2024): forward KL where the head is off, reverse KL where the tail is.

        AKL = g_head / g KL(p || q) + g_tail / g KL(q || p)
        g_head = sum over the head of abs(p - q), g_tail over the tail, g = g_head + g_tail

    The head are the teacher's most likely classes that together hold a mass of `mu`. Forward KL fits the head
    first and reverse KL the tail, which matters as long as training is short. The weights of a row carry no
    gradient. `mu = 1` is `forward_kl`, `mu = 0` is `reverse_kl`.

    When: language models, few epochs.
    Siblings: `jeffreys` has equal weights; `jsd` and the skewed KLs mix distributions instead.
    Source: Wu et al. 2024, arXiv:2404.02657.

    Args:
        log_q: `[N, C]` student log-probabilities.
        log_p: `[N, C]` teacher log-probabilities.
        mu: Mass of the head, from 0 to 1.

    Returns:
        `[N]` nats, at least 0; 0 with zero gradient for equal models.

    Raises:
        ValueError: If `mu` is outside [0, 1].

    Example:
        >>> DistillationArguments("out", divergence="adaptive_kl", temperature=1)  # doctest: +SKIP
    """
    if not _is_number(mu) or not 0 <= mu <= 1:
        raise ValueError(f"adaptive_kl: mu={mu!r} must be a number from 0 to 1: the mass of the head")
    if mu in (0, 1):
        head = torch.full(log_q.shape[:-1], float(mu), dtype=log_q.dtype, device=log_q.device)
    else:
        with torch.no_grad():
            p, order = log_p.exp().sort(-1, descending=True)
            gap = (p - log_q.exp().gather(-1, order)).abs()
            # A class belongs to the head if what is before it doesn't hold the mass yet.
            inside = p.cumsum(-1) - p < mu
            head = (gap * inside).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
    reverse = sum_over_classes(log_q, log_p, kernels.reverse_terms, kernels.reverse_slopes)
    return head * _forward_kl(log_q, log_p) + (1 - head) * reverse


def hard_labels(
    log_q: Tensor, log_p: Tensor, *, student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> Tensor:
    r"""Cross-entropy with the teacher's decision (DeiT, Touvron et al. 2021).

        T^2 hard = -log q_k(1),    k = argmax_c p_c

    No temperature: the term is divided by `T^2`, which is multiplied outside. A student with a distillation
    token (`DeiTForImageClassificationWithTeacher`, or LeViT's) has a head for each target: labels teach
    `cls_logits`, the teacher teaches `distillation_logits` (with any divergence), and evaluation reads their
    mean, as the model's own `logits`.

    When: a teacher of another kind (a convolution network for a transformer), strong augmentation, where a
    label says less about the crop than the teacher does. Not for language models: half the knowledge is in
    the second choice. Not 0 for equal models.
    Source: Touvron et al. 2021, arXiv:2012.12877, equation 3.

    Args:
        log_q: `[N, C]` student log-probabilities; not read.
        log_p: `[N, C]` teacher log-probabilities; not read.
        student_logits: `[N, C]` the student's logits.
        teacher_logits: `[N, C]` the teacher's logits.
        temperature: T.

    Returns:
        `[N]` nats, at least 0.

    Example:
        >>> DistillationArguments("out", divergence="hard_labels", alpha=0.5)  # doctest: +SKIP
    """
    plain_q, plain_p = log_probs(student_logits, teacher_logits, temperature=1.0)
    decision = plain_p.argmax(-1, keepdim=True)
    return -plain_q.gather(-1, decision).squeeze(-1) / temperature**2


@unlike_classes
def uld(log_q: Tensor, log_p: Tensor) -> Tensor:
    r"""Universal logit distillation (Boizard et al. 2024): sorted probabilities, for unlike vocabularies.

        ULD(p, q) = sum_i |sort(p)_i - sort(q)_i|

    The Wasserstein distance of the two sets of probabilities when every two classes are equally far apart.
    Which class has which probability doesn't count, only how the mass is spread, so the vocabularies need not
    be the same, or of one size: the shorter is filled up with zeros.

    Language models with another tokenizer give the batch columns of the teacher's own, `teacher_input_ids`,
    and where in the text each token ends, `text_ends` and `teacher_text_ends`: positions after the same text
    are compared, others are not (the paper pairs them by their number, which drifts apart from the first word
    that is cut differently). `hf_kd.data.unlike.encode_texts` makes all these columns.

    When: only with unlike tokenizers. With one vocabulary it throws away which class is which: take a KL.
    Evaluation logs `eval_distance`, this loss at T = 1, since KL and agreement have no meaning.
    Source: Boizard et al. 2024, arXiv:2402.12030; their weight beside the task loss is 1.5.

    Args:
        log_q: `[N, C]` student log-probabilities, `-inf` where it has no such class.
        log_p: `[N, C]` teacher log-probabilities, likewise.

    Returns:
        `[N]`, a difference of probabilities (not nats), from 0 to 2; 0 for equal models.

    Example:
        >>> DistillationArguments("out", divergence="uld", temperature=1)  # doctest: +SKIP
    """
    log_q, log_p = _same(log_q, log_p)
    q, p = log_q.exp().sort(-1, descending=True).values, log_p.exp().sort(-1, descending=True).values
    return (q - p).abs().sum(-1)


def unlike_log_probs(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """As `log_probs`, of models whose classes don't correspond: each over its own, filled up with `-inf`.

    Args:
        student_logits: `[N, C]`, with gradient.
        teacher_logits: `[N, C_t]`.
        temperature: The student's T.
        teacher_temperature: The teacher's T.

    Returns:
        `[N, max(C, C_t)]` twice, in fp32 (fp64 if either input is fp64).
    """
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    log_q, _ = log_probs(student, student, temperature=temperature)
    log_p, _ = log_probs(teacher, teacher, temperature=teacher_temperature)
    missing = log_p.shape[-1] - log_q.shape[-1]
    return (
        F.pad(log_q, (0, max(missing, 0)), value=-torch.inf),
        F.pad(log_p, (0, max(-missing, 0)), value=-torch.inf),
    )


LOGIT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "dkd": dkd,
    "nkd": nkd,
    "dist": dist,
    "standardised_kl": standardised_kl,
    "hard_labels": hard_labels,
}


def _targets(labels: Tensor | None, log_p: Tensor) -> Tensor:
    """`[N]` target classes: labels, and the teacher's most likely class where there is none."""
    best = log_p.argmax(-1)
    return best if labels is None else torch.where(labels < 0, best, labels.to(best.dtype))


def _split(log_probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`[N, 2]` target against rest, and `[N, C]` the rest among itself, with the target at `-inf`."""
    index = target.unsqueeze(-1)
    others = log_probs.scatter(-1, index, -torch.inf)
    rest = others.logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, index), rest], -1), others - rest


def _one_minus_correlation(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    """`[N]` one minus Pearson's correlation of rows, over what is seen; 0 where less than two are."""
    count = seen.sum(-1, keepdim=True)
    directions = []
    for values in (a, b):
        centred = (values - (values * seen).sum(-1, keepdim=True) / count.clamp_min(1)) * seen
        spread = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
        directions.append(centred / spread.clamp_min(_NO_SPREAD))
    return (directions[0] - directions[1]).square().sum(-1) / 2


def _standardised(values: Tensor) -> Tensor:
    """Rows with mean 0 and standard deviation 1 over the classes that are not masked."""
    seen = values > _FLOOR
    count = seen.sum(-1, keepdim=True).clamp_min(1)
    centred = (values - (values * seen).sum(-1, keepdim=True) / count) * seen
    spread = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / count.sqrt()
    return torch.where(seen, centred / spread.clamp_min(_NO_SPREAD), -torch.inf)


def _same(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Check shapes and dtypes; `-inf` as a large negative number, and no gradient for the teacher."""
    if log_q.shape != log_p.shape or log_q.ndim == 0:
        raise ValueError(
            f"log_q has shape {list(log_q.shape)}, log_p {list(log_p.shape)}: both must be the same, [N, C]"
        )
    if log_q.dtype != log_p.dtype or log_q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_q is {log_q.dtype}, log_p {log_p.dtype}: both must be float32, or float64")
    return log_q.clamp_min(_FLOOR), log_p.detach().clamp_min(_FLOOR)


def _check_weights(name: str, weights: dict[str, float], *, all_zero: bool = False) -> None:
    for option, value in weights.items():
        if not _is_number(value) or value < 0:
            raise ValueError(
                f"{name}: {option}={value!r} is a weight: give a number of at least 0, such as 1"
            )
    if not all_zero and not any(weights.values()):
        raise ValueError(f"{name}: {' and '.join(weights)} are both 0, and nothing is left to learn")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
