"""The optimizer: optax, with parameter groups by path, and the learning-rate schedule.

group    which                        update                     weight decay
matrix   every other weight matrix    AdamW, or Muon             yes
table    embed, head, router/weight   AdamW                      yes
vector   norms, q/k/v biases          AdamW                      no
scale    learned quantizer scales     Adam at optim.scale_lr     no
frozen   router/bias                  none: moved by the balance rule in `step.py`

Besides, a phase may freeze what it likes (`is_frozen`): no gradient, no decay, no balance rule.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qatmoe.config import OptimConfig, PhaseConfig
from qatmoe.tree import leaves_by_path, path_of

GROUPS = (
    ("scale", r"^scales/"),
    ("frozen", r"router/bias$"),
    ("table", r"^model/(embed|head)$|router/weight$"),
    ("vector", r"norm$|attn/[qkv]_bias$"),
    ("matrix", r"(attn/[qkvo]|gate_up|down|eh_proj)$"),
)


def group_of(path: str) -> str:
    """The group of a parameter, by its path.

    Raises:
      ValueError: no rule matches; a new kind of parameter must be given its group.
    """
    for group, pattern in GROUPS:
        if re.search(pattern, path):
            return group
    raise ValueError(f"no optimizer group matches parameter {path!r}; add it to optim.GROUPS")


def is_frozen(path: str, freeze: str) -> bool:
    """Whether a phase with this `freeze` leaves the parameter "model/PATH" or "scales/PATH" as it is."""
    return bool(freeze) and bool(re.search(freeze, path.removeprefix("model/")))


def labels(params: Any) -> Any:
    """The tree of group names that mirrors `params`."""
    return jax.tree_util.tree_map_with_path(lambda p, _: group_of(path_of(p)), params)


def make_optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
    """Gradients -> updates at the groups' full rates; a step multiplies them by the factor that `schedule` gives."""
    b1, b2 = cfg.betas
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=cfg.eps, mu_dtype=jnp.dtype(cfg.moments_dtype))
    decay = optax.add_decayed_weights(cfg.weight_decay)
    adamw = optax.chain(adam, decay, optax.scale(-cfg.lr))
    matrix = adamw if cfg.name == "adamw" else optax.chain(_muon(cfg), decay, optax.scale(-cfg.lr))
    groups = optax.multi_transform(
        {
            "matrix": matrix,
            "table": adamw,
            "vector": optax.chain(adam, optax.scale(-cfg.lr)),
            "scale": optax.chain(adam, optax.scale(-cfg.scale_lr)),
            "frozen": optax.set_to_zero(),
        },
        labels,
    )
    return optax.chain(optax.clip_by_global_norm(cfg.clip), groups) if cfg.clip else groups


def _muon(cfg: OptimConfig) -> optax.GradientTransformation:
    """Muon on the last two axes (out, in); axes before them are layers and experts.

    An orthogonal update has RMS 1/sqrt(max(out, in)); 0.2 sqrt(max(out, in)) gives it the size of an AdamW update, so
    that one rate and one weight decay serve both (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4).
    """
    dims = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    muon = optax.contrib.scale_by_muon(
        beta=0.95,
        mu_dtype=jnp.dtype(cfg.moments_dtype),
        weight_dimension_numbers=lambda params: jax.tree.map(
            lambda p: optax.contrib.MuonDimensionNumbers(*(a % p.ndim for a in dims)), params
        ),
    )
    resize = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: u * (0.2 * math.sqrt(max(u.shape[-2:]))), updates)
    )
    return optax.chain(muon, resize)


def schedule(cfg: OptimConfig, phase: PhaseConfig, step: int) -> float:
    """Factor on every rate at `step` (0-based) of a phase: warmup, then stable and linear decay ("wsd"), or cosine."""
    peak = phase.lr / cfg.lr if phase.lr else 1.0
    warm = min(1.0, (step + 1) / phase.warmup) if phase.warmup else 1.0
    if cfg.schedule == "cosine":
        length = max(phase.steps - phase.warmup, 1)
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, (step - phase.warmup) / length))))
    elif phase.decay:
        fall = min(1.0, max(0.0, (phase.steps - step) / phase.decay))
    else:
        fall = 1.0
    return peak * warm * (cfg.final_lr + (1 - cfg.final_lr) * fall)


def carry_over(new: Any, old: Any) -> Any:
    """Optimizer state of a branch: the trunk's moments where path and shape agree, `new` (fresh) elsewhere.

    Adam's step count is reset whenever any of its moments is, or bias correction would be wrong.
    """
    known, wanted = leaves_by_path(old), leaves_by_path(new)
    begun = [
        path
        for path, leaf in wanted.items()
        if path not in known or (known[path].shape, known[path].dtype) != (leaf.shape, leaf.dtype)
    ]

    def pick(path: tuple[Any, ...], fresh: jax.Array) -> jax.Array:
        name = path_of(path)
        group, _, last = name.rpartition("/")
        anew = name in begun or (last == "count" and any(other.startswith(f"{group}/") for other in begun))
        return fresh if anew else known[name]

    return jax.tree_util.tree_map_with_path(pick, new)
