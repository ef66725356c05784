"""Differentiable matrix square roots and inverse square roots by Taylor and Padé (Song, Sebe & Wang 2022).

For a symmetric positive definite A and Z = I - A/‖A‖, in the Frobenius norm::

    A^½  ≈ ‖A‖^½ Σ_k a_k Z^k            a_k: the Taylor series of (1 - z)^½
    A^½  ≈ ‖A‖^½ Q^-1 P                 P/Q: its diagonal Padé approximant [m/m]
    A^-½ ≈ ‖A‖^-½ P^-1 Q

Backward, whatever the method forward, is that of the root itself: with R = A^½ and G the gradient at R, dL/dA = X solves the
Lyapunov equation R X + X R = G, by the coupled Newton-Schulz iteration for the matrix sign::

    B <- B (3I - B²)/2,    C <- (3C - B²C + BCB - CB²)/2        B₀ = R/‖R‖, C₀ = G/‖R‖;  X = C/2

and for the inverse root S = A^-½ with S X + X S = -S² G S². The authors' code takes ‖S‖ over the whole batch; here it is of
each matrix. Nothing waits for the device, every product is batched, outside autocast, and in float32 or wider. They are
implicitly damped: a zero eigenvalue maps to about ‖A‖^½/(2m + 1), so that an inverse root saturates at (2m + 1)/‖A‖^½. Damp
ill-conditioned matrices first.

Both are solvers of the engine, too: ``Root(0.5, solver="pade")`` or ``"taylor"``, with residuals.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import check_choice, check_count, check_number
from .precision import full_precision
from .solvers import How, Solution, damped, register_solver

Method = Literal["pade", "taylor", "eigh"]
_DEGREES = {"pade": 5, "taylor": 10, "eigh": 1}


@lru_cache
def taylor_coefficients(degree: int) -> tuple[Fraction, ...]:
    """a_0 … a_degree of (1 - z)^½, exactly."""
    found = [Fraction(1)]
    for k in range(degree):
        found.append(found[-1] * Fraction(2 * k - 1, 2 * k + 2))
    return tuple(found)


@lru_cache
def pade_coefficients(degree: int) -> tuple[tuple[Fraction, ...], tuple[Fraction, ...]]:
    """(p, q) of the diagonal Padé approximant [m/m] of (1 - z)^½ around z = 0, in powers of x = 1 - z, exactly.

    With s = x^½ and n = 2m + 1, (1 + s)^n = P(x) + s Q(x), and (1 - s)^n = P - s Q is of the order z^n: s ≈ P/Q. All
    coefficients are binomials, so that both are positive definite wherever x ≥ 0.
    """
    n = 2 * degree + 1
    scaled = [Fraction(math.comb(n, k), 2 ** (n - 1)) for k in range(n + 1)]
    return tuple(scaled[0::2]), tuple(scaled[1::2])


def matrix_sqrt(matrix: Tensor, method: Method = "pade", degree: int | None = None, backward_steps: int = 8) -> Tensor:
    """A^½, differentiable.

    Args:
        matrix: ``[..., f, f]``, symmetric positive semidefinite.
        method: ``"pade"``: one Cholesky solve; ``"taylor"``: products alone; ``"eigh"``: exact, waits for the device.
        degree: of the polynomials; 5 of Padé, 10 of Taylor by default, as the authors'.
        backward_steps: of the Newton-Schulz iteration in backward, for matrices of condition number κ about log₂ κ + 3
            suffice for the precision of float32; with ``"eigh"`` the Lyapunov equation is solved exactly instead.

    Returns:
        ``[..., f, f]``, in the dtype of ``matrix``.

    Raises:
        ValueError: for what is not square, or settings out of range.
        RuntimeError: for a second derivative, which is not implemented.
    """
    return _checked(_Sqrt, matrix, method, degree, backward_steps)


def matrix_inverse_sqrt(
    matrix: Tensor, method: Method = "pade", degree: int | None = None, backward_steps: int = 8
) -> Tensor:
    """A^-½, differentiable; arguments and errors as of :func:`matrix_sqrt`."""
    return _checked(_InverseSqrt, matrix, method, degree, backward_steps)


def _checked(
    function: type[torch.autograd.Function], matrix: Tensor, method: Method, degree: int | None, steps: int
) -> Tensor:
    check_choice("method", method, tuple(_DEGREES))
    degree = _DEGREES[method] if degree is None else degree
    check_count("degree", degree)
    check_count("backward_steps", steps)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or not matrix.is_floating_point():
        raise ValueError(
            f"matrix must be [..., f, f] of floating point numbers, got {matrix.dtype} of shape {list(matrix.shape)}"
        )
    return function.apply(_wide(matrix), method, degree, steps).to(matrix.dtype)


def _wide(matrix: Tensor) -> Tensor:
    """In float32 or wider."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


class _Sqrt(torch.autograd.Function):
    """R = A^½, with R X + X R = G for its gradient."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, method: Method, degree: int, steps: int) -> Tensor:
        with full_precision():
            root = _root(matrix, method, degree, inverse=False)
        ctx.save_for_backward(root)
        ctx.exact, ctx.steps = method == "eigh", steps
        return root

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (root,) = ctx.saved_tensors
        return solve_lyapunov(root, gradient, ctx.exact, ctx.steps), None, None, None


class _InverseSqrt(torch.autograd.Function):
    """S = A^-½, with S X + X S = -S² G S² for its gradient."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, method: Method, degree: int, steps: int) -> Tensor:
        with full_precision():
            root = _root(matrix, method, degree, inverse=True)
        ctx.save_for_backward(root)
        ctx.exact, ctx.steps = method == "eigh", steps
        return root

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (root,) = ctx.saved_tensors
        with full_precision():
            inverse = root @ root
            right = -inverse @ gradient @ inverse
        return solve_lyapunov(root, right, ctx.exact, ctx.steps), None, None, None


def solve_lyapunov(root: Tensor, right: Tensor, exact: bool = False, steps: int = 8) -> Tensor:
    """The X with R X + X R = G.

    Args:
        root: R, ``[..., f, f]``, symmetric positive definite.
        right: G, ``[..., f, f]``; its symmetric part is what counts for a gradient by a symmetric matrix.
        exact: by the eigenvectors of R instead of the Newton-Schulz iteration.
        steps: of the iteration.
    """
    with full_precision():
        return _lyapunov(root, (right + right.mT) / 2, exact, steps)


def _lyapunov(root: Tensor, right: Tensor, exact: bool, steps: int) -> Tensor:
    if exact:
        values, vectors = torch.linalg.eigh(root)
        inside = vectors.mT @ right @ vectors
        return vectors @ (inside / (values[..., :, None] + values[..., None, :])) @ vectors.mT
    norm = _norm(root)
    b, c = root / norm, right / norm
    identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    for _ in range(steps):
        square = b @ b
        both = 3 * c - 2 * (square @ c) + b @ c @ b
        c = (both + both.mT) / 4  # C B² is the transpose of B² C; what is not symmetric of C would double every step
        b = b @ (3 * identity - square) / 2
    return c / 2


def _norm(matrix: Tensor) -> Tensor:
    """The Frobenius norm of every matrix, ``[..., 1, 1]``, never zero."""
    norm = torch.linalg.matrix_norm(matrix)[..., None, None]
    return torch.where(norm > 0, norm, 1.0)


def _root(matrix: Tensor, method: Method, degree: int, inverse: bool) -> Tensor:
    if method == "eigh":
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        values = values.clamp_min(torch.finfo(values.dtype).tiny if inverse else 0.0)
        return (vectors * (values ** (-0.5 if inverse else 0.5))[..., None, :]) @ vectors.mT
    norm = _norm(matrix)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    x = (matrix + matrix.mT) / (2 * norm)
    if method == "taylor":
        root = _polynomial(taylor_coefficients(degree), identity - x)
        return _solve(root, identity) / norm.sqrt() if inverse else root * norm.sqrt()
    p, q = (_polynomial(one, x) for one in pade_coefficients(degree))
    return _solve(p, q) / norm.sqrt() if inverse else _solve(q, p) * norm.sqrt()


def _polynomial(coefficients: tuple[Fraction, ...], x: Tensor) -> Tensor:
    """Σ_k c_k X^k by Horner's rule."""
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)
    result = identity * float(coefficients[-1])
    for one in reversed(coefficients[:-1]):
        result = torch.matmul(result, x) + identity * float(one)
    return result


def _solve(left: Tensor, right: Tensor) -> Tensor:
    """L^-1 R of commuting polynomials of one symmetric matrix; L is positive definite where A ≥ 0.

    By Cholesky, since batched LU is unreliable on a CPU (pytorch#141358); what has none, such as NaN, stays NaN.
    """
    lower, failed = torch.linalg.cholesky_ex(left)
    lower = torch.where((failed == 0)[..., None, None], lower, torch.nan)
    solved = torch.linalg.solve_triangular(lower, right.expand_as(left), upper=False)
    solved = torch.linalg.solve_triangular(lower.mT, solved, upper=True)
    return (solved + solved.mT) / 2


# -- solvers of the engine ---------------------------------------------------------------------------------------------


def _solver(method: Method) -> Any:
    """(F + λI)^-½, or ^-¼ by a root of the root, with ‖X F X v - v‖ / ‖v‖ for a residual (F X⁴ for ¼)."""

    def solve(matrix: Tensor, damping: Tensor, how: How) -> Solution:
        shifted = damped(matrix, damping, how)
        base = shifted if how.power == 0.5 else _root(shifted, method, _DEGREES[method], inverse=False)
        root = _root(base, method, _DEGREES[method], inverse=True)
        probe = torch.ones_like(matrix[:, :, :1])
        image = root @ probe
        for product in (shifted, root) if how.power == 0.5 else (root, shifted, root, root):
            image = product @ image
        return root, (image - probe).norm(dim=(-2, -1)) / probe.norm(dim=(-2, -1))

    return solve


def _takes(how: How) -> bool:
    return how.plain and how.power in (0.5, 0.25)


register_solver("pade", _solver("pade"), takes=_takes)
register_solver("taylor", _solver("taylor"), takes=_takes)


# -- an example: decorrelated batch normalisation ------------------------------------------------------------------------


class DecorrelatedNorm(nn.Module):
    """Decorrelated batch normalisation (Huang et al. 2018): features times the inverse root of their covariance.

    ::

        Σ = cov(x) + εI,     y = γ Σ^-½ (x - mean) + β              in groups of channels

    In training mean and covariance are the batch's, and the whitening matrix is differentiated; in evaluation they are
    running averages.

    Args:
        channels: size of dimension 1.
        groups: channels are whitened in so many groups of equal size.
        eps: ε.
        momentum: weight of the new in running averages.
        affine: learn γ and β.
        method: of the inverse root, see :func:`matrix_inverse_sqrt`.

    Raises:
        ValueError: naming the parameter, the value and what is allowed.
    """

    running_mean: Tensor
    running_covariance: Tensor

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        eps: float = 1e-2,
        momentum: float = 0.1,
        affine: bool = True,
        method: Method = "pade",
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("groups", groups)
        check_number("eps", eps, strict=True)
        check_number("momentum", momentum, high=1.0, strict=True)
        check_choice("method", method, tuple(_DEGREES))
        if channels % groups:
            raise ValueError(f"groups must divide channels={channels}, got {groups}")
        self.groups, self.eps, self.momentum, self.method = groups, eps, momentum, method
        size = channels // groups
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(groups, size, 1))
        self.register_buffer("running_covariance", torch.eye(size).repeat(groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Whiten ``[n, channels, ...]``."""
        if x.ndim < 2 or x.shape[1] != self.running_mean.numel():
            raise ValueError(f"x must be [n, {self.running_mean.numel()}, ...], got shape {list(x.shape)}")
        with full_precision():  # as of other normalisations
            return self._whitened(_wide(x)).to(x.dtype)

    def _whitened(self, x: Tensor) -> Tensor:
        features = x.movedim(1, 0).reshape(self.groups, -1, x.numel() // x.shape[1])  # groups channels places
        if self.training:
            mean = features.mean(-1, keepdim=True)
            centred = features - mean
            covariance = centred @ centred.mT / features.shape[-1]
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_covariance.lerp_(covariance.to(self.running_covariance), self.momentum)
        else:
            centred, covariance = features - self.running_mean, self.running_covariance
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        white = matrix_inverse_sqrt(covariance + self.eps * eye, self.method) @ centred
        y = white.reshape(x.shape[1], x.shape[0], *x.shape[2:]).movedim(0, 1)
        if self.weight is None or self.bias is None:
            return y
        shape = (-1, *[1] * (x.ndim - 2))
        return y * self.weight.view(shape) + self.bias.view(shape)
