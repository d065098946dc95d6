"""The peer in JAX: the same meta-step, jit + scan + vmap, on a problem written by :mod:`export`.

Nothing but JAX, numpy and the standard library is needed. Two variants with the same mathematics:

- plain: as one writes it down. A coordinate per row, the real losses, autodiff keeps what it needs.
- tuned: as fast as we could make it. A coordinate per column, so that elementwise work runs along memory;
  the linear surrogate Σ ⟨∇f(θ_k), θ_k⟩ with constant ∇f, which has the same first-order meta-gradient; and
  steps that are computed again in backward, so that only the state is kept.

S slots, N coordinates, M = S · N, K inner steps, H hidden units.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import worker

LOG_SCALE, OUTPUT_SCALE = 10.0, 0.1
LEARNING_RATE, BETA1, BETA2, EPSILON = 1e-3, 0.9, 0.999, 1e-8
Array = Any
"""A jax.Array. JAX is imported late, after its threads are limited."""


class Problem(NamedTuple):
    """S tasks: losses and gradients of all of them, on the k-th minibatch."""

    losses: Callable[[Array, Array, dict[str, Array]], Array]
    """(θ (S, N), k, constants) -> (S,)."""
    gradients: Callable[[Array, Array, dict[str, Array]], tuple[Array, Array]]
    """The same -> losses (S,), and gradients (S, N)."""


def prepare(path: str, variant: str, threads: int) -> worker.Candidate:
    """Load the problem and compile."""
    worker.pin(threads)  # XLA has no flag that limits all of its threads
    if threads == 1:
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    import jax
    import jax.numpy as jnp
    import numpy as np

    with np.load(path) as file:
        arrays = {name: jnp.asarray(file[name]) for name in file.files if name not in ("kind", "steps")}
        kind, steps = str(file["kind"]), int(file["steps"])
    weights = {name.removeprefix("phi."): arrays.pop(name) for name in [*arrays] if name.startswith("phi.")}
    tuned, theta = variant == "tuned", arrays.pop("theta0")
    step = jax.jit(partial(meta_step, partial(meta_loss, problem(kind), tuned, steps)))

    @jax.jit
    def start() -> tuple[Array, ...]:
        shape = (len(weights["output"]), theta.size)
        return tuple(jnp.zeros(shape if tuned else shape[::-1]) for _ in range(4))

    moments = jax.tree.map(jnp.zeros_like, weights)
    memory: list[Any] = [weights, (moments, moments, jnp.zeros(()))]
    compiled = step.lower(*memory, theta, start(), arrays).compile()
    jax.block_until_ready(compiled(*memory, theta, start(), arrays))

    def once() -> float:
        *memory[:], loss = compiled(*memory, theta, start(), arrays)
        return float(loss)

    return worker.Candidate(f"JAX {jax.__version__}, {variant}", once, {})


def problem(kind: str) -> Problem:
    """The tasks, as in :mod:`workloads`."""
    import jax
    import jax.numpy as jnp

    def sphere(theta: Array, c: dict[str, Array]) -> Array:
        return 0.5 * jnp.sum((theta - c["center"]) ** 2)

    def quadratic(theta: Array, c: dict[str, Array]) -> Array:
        return jnp.sum((c["w"] @ theta - c["y"]) ** 2)

    def mlp(theta: Array, c: dict[str, Array]) -> Array:
        w1, b1, w2, b2 = jnp.split(theta, [15_680, 15_700, 15_900])
        hidden = jax.nn.sigmoid(c["x"] @ w1.reshape(20, 784).T + b1)
        logs = jax.nn.log_softmax(hidden @ w2.reshape(10, 20).T + b2)
        return -jnp.mean(jnp.take_along_axis(logs, c["label"][:, None], 1))

    loss = {"sphere": sphere, "quadratic": quadratic, "mlp": mlp}[kind]

    def at(k: Array, constants: dict[str, Array]) -> dict[str, Array]:
        if kind != "mlp":
            return constants
        index = constants["index"][k]
        return {"x": jnp.take(constants["pixels"], index, 0), "label": jnp.take(constants["labels"], index)}

    return Problem(
        lambda theta, k, constants: jax.vmap(loss)(theta, at(k, constants)),
        lambda theta, k, constants: jax.vmap(jax.value_and_grad(loss))(theta, at(k, constants)),
    )


def rule(weights: dict[str, Array], grad: Array, state: Any, tuned: bool) -> tuple[Array, Any]:
    """The update (M,) for gradients (M,), and the new state: h and c of both layers, (H, M) if tuned."""
    import jax.numpy as jnp

    w, axis = weights, 0 if tuned else -1

    def layer(name: str, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        w_input, w_hidden, bias = (w[f"{name}_{part}"] for part in ("input", "hidden", "bias"))
        if tuned:
            return cell(w_input @ x + w_hidden @ h + bias[:, None], c, axis)
        return cell(x @ w_input.T + h @ w_hidden.T + bias, c, axis)

    h1, c1, h2, c2 = state
    h1, c1 = layer("lower", jnp.stack(log_sign(grad), axis), h1, c1)
    h2, c2 = layer("upper", h1, h2, c2)
    output = w["output"] @ h2 if tuned else h2 @ w["output"]
    return OUTPUT_SCALE * (output + w["output_bias"]), (h1, c1, h2, c2)


def cell(gates: Array, c: Array, axis: int) -> tuple[Array, Array]:
    """h and c from the gates' inputs."""
    import jax
    import jax.numpy as jnp

    i, f, g, o = jnp.split(gates, 4, axis)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def log_sign(grad: Array) -> tuple[Array, Array]:
    """(log|g|/p, sgn g) where |g| >= e^-p, else (−1, e^p g)."""
    import jax.numpy as jnp

    size, threshold = jnp.abs(grad), math.exp(-LOG_SCALE)
    large = size >= threshold
    log = jnp.log(jnp.where(large, size, threshold)) / LOG_SCALE
    return log, jnp.where(large, jnp.sign(grad), math.exp(LOG_SCALE) * grad)


def meta_loss(
    tasks: Problem, tuned: bool, steps: int, weights: Any, theta: Array, state: Any, constants: Any
) -> tuple[Array, Array]:
    """What is differentiated, and the meta-loss Σ_k f(θ_k), mean over slots."""
    import jax
    import jax.numpy as jnp

    constant = jax.lax.stop_gradient

    def inner_step(carry: Any, k: Array) -> tuple[Any, tuple[Array, Array]]:
        theta, state = carry
        losses, grad = tasks.gradients(constant(theta), k, constants)
        grad = constant(grad)
        update, state = rule(weights, grad.reshape(-1), state, tuned)
        linear = jnp.sum(theta * grad) if tuned else 0.0
        theta = theta + update.reshape(theta.shape)
        if not tuned:
            linear = tasks.losses(theta, k + 1, constants).sum()
        return (theta, state), (linear, losses.sum())

    body = jax.checkpoint(inner_step) if tuned else inner_step
    (end, _), (terms, losses) = jax.lax.scan(body, (theta, state), jnp.arange(steps))
    if not tuned:
        return terms.sum() / len(theta), terms.sum() / len(theta)
    last, grad = tasks.gradients(constant(end), steps, constants)
    surrogate = terms.sum() + jnp.sum(end * constant(grad))
    return surrogate / len(theta), (losses[1:].sum() + last.sum()) / len(theta)


def meta_step(
    loss: Callable[..., Any], weights: Any, moments: Any, theta: Array, state: Any, constants: Any
) -> tuple[Any, Any, Array]:
    """Window forward, backward to φ, Adam on φ: φ, Adam's moments, and the meta-loss before."""
    import jax
    import jax.numpy as jnp

    (_, value), grads = jax.value_and_grad(loss, has_aux=True)(weights, theta, state, constants)
    first, second, count = moments
    count = count + 1
    first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, first, grads)
    second = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, second, grads)

    def moved(weight: Array, m: Array, v: Array) -> Array:
        scale = jnp.sqrt(v / (1 - BETA2**count)) + EPSILON
        return weight - LEARNING_RATE * m / (1 - BETA1**count) / scale

    return jax.tree.map(moved, weights, first, second), (first, second, count), value


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--problem", required=True)
    parser.add_argument("--variant", choices=["plain", "tuned"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    worker.serve(lambda: prepare(args.problem, args.variant, args.threads))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
