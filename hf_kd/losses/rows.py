"""Log-probabilities, and sums over classes with their gradient: the machinery under the divergences.

`[N, C]` tensors are worked through in blocks of rows that fit in the processor's cache. Full-size temporaries
are what makes a dense divergence slow and big; here the only full-size tensors are the results. Gradients are
written by hand, so that they stay exact where autograd would multiply infinity by 0 or subtract nearly equal
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

#: One block of rows: `(log_q[n, C], log_p[n, C]) -> [n, C]`, without `-inf`.
Kernel = Callable[[Tensor, Tensor], Tensor]

# Stands in for -inf inside the kernels: exp gives 0, two of them differ by 0 (two infinities by NaN), and it
# may be multiplied by a probability of 0.
_FLOOR = -1e30
_CPU_BLOCK = 1 << 17  # elements per thread; a few temporaries of 512 KiB in fp32 stay in cache
_DEVICE_BLOCK = 1 << 24  # elements; large enough to keep an accelerator busy


def log_probs(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    teacher_temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log-probabilities of both models at their temperature, over the classes that both have.

        log_q = log_softmax(z / T),    log_p = log_softmax(t / T_teacher)

    This is the one place where a temperature is applied (Hinton et al. 2015, arXiv:1503.02531, section 2).
    The row's largest logit is subtracted before the division: nothing but the rounding changes, which at
    T = 0.05 would otherwise be that of numbers 20 times as large.

    A class with a logit of `-inf` in either model (suppressed tokens, padded choices) is removed from both,
    and what is left is renormalised: such a class comes back as `-inf` on both sides, and contributes nothing
    to any divergence of `divergences.py`, nor to its gradient. A row with no class left, or with NaN, is NaN.

    Args:
        student_logits: `[N, C]` (or any shape that ends in C) student logits, with gradient; fp16, bf16, fp32
            or fp64. The gradient comes back in the same dtype.
        teacher_logits: Same shape, any of these dtypes. Never receives a gradient, and is not edited.
        temperature: The student's T, above 0.
        teacher_temperature: The teacher's T, above 0; None: the student's.

    Returns:
        `(log_q, log_p)`, same shape, natural logarithms, in fp32 (fp64 if either input is fp64).

    Raises:
        ValueError: If shapes differ, if there are fewer than two classes, or if a temperature is not above 0.

    Example:
        >>> log_q, log_p = log_probs(student(x), teacher(x), temperature=2.0)
        >>> loss = 2.0**2 * forward_kl(log_q, log_p).mean()
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(
                f"{name}={value} must be a finite number above 0; 1 leaves the logits as they are"
            )
    _check_same_shape("student_logits", student_logits, "teacher_logits", teacher_logits)
    if student_logits.shape[-1] < 2:
        raise ValueError(
            f"logits of shape {list(student_logits.shape)} have fewer than two classes, and their softmax "
            "says nothing: compare a regression head (num_labels=1) by squared error, and give a binary one "
            "two logits, [0, z]"
        )
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    classes = student_logits.shape[-1]
    log_q, log_p = _LogProbs.apply(
        student_logits.reshape(-1, classes),
        teacher_logits.detach().reshape(-1, classes),
        temperature,
        teacher_temperature,
        dtype,
    )
    return log_q.view(student_logits.shape), log_p.view(student_logits.shape)


def sum_over_classes(log_q: Tensor, log_p: Tensor, terms: Kernel, slopes: Kernel) -> Tensor:
    """Add up `terms` over the classes of each row, with `slopes` as the gradient towards `log_q`.

    Args:
        log_q: `[N, C]` (or any shape that ends in C) log-probabilities with gradient, fp32 or fp64. `-inf`
            reaches the kernels as a large negative number.
        log_p: Same shape and dtype; receives no gradient.
        terms: What is added up; the sum must be non-negative, and its rounding below 0 is cut off.
        slopes: Derivative of the sum with respect to each `log_q`.

    Returns:
        `[N]`, in the dtype of the inputs. Differentiable once.

    Raises:
        ValueError: If shapes or dtypes differ, or for half precision, in which log-probabilities are too
            coarse.
    """
    _check_same_shape("log_q", log_q, "log_p", log_p)
    if log_q.dtype != log_p.dtype or log_q.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"log_q is {log_q.dtype} and log_p is {log_p.dtype}: both must be float32, or both float64. "
            "log_probs makes them so from logits of any precision"
        )
    classes = log_q.shape[-1]
    sums = _SumOverClasses.apply(
        log_q.reshape(-1, classes), log_p.detach().reshape(-1, classes), terms, slopes
    )
    return sums.view(log_q.shape[:-1])


def visible(log_p: Tensor) -> Tensor:
    """Which classes of a kernel's input are not masked, `[n, C]` bool."""
    return log_p > _FLOOR


class _LogProbsContext(FunctionCtx):
    saved_tensors: tuple[Tensor]
    temperature: float
    dtype: torch.dtype


class _LogProbs(torch.autograd.Function):
    """Masked log-softmax at a temperature, of two models at once."""

    @staticmethod
    def forward(
        ctx: _LogProbsContext,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        teacher_temperature: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        log_q = torch.empty_like(student, dtype=dtype, memory_format=torch.contiguous_format)
        log_p = torch.empty_like(log_q)
        for rows in _blocks(log_q):
            z, t = student[rows].to(dtype), teacher[rows].to(dtype)
            masked = torch.isneginf(z).logical_or_(torch.isneginf(t))
            for out, logits, scale in ((log_q, z, temperature), (log_p, t, teacher_temperature)):
                logits = torch.where(masked, -torch.inf, logits)
                logits.sub_(logits.amax(-1, keepdim=True)).div_(scale)
                out[rows] = torch.log_softmax(logits, -1)
        ctx.save_for_backward(log_q)
        ctx.temperature, ctx.dtype = temperature, student.dtype
        ctx.mark_non_differentiable(log_p)
        ctx.set_materialize_grads(False)
        return log_q, log_p

    @staticmethod
    def backward(
        ctx: _LogProbsContext, grad_log_q: Tensor | None, _grad_log_p: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        refuse_second_derivative()
        if grad_log_q is None:
            return None, None, None, None, None
        (log_q,) = ctx.saved_tensors
        grad = torch.empty_like(log_q, dtype=ctx.dtype)
        for rows in _blocks(log_q):
            g = grad_log_q[rows]
            total = g.sum(-1, keepdim=True)
            grad[rows] = log_q[rows].exp().mul_(total).neg_().add_(g).div_(ctx.temperature)
        return grad, None, None, None, None


class _SumContext(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor]
    slopes: Kernel


class _SumOverClasses(torch.autograd.Function):
    """Row sums of one kernel, with another as gradient: nothing full-size is kept but the inputs."""

    @staticmethod
    def forward(ctx: _SumContext, log_q: Tensor, log_p: Tensor, terms: Kernel, slopes: Kernel) -> Tensor:
        ctx.save_for_backward(log_q, log_p)
        ctx.slopes = slopes
        sums = log_q.new_empty(len(log_q))
        for rows in _blocks(log_q):
            sums[rows] = terms(log_q[rows].clamp(min=_FLOOR), log_p[rows].clamp(min=_FLOOR)).sum(-1)
        # Here, and not outside, a clamp leaves the gradient alone.
        return sums.clamp_(min=0)

    @staticmethod
    def backward(ctx: _SumContext, grad_sums: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative()
        log_q, log_p = ctx.saved_tensors
        grad = torch.empty_like(log_q)
        for rows in _blocks(log_q):
            slope = ctx.slopes(log_q[rows].clamp(min=_FLOOR), log_p[rows].clamp(min=_FLOOR))
            torch.mul(slope, grad_sums[rows, None], out=grad[rows])
        return grad, None, None, None


def _blocks(table: Tensor) -> Iterator[slice]:
    """Cut the rows of `[N, C]` into slices of a good size for the device."""
    if torch.compiler.is_compiling():  # the compiler fuses the point-wise work by itself
        return iter([slice(0, len(table))])
    step = max(1, block_of(table) // table.shape[1])
    return (slice(start, start + step) for start in range(0, len(table), step))


def block_of(tensor: Tensor) -> int:
    """How many elements are worked through at a time on a tensor's device."""
    return _CPU_BLOCK * torch.get_num_threads() if tensor.device.type == "cpu" else _DEVICE_BLOCK


def refuse_second_derivative() -> None:
    """Raise in a backward pass that is itself differentiated."""
    # Autograd turns gradients on in a backward pass for create_graph=True only. The slopes are constants to
    # it, so a second derivative would silently lack this loss.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("hf_kd's divergences are differentiable once: create_graph=True is not supported")


def _check_same_shape(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    if first.shape != second.shape or first.dim() == 0:
        raise ValueError(
            f"{first_name} has shape {list(first.shape)}, {second_name} {list(second.shape)}: they must be "
            "the same, [N, C], classes last. Trim the vocabularies, or move the class axis, before the loss"
        )
