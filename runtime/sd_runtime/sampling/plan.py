"""SamplingPlan: a sampler and its path, compiled to a table of numbers.

Every sampler is linear in the arrays it touches, so what it does to them can be read off by running it once on one-hot
vectors.  What remains is a small state and one matrix for each evaluation of the network:

    state = coefficients[k] @ [state, guided network output, noise]          state[0] is always the network's next input

This is all that a runtime, on the host or on a GPU, has to know about samplers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..tensor import Array
from .path import SamplingPath
from .samplers import Model, StepFunction

Terms = tuple[tuple[int, np.float32], ...]  # a row of a matrix: (column, coefficient) where it is not zero


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """A whole trajectory: E evaluations of the network, and a state of S tensors between them.

    timesteps         (E,) float64, told to the network
    coefficients      (E, S, S + 2) float64; columns: the state, the network's output, fresh noise
    draws             (E,) bool, whether evaluation k takes fresh noise
    steps             (E,) int64, the step of the sampler that evaluation k belongs to, from 0
    sigmas            (E,) float64, σ of what evaluation k leaves: of state[0], the network's next input
    latent_scales     (E,) float64, times that input: the latents as diffusers' samplers keep them then, x or √ᾱ · x
    init_noise_scale  text to image: the network's first input = init_noise_scale · noise
    start_signal,     image to image: the network's first input = start_signal · latents + start_noise · noise
    start_noise
    """

    timesteps: Array
    coefficients: Array
    draws: Array
    steps: Array
    sigmas: Array
    latent_scales: Array
    init_noise_scale: float
    start_signal: float
    start_noise: float

    def __post_init__(self) -> None:
        for array in (
            self.timesteps,
            self.coefficients,
            self.draws,
            self.steps,
            self.sigmas,
            self.latent_scales,
        ):
            array.setflags(write=False)  # plans are cached and shared

    def __len__(self) -> int:
        return len(self.timesteps)

    def initial_state(self, latents: Array) -> Array:
        """The state before the first evaluation, (S, N) float32; `latents`, N values, are the network's first input."""
        state = np.zeros((self.coefficients.shape[1], latents.size), np.float32)
        state[0] = latents.ravel()
        return state

    def advance(self, k: int, state: Array, model_output: Array, noise: Array | None) -> Array:
        """The state after evaluation k, a new (S, N) float32: state (S, N), model_output (N,) and, where draws[k],
        noise (N,).  Only coefficients that are not zero cost anything."""
        sources = (*state, model_output, noise)
        after, scratch = np.empty_like(state), np.empty_like(state[0])
        for row, terms in zip(after, self._terms[k], strict=True):
            if not terms:
                row.fill(0)
                continue
            np.multiply(sources[terms[0][0]], terms[0][1], out=row)
            for column, coefficient in terms[1:]:
                np.multiply(sources[column], coefficient, out=scratch)
                row += scratch
        return after

    def table(self, states: int) -> Array:
        """(E, states, states + 2) float32: `coefficients` for a state of at least S tensors, the rest of which stay 0;
        the last two columns are the network's output and fresh noise in any case."""
        own = self.coefficients.shape[1]
        table = np.zeros((len(self), states, states + 2), np.float32)
        table[:, :own, :own] = self.coefficients[..., :own]
        table[:, :own, states:] = self.coefficients[..., own:]
        return table

    @cached_property
    def _terms(self) -> list[list[Terms]]:
        return [
            [tuple((int(c), np.float32(row[c])) for c in np.flatnonzero(row)) for row in matrix]
            for matrix in self.coefficients
        ]


def scale_after(path: SamplingPath, i: int) -> float:
    """What turns x, at the end of step i, into latents."""
    return path.final_scale if i == len(path) - 1 else float(1 / np.sqrt(1 + path.sigmas_next[i] ** 2))


@dataclass
class TracedEvaluation:
    """One call of the network while a step is traced; arrays are combinations of the one-hot vectors.

    fed, timestep: what the network was given; output, noise: the one-hot vectors of its output and of fresh noise."""

    fed: Array
    timestep: float
    output: Array
    noise: Array
    draws: bool = False


@dataclass(frozen=True)
class WatchedModel(Model):
    """The network, keeping the noise level at which it was called each time."""

    sigmas: list[float] = field(default_factory=list)

    def output(self, x: Array, sigma: float, timestep: float) -> Array:
        self.sigmas.append(float(sigma))
        return super().output(x, sigma, timestep)


@dataclass
class StepTrace:
    """One step run on one-hot vectors: those of its input and of the history it found, then two per evaluation.

    sigmas: after each of its evaluations, that of the next one, and after the last that to which the step leads."""

    held: int
    evaluations: list[TracedEvaluation] = field(default_factory=list)
    left: tuple[Array, ...] = ()  # the next input and the history that the step leaves
    sigmas: tuple[float, ...] = ()


WIDTH = 24  # one-hot vectors kept ready: more than any step needs


def trace_step(step: StepFunction, path: SamplingPath, i: int, prediction_type: str, held: int) -> StepTrace:
    """Run step i once, finding `held` arrays of history."""
    basis = iter(np.eye(WIDTH))
    latents, history = next(basis), tuple(next(basis) for _ in range(held))
    trace = StepTrace(held)

    def network(fed: Array, timestep: float) -> Array:
        trace.evaluations.append(TracedEvaluation(fed, float(timestep), next(basis), next(basis)))
        return trace.evaluations[-1].output

    def noise() -> Array:
        evaluation = trace.evaluations[-1]
        if evaluation.draws:
            raise AssertionError("a step draws at most once after each evaluation")
        evaluation.draws = True
        return evaluation.noise

    model = WatchedModel(network, prediction_type)
    x, history = step(path, i, latents * np.sqrt(1 + path.sigmas[i] ** 2), history, model, noise)
    trace.left = (x * scale_after(path, i), *history)
    trace.sigmas = (*model.sigmas[1:], float(path.sigmas_next[i]))
    return trace


def compile_plan(step: StepFunction, path: SamplingPath, prediction_type: str) -> SamplingPlan:
    """Trace every step and lay the traces out as one matrix for each evaluation."""
    traces: list[StepTrace] = []
    for i in range(len(path)):
        held = len(traces[-1].left) - 1 if traces else 0
        traces.append(trace_step(step, path, i, prediction_type, held))
    history = max(len(trace.left) - 1 for trace in traces)
    depth = max(len(trace.evaluations) for trace in traces)
    matrices = [evaluation_matrix(trace, k, history, depth) for trace in traces for k in range(len(trace.evaluations))]
    evaluations = [evaluation for trace in traces for evaluation in trace.evaluations]
    sigma, sigmas = path.sigmas[0], np.array([sigma for trace in traces for sigma in trace.sigmas])
    latent_scales = np.sqrt(1 + sigmas**2) if path.in_sigma_space else np.ones(len(sigmas))
    latent_scales[-1] = 1  # the last state is the finished latents
    return SamplingPlan(
        timesteps=np.array([evaluation.timestep for evaluation in evaluations]),
        coefficients=without_dead_slots(np.array(matrices)),
        draws=np.array([evaluation.draws for evaluation in evaluations]),
        steps=np.repeat(np.arange(len(path)), [len(trace.evaluations) for trace in traces]),
        sigmas=sigmas,
        latent_scales=latent_scales,
        init_noise_scale=path.init_noise_scale,
        start_signal=float(1 / np.sqrt(1 + sigma**2)),
        start_noise=float(sigma / np.sqrt(1 + sigma**2)),
    )


def evaluation_matrix(trace: StepTrace, k: int, history: int, depth: int) -> Array:
    """The (S, S + 2) matrix of a step's evaluation k, with the state laid out as

    input | history … | the step's own input | output and noise of evaluation 0 | … | of evaluation depth − 2
    """
    origin = 1 + history
    size = origin + (2 * depth - 1 if depth > 1 else 0)

    def row(vector: Array) -> Array:
        """A combination of one-hot vectors as one of the state, the output and the noise at evaluation k."""
        out = np.zeros(size + 2)
        out[origin if k else 0] = vector[0]
        out[1 : 1 + trace.held] = vector[1 : 1 + trace.held]
        drawn = vector[1 + trace.held :]
        out[origin + 1 : origin + 1 + 2 * k] = drawn[: 2 * k]
        out[size:] = drawn[2 * k : 2 * k + 2]
        return out

    if k == len(trace.evaluations) - 1:
        matrix = np.zeros((size, size + 2))
        matrix[: len(trace.left)] = [row(vector) for vector in trace.left]
        return matrix
    matrix = np.eye(size, size + 2)  # within a step all is kept …
    matrix[0] = row(trace.evaluations[k + 1].fed)
    if k == 0:
        matrix[origin] = np.eye(size + 2)[0]  # … with its input put aside
    matrix[origin + 1 + 2 * k : origin + 3 + 2 * k] = np.eye(size + 2)[size:]  # and the new output and noise
    return matrix


def without_dead_slots(matrices: Array) -> Array:
    """(E, S, S + 2) without the state slots that nothing but themselves ever reads."""
    while True:
        size = matrices.shape[1]
        read = [k == 0 or bool(np.delete(matrices[:, :, k], k, axis=1).any()) for k in range(size)]
        if all(read):
            return matrices
        matrices = matrices[:, read][:, :, [*read, True, True]]
