"""Online Bayesian learning: extended Kalman filters over a network's parameters, low-rank plus diagonal or dense.

A filter believes that the parameters θ are N(m, Λ⁻¹), and has seen one example, or a small batch, at a time. Between
observations they move, θ ← γ θ + N(0, q I); an observation is y = h(x, θ) + N(0, R), with h linearised at the mean. LO-FI
(Chang, Durán-Martín, Shestopaloff, Jones & Murphy 2023, arXiv 2305.19535) keeps Λ = diag(Υ) + W Wᵀ, with L columns in W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from .beliefs import DenseCovariance, Dynamics, Gaussian, LowRankPrecision, Observation
from .checks import check_choice, check_number, number, resolve
from .precision import full_precision

__all__ = ["DenseCovariance", "Dynamics", "ExtendedKalmanFilter", "LoFi", "LowRankPrecision", "Observation"]

Model = nn.Module | Callable[[Tensor, Tensor], Tensor]
B = TypeVar("B", bound=Gaussian)

NOISE_FLOOR = 1e-6
"""Least adaptive variance of the observations (authors' code)."""

STILL = Dynamics()
"""Parameters that do not move."""

UNIT = Observation()
"""A Gaussian of unit variance."""


class Filter(Generic[B]):
    """What the two filters share; see :class:`LoFi` and :class:`ExtendedKalmanFilter`.

    Attributes:
        mean: m ``[P]``, the parameters in the order of ``named_parameters()``, each flattened.
        belief: Λ⁻¹, in one of the forms of :mod:`curvlib.beliefs`.
        prior_mean: m₀ ``[P]``, and
        prior_precision: η, the prior moved along by the dynamics.
        noise: variance of a Gaussian observation, ``[]``, where it is adaptive.
        examples: how many have been seen.
        updates: how many there were.
    """

    belief: B

    def __init__(
        self, model: Model, initial: Tensor | None, prior_variance: float, dynamics: Dynamics, observation: Observation
    ) -> None:
        if callable(prior_variance):
            raise ValueError(f"prior_variance must be a number above 0, got {prior_variance!r}")
        check_number("prior_variance", prior_variance, strict=True)
        self.model, self.dynamics, self.observation = model, dynamics, observation
        self._parameters = _trainable(model, initial)
        flat = [one.detach().reshape(-1) for one in self._parameters.values()]
        dtype = torch.float32
        for one in flat:
            dtype = torch.promote_types(dtype, one.dtype)
        self.mean = torch.cat([one.to(dtype) for one in flat])
        if not self.mean.isfinite().all():
            raise ValueError("parameters must be finite, got NaN or infinity")
        self.prior_mean = self.mean.clone()
        self.prior_variance = float(prior_variance)
        self.prior_precision = 1 / self.prior_variance
        self.noise = self.mean.new_tensor(number(resolve(observation, 0).variance))
        self.examples = 0
        self.updates = 0

    @torch.no_grad()
    def predict(self) -> None:
        """Inflate, then move: m ← γ m, Λ ← (γ² Λ⁻¹ + q I)⁻¹, and the prior likewise.

        Raises:
            FloatingPointError: where the result is not finite; nothing is changed.
        """
        dynamics = resolve(self.dynamics, self.updates)
        gamma, alpha, eta = number(dynamics.gamma), number(dynamics.inflation), self.prior_precision
        q = (1 - gamma**2) * self.prior_variance if dynamics.steady_state else number(dynamics.q)
        belief, mean = self.belief, self.mean
        with full_precision(), _words():
            if alpha:
                belief = belief.inflated(alpha, 0.0 if dynamics.kind == "simple" else alpha * eta)
                if dynamics.kind == "bayesian":
                    mean = mean + belief.solve(alpha * eta / (1 + alpha) * (self.prior_mean - mean))
            if gamma != 1 or q:
                belief = belief.predicted(gamma, q)
            self._commit(belief, gamma * mean)
        self.prior_mean = gamma * self.prior_mean
        self.prior_precision = eta / (gamma**2 + q * eta)

    @torch.no_grad()
    def update(self, inputs: Tensor, observed: Tensor) -> None:
        """Condition on examples, all linearised at the present mean (the paper has one at a time).

        Args:
            inputs: ``[n, ...]``.
            observed: in the shape of the model's outputs, ``[n]`` if there is one output; class numbers ``[n]`` for
                ``"categorical"``.

        Raises:
            ValueError: for examples that do not fit or are not finite, before anything changes.
            FloatingPointError: where outputs, Jacobian or result are not finite; nothing is changed.
        """
        if len(inputs) == 0 or observed.ndim == 0 or len(observed) != len(inputs):
            raise ValueError(
                f"inputs and observations must have the same number of rows from 1, got {list(inputs.shape)} "
                f"and {list(observed.shape)}"
            )
        observation = resolve(self.observation, self.updates)
        with full_precision(), _words():
            jacobian, expected = self._linearised(inputs, observation)
            target = observation.target(observed, expected)
            root = torch.linalg.cholesky(self._covariance(observation, expected))
            both = torch.cat([jacobian, (target - expected).view(len(inputs), -1, 1)], -1)
            white = torch.linalg.solve_triangular(root, both, upper=False).flatten(0, 1)
            belief, step = self.belief.conditioned(white[:, :-1], white[:, -1])
            mean, noise, examples = self.mean + step, self.noise, self.examples + len(inputs)
            if observation.adaptive:
                errors = (target - self._expected(mean, inputs, observation)).square().sum()
                weight = len(inputs) / examples
                noise = noise.lerp(errors / target.numel(), weight).clamp_min(NOISE_FLOOR)
            self._commit(belief, mean, noise)
        self.noise, self.examples, self.updates = noise, examples, self.updates + 1

    def step(self, inputs: Tensor, observed: Tensor) -> None:
        """:meth:`predict`, then :meth:`update`; if the update fails, so that neither has happened.

        Args:
            inputs: ``[n, ...]``.
            observed: as for :meth:`update`.

        Raises:
            ValueError: as :meth:`update`.
            FloatingPointError: as :meth:`update`.
        """
        before = self.mean, self.belief, self.prior_mean, self.prior_precision
        try:
            self.predict()
            self.update(inputs, observed)
        except BaseException:  # Ctrl-C, too
            self.mean, self.belief, self.prior_mean, self.prior_precision = before
            self._write()
            raise

    @torch.no_grad()
    def predictive(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean h(x, m) and covariance H Λ⁻¹ Hᵀ + R of observations to come, by the same linearisation.

        Args:
            inputs: ``[n, ...]``.

        Returns:
            ``[n, C]`` and ``[n, C, C]``, of class probabilities for ``"categorical"``.
        """
        observation = resolve(self.observation, self.updates)
        with full_precision(), _words():
            jacobian, expected = self._linearised(inputs, observation)
            count, outputs, size = jacobian.shape
            solved = self.belief.solve(jacobian.reshape(-1, size).mT).mT.view(count, outputs, size)
            covariance = jacobian @ solved.mT + self._covariance(observation, expected)
            return expected.reshape(count, -1), (covariance + covariance.mT) / 2

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as copies; settings and model are the caller's."""
        state = {name: getattr(self, name) for name in _STATE}
        state["belief"] = {entry.name: getattr(self.belief, entry.name) for entry in fields(self.belief)}  # type: ignore[arg-type]
        return _copied(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken, bitwise; the mean is written to the model.

        Raises:
            ValueError: for the state of another filter, naming the entry; nothing is changed.
        """
        mine = self.state_dict()
        for found, own, where in ((state, mine, ""), (state.get("belief", {}), mine["belief"], "belief.")):
            if set(found) != set(own):
                raise ValueError(
                    f"state must have the entries {sorted(own)} in {where or 'itself'}, got {sorted(found)}"
                )
            for name, value in own.items():
                if isinstance(value, Tensor) and getattr(found[name], "shape", None) != value.shape:
                    raise ValueError(f"{where}{name} must be {list(value.shape)}, got {found[name]!r}")
        loaded = _copied(state)
        self.belief = type(self.belief)(**{name: value.to(self.mean) for name, value in loaded["belief"].items()})
        for name in _STATE:
            setattr(self, name, loaded[name].to(self.mean) if isinstance(loaded[name], Tensor) else loaded[name])
        self._write()

    def _covariance(self, observation: Observation, expected: Tensor) -> Tensor:
        variance = self.noise if observation.adaptive else self.noise.new_tensor(number(observation.variance))
        return observation.covariance(expected.reshape(len(expected), -1), variance)

    def _expected(self, mean: Tensor, inputs: Tensor, observation: Observation) -> Tensor:
        """The mean h of observations for ``[n, ...]``, at parameters."""
        if isinstance(self.model, nn.Module):
            outputs = functional_call(self.model, self._named(mean), (inputs,))
        else:
            outputs = self.model(mean, inputs)
        return observation.mean(outputs.to(mean.dtype))

    def _linearised(self, inputs: Tensor, observation: Observation) -> tuple[Tensor, Tensor]:
        """Jacobians ``[n, C, P]`` of h, and h ``[n, ...]``, at the mean."""

        def of_one(mean: Tensor, example: Tensor) -> tuple[Tensor, Tensor]:
            expected = self._expected(mean, example.unsqueeze(0), observation).squeeze(0)
            return expected.reshape(-1), expected

        if inputs.is_floating_point() and not inputs.isfinite().all():
            rows = (~inputs.reshape(len(inputs), -1).isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(f"inputs must be finite, got NaN or infinity in rows {rows}; nothing was changed")
        jacobian, expected = vmap(jacrev(of_one, has_aux=True), in_dims=(None, 0))(self.mean, inputs)
        if not (jacobian.isfinite().all() and expected.isfinite().all()):
            raise FloatingPointError("outputs or their Jacobian are not finite; nothing was changed")
        return jacobian, expected

    def _named(self, mean: Tensor) -> dict[str, Tensor]:
        pieces = mean.split([one.numel() for one in self._parameters.values()])
        named = zip(self._parameters.items(), pieces, strict=True)
        return {name: piece.view(one.shape).to(one.dtype) for (name, one), piece in named}

    def _commit(self, belief: B, mean: Tensor, *others: Tensor) -> None:
        tensors = [mean, *others, *(getattr(belief, entry.name) for entry in fields(belief))]  # type: ignore[arg-type]
        if not all(bool(one.isfinite().all()) for one in tensors):
            raise FloatingPointError(_OVERFLOW)
        self.belief, self.mean = belief, mean
        self._write()

    def _write(self) -> None:
        """The mean into the module's parameters."""
        with torch.no_grad():
            if isinstance(self.model, nn.Module):
                for name, piece in self._named(self.mean).items():
                    self._parameters[name].copy_(piece)


class LoFi(Filter[LowRankPrecision]):
    """LO-FI: an extended Kalman filter whose precision is diag(Υ) + W Wᵀ (Chang et al. 2023).

    Time and memory of a step are O(P (L + nC)²) and O(P (L + nC)), for n examples of C outputs. With L = 0 only the
    diagonal of the precision is kept, the variational diagonal filter of the authors' code; with L = P nothing is lost.

    Example:
        >>> lofi = LoFi(model, prior_variance=0.1, memory=10)
        >>> for inputs, labels in stream:
        ...     lofi.step(inputs, labels)  # model(...) predicts with the mean

    Args:
        model: a module, of which the parameters that require a gradient are learned, from their present values; or a
            function of (θ ``[P]``, inputs ``[n, ...]``) that returns outputs ``[n, ...]``. An example's outputs must not
            depend on the others, nor be random.
        initial: θ of a function, the prior's mean.
        prior_variance: σ₀² of every parameter.
        memory: L, columns of W.
        spherical: Υ is one number η for all parameters; what W cannot hold is dropped instead of added to it.
        dynamics: between observations.
        observation: what is observed.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        model: Model,
        initial: Tensor | None = None,
        *,
        prior_variance: float = 1.0,
        memory: int = 10,
        spherical: bool = False,
        dynamics: Dynamics = STILL,
        observation: Observation = UNIT,
    ) -> None:
        if not isinstance(memory, int) or isinstance(memory, bool) or memory < 0:
            raise ValueError(f"memory must be a whole number from 0, got {memory!r}")
        check_choice("spherical", spherical, (False, True))
        super().__init__(model, initial, prior_variance, dynamics, observation)
        diagonal = self.mean.new_full(() if spherical else self.mean.shape, self.prior_precision)
        self.belief = LowRankPrecision(diagonal, self.mean.new_zeros(len(self.mean), memory))


class ExtendedKalmanFilter(Filter[DenseCovariance]):
    """The filter that LO-FI approximates: the same beliefs with a dense covariance, O(P²) a step (nC < P).

    Inflation is that of :class:`Dynamics`, before the dynamics; the authors' dense filter multiplies its covariance by
    1 + α after them.

    Args:
        model: as for :class:`LoFi`.
        initial: as for :class:`LoFi`.
        prior_variance: σ₀² of every parameter.
        dynamics: between observations.
        observation: what is observed.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        model: Model,
        initial: Tensor | None = None,
        *,
        prior_variance: float = 1.0,
        dynamics: Dynamics = STILL,
        observation: Observation = UNIT,
    ) -> None:
        super().__init__(model, initial, prior_variance, dynamics, observation)
        self.belief = DenseCovariance(torch.diag(self.mean.new_full(self.mean.shape, self.prior_variance)))


_STATE = ("mean", "prior_mean", "prior_precision", "noise", "examples", "updates")
_OVERFLOW = "the filter's next belief is not finite or not positive definite; nothing was changed"


@contextmanager
def _words() -> Iterator[None]:
    """Errors of the linear algebra, said in words; nothing is changed before it is done."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise FloatingPointError(f"{_OVERFLOW} ({error})") from error


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(one) for name, one in value.items()}
    return value.detach().clone() if isinstance(value, Tensor) else value


def _trainable(model: Model, initial: Tensor | None) -> dict[str, Tensor]:
    """What is learned, by name."""
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise ValueError(f"model must be a module or a function of (theta, inputs), got {model!r}")
        if initial is None or initial.ndim != 1 or not initial.numel() or not initial.is_floating_point():
            raise ValueError(f"initial must be a vector of floating-point numbers for a function, got {initial!r}")
        return {"initial": initial}
    if initial is not None:
        raise ValueError("initial must be None for a module, whose parameters are the initial mean, got a tensor")
    named: dict[str, Tensor] = {
        name: one for name, one in model.named_parameters() if one.requires_grad and one.numel()
    }
    if not named:
        raise ValueError(f"model must have parameters that require a gradient, got {type(model).__name__} without")
    return named
