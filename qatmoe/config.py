"""Configuration: an ml_collections ConfigDict at the door, frozen dataclasses inside.

A file under `configs/` returns a ConfigDict from `get_config()`; `resolve` turns it into `Config` and
raises `UserError` on an unknown key, a wrong type or an impossible value. Nothing past `resolve` sees a
ConfigDict. Every field has its default and its meaning here and nowhere else.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from qatmoe.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture. The defaults are a small GLM-4.5-shaped MoE."""

    vocab_size: int = 2048
    dim: int = 128  # D, residual width
    n_layers: int = 4  # N, decoder layers in all, MTP modules not counted
    n_dense_layers: int = 1  # leading layers with a dense FFN
    dense_dim: int = 384  # FFN width of the dense layers
    n_heads: int = 4  # H
    n_kv_heads: int = 2  # K
    head_dim: int = 32
    qk_norm: str = (
        "head"  # RMSNorm on q and k: "head" (per head: Qwen3-MoE, GLM-4.5), "full" (all heads: OLMoE) or "none"
    )
    qkv_bias: bool = False  # biases on q, k and v (GLM-4.5)
    rotary_fraction: float = 0.5  # share of head_dim that RoPE turns
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    n_experts: int = 8  # E
    top_k: int = 2  # experts per token
    expert_dim: int = 128  # F, width of one routed expert
    n_shared_experts: int = 1  # always-on experts, fused into one FFN of width n_shared_experts * expert_dim
    router: str = "sigmoid"  # "softmax" (Qwen3-MoE, OLMoE) or "sigmoid" (DeepSeek-V3, GLM-4.5)
    router_bias: bool = True  # selection bias, moved by the balance update and not by gradients
    norm_topk: bool = True  # chosen weights are renormalised to sum 1
    routed_scale: float = 1.0  # factor on the routed sum (DeepSeek-V3: 2.5)
    swiglu_limit: float = 0.0  # > 0: gate <= limit, |up| <= limit before the product (gpt-oss, DeepSeek-V4)
    n_mtp: int = 1  # multi-token-prediction modules; the first predicts token t+2, the next t+3, ...
    tie_embeddings: bool = False
    init_std: float = 0.02
    dtype: str = "float32"  # compute dtype of activations and matmul operands
    experts: str = "dense"  # training: "dense" (capacity), "blocked", "ragged" or "reference" (dropless)
    eval_experts: str = "auto"  # evaluation, always dropless: "ragged" on TPU, "blocked" elsewhere
    capacity_factor: float = 2.0  # "dense": slots per expert = factor * tokens * top_k / n_experts
    expert_block: int = 64  # "blocked": rows per block
    attention: str = "auto"  # "xla", "cudnn" (GPU), "splash" (TPU), or "auto": the machine's own, where it can
    scan_layers: bool = True  # lax.scan over stacked layers, or the unrolled twin
    # What of a layer the backward pass computes again: "none"; "dots": all but products with weights (experts' too, and
    # not attention's scores, which grow with L^2); "full": all of it.
    remat: str = "none"

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that RoPE turns."""
        return round(self.head_dim * self.rotary_fraction)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Which grid each family of weights is trained on. "none" leaves it in full precision.

    The router and the norms are never quantized.
    """

    experts: str = "q2_0"  # routed experts
    gate_up: str = "same"  # their gate and up projections; "same" follows `experts`
    down: str = "same"  # their down projection; "same" follows `experts`
    shared: str = "none"  # shared experts and the FFN of the dense layers
    attention: str = "none"
    embedding: str = "none"
    head: str = "none"
    mtp: str = "none"  # the MTP modules' routed experts, "same" as the trunk's; with "none" nothing there is quantized
    scale: str = "learned"  # "learned" (LSQ) or "dynamic" (recomputed from the weight every step)
    clip_gradient: bool = False  # LSQ's rule: a weight beyond the last level gets no gradient; off: all do
    dynamic_rule: str = "search"  # scale rule of "dynamic": "absmax" or "search" (least squared error)
    signed: bool = True  # scales may be negative where the format has a sign for them, which turns its levels around


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut into sequences."""

    source: str = "default"  # "default" (bundled), a file, directory or glob, "hf:DATASET[:CONFIG[:SPLIT]]"
    valid: str = ""  # like source; "" = the bundled held-out text, or a split of the source by document
    valid_fraction: float = 0.05  # share of documents held out when there is no `valid`
    text_key: str = "text"  # field of .jsonl and .parquet rows that holds the text
    tokenizer: str = "default"  # "default" (bundled), "train" (a byte-level BPE on the source) or a tokenizer.json
    seq_len: int = 256  # L
    packing: str = "windows"  # "windows" (plain cuts of the token stream) or "segments" (no attention across documents)
    cache_dir: str = ""  # "" = $XDG_CACHE_HOME/qatmoe or ~/.cache/qatmoe
    prefetch: int = 2  # batches prepared ahead


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = "adamw"  # "adamw", or "muon": weight matrices by Muon, the rest by AdamW
    lr: float = 2e-3
    # Rate of learned scales (absolute: a scale is about the size of a weight); a phase's `lr` moves it in proportion.
    scale_lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices, embeddings, head and router; not on norms, biases or scales
    clip: float = 1.0  # global gradient norm; 0 = off
    schedule: str = "wsd"  # "wsd" (warmup, stable, linear decay) or "cosine"
    final_lr: float = 0.0  # lr after the last step of a decay, as a share of lr
    moments_dtype: str = "float32"  # first moments; "bfloat16" saves memory
    ema: float = 0.0  # decay of an average of the weights, used for evaluation; less in a phase's first steps; 0 = off


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; all four axes always exist. -1 (one at most) takes what is left."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """One stretch of training. `start` names the phase it branches from; "" starts from random weights."""

    steps: int = 0
    start: str = ""
    quantize: bool = False
    warmup: int = 0  # steps of linear warmup
    decay: int = 0  # "wsd": final steps over which the rate falls linearly, from its full height in the first of them
    lr: float = 0.0  # 0 = optim.lr
    distill: float = 0.0  # weight of KL(teacher || this) in the loss; the rest is cross-entropy
    teacher: str = ""  # what distill learns from: a phase, or RUN:PHASE (":PHASE": of init_from's run); "" = start
    reset_moments: bool = False  # drop the start phase's optimizer moments
    # What keeps its value in this phase: a regular expression, found in a parameter's name: "router", "^(embed|head)$",
    # "^layers.*/experts" (weights, not their scales). Names are as the plan prints them; where layers are not scanned,
    # "layers/N/...". Learned scales are "scales/" and the name of their weights.
    freeze: str = ""
    save_at: tuple[int, ...] = ()  # steps that are saved besides, and stay: other runs branch off there

    @property
    def own_teacher(self) -> str:
        """The phase of the same run that `distill` learns from; "" where it is another run's."""
        return "" if ":" in self.teacher else self.teacher or self.start


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run: its phases, losses, logging and checkpoints."""

    phases: dict[str, PhaseConfig] = dataclasses.field(default_factory=dict)
    seed: int = 0
    batch_size: int = 8  # B, sequences per optimizer step over all devices
    grad_accum: int = 1  # micro-batches per step
    mtp_weight: float = 0.3
    balance_weight: float = 1e-3  # load-balance loss
    bias_rate: float = 1e-3  # step of the router's selection bias per optimizer step
    z_weight: float = 1e-4  # router z-loss
    loss_chunk: int = 0  # tokens per chunk of the cross-entropy; 0 = all at once
    log_every: int = 10
    checkpoint_every: int = 200
    keep: int = 2  # newest checkpoints kept per phase; a phase's last is always kept, and so are those of its save_at
    tensorboard: bool = True
    profile_step: int = 0  # step of each phase from which on the profiler traces; 0 = off
    profile_steps: int = 3  # steps that it traces

    @property
    def micro_batch(self) -> int:
        """Sequences that are on the devices at once, in training and in validation."""
        return self.batch_size // self.grad_accum


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Validation."""

    every: int = 100  # steps between validations; 0 = only at the end of a phase
    batches: int = 16  # batches per validation while training; 0 = the whole validation set
    final_batches: int = 0  # batches at the end of a phase; 0 = the whole validation set


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    name: str = "run"
    init_from: str = ""  # RUN[:PHASE][@STEP]: take the trunk from that run's checkpoint instead of training it
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


# --- from a ConfigDict to a Config -----------------------------------------------------------------------------------

RESERVED = ("ptq", "total", "hparams", "run")  # what reports and TensorBoard's folders call something else; so ptq_*
CHOICES = {
    "model.router": ("softmax", "sigmoid"),
    "model.qk_norm": ("head", "full", "none"),
    "model.dtype": ("float32", "bfloat16"),
    "model.experts": ("dense", "blocked", "ragged", "reference"),
    "model.eval_experts": ("auto", "blocked", "ragged", "reference"),
    "model.attention": ("auto", "xla", "cudnn", "splash"),
    "model.remat": ("none", "dots", "full"),
    "quant.scale": ("learned", "dynamic"),
    "quant.dynamic_rule": ("absmax", "search"),
    "data.packing": ("windows", "segments"),
    "optim.name": ("adamw", "muon"),
    "optim.schedule": ("wsd", "cosine"),
    "optim.moments_dtype": ("float32", "bfloat16"),
}


_INF = float("inf")
_TINY = 1e-300  # more than 0
_F32 = 3.4e38  # more is inf in float32
_SIZES = ("vocab_size", "dim", "n_layers", "dense_dim", "n_heads", "n_kv_heads", "head_dim", "n_experts", "top_k")
_WEIGHTS = ("mtp_weight", "balance_weight", "bias_rate", "z_weight")
RANGES: dict[str, tuple[float, float]] = {
    **{f"model.{name}": (1, _INF) for name in (*_SIZES, "expert_dim", "expert_block")},
    **{f"model.{name}": (0, _INF) for name in ("n_dense_layers", "n_shared_experts", "n_mtp", "swiglu_limit")},
    **{f"model.{name}": (_TINY, _INF) for name in ("norm_eps", "init_std", "rope_theta", "capacity_factor")},
    "data.seq_len": (1, _INF),
    "data.prefetch": (0, _INF),
    "data.valid_fraction": (_TINY, 0.9),
    "model.rotary_fraction": (_TINY, 1),
    "model.routed_scale": (0, _F32),
    **{f"optim.{name}": (_TINY, _F32) for name in ("lr", "scale_lr")},
    "optim.eps": (1.2e-38, _INF),  # in float32 less is 0
    **{f"optim.{name}": (0, _INF) for name in ("weight_decay", "clip")},
    "optim.final_lr": (0, 1),
    "optim.ema": (0, 0.999999),  # 1 would keep the phase's first weights
    **{f"train.{name}": (1, _INF) for name in ("batch_size", "grad_accum", "log_every", "checkpoint_every", "keep")},
    "train.profile_steps": (1, _INF),
    "train.seed": (0, 2**32 - 1),  # of which jax.random.key makes different keys
    **{f"train.{name}": (0, _INF) for name in ("loss_chunk", "profile_step", *_WEIGHTS)},
    **{f"eval.{name}": (0, _INF) for name in ("every", "batches", "final_batches")},
}


def _range(low: float, high: float) -> str:
    if low == _TINY and high < _INF:
        return f"more than 0 and at most {high:g}"
    if high < _INF:
        return f"from {low:.10g} to {high:.10g}"
    return "more than 0" if low == _TINY else f"at least {low:g}"


def default_config() -> ml_collections.ConfigDict:
    """Every key with its default: what a file under `configs/` starts from."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def phase(**fields: Any) -> ml_collections.ConfigDict:
    """One phase for `config.train.phases`, e.g. `phase(steps=600, warmup=50)`."""
    return ml_collections.ConfigDict(dataclasses.asdict(PhaseConfig(**fields)))


def resolve(raw: Mapping[str, Any]) -> Config:
    """Turns a ConfigDict (or nested dict) into a checked `Config`.

    Raises:
      UserError: an unknown key, a value of the wrong type, or values that contradict each other.
    """
    cfg = _build(Config, raw, "config")
    phases = _in_order(cfg.train.phases)
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, phases=phases))
    for path, allowed in CHOICES.items():
        value = cfg
        for part in path.split("."):
            value = getattr(value, part)
        if value not in allowed:
            raise UserError(f"config.{path}={value!r}: must be one of {', '.join(map(repr, allowed))}")
    for path, (low, high) in RANGES.items():
        group, name = path.split(".")
        value = getattr(getattr(cfg, group), name)
        if not (low <= value <= high and math.isfinite(value)):
            finite = "" if math.isfinite(value) else " and finite"
            raise UserError(f"config.{path}={value}: must be {_range(low, high)}{finite}")
    _check_model(cfg.model)
    _check_training(cfg)
    return cfg


def to_json(cfg: Config) -> str:
    """The whole configuration as JSON; `resolve(json.loads(...))` gives the same `Config` back."""
    return json.dumps(dataclasses.asdict(cfg), indent=1)


def other_settings(here: ModelConfig, there: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """{setting: (here, there)} of the settings by which two models compute something else.

    Those that only say how it is computed, or how weights are drawn, are left out.
    """
    free = {
        "experts",
        "eval_experts",
        "capacity_factor",
        "expert_block",
        "attention",
        "scan_layers",
        "remat",
        "init_std",
    }
    a, b = dataclasses.asdict(here), dataclasses.asdict(there)
    return {name: (a[name], b[name]) for name in a if name not in free and a[name] != b[name]}


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested groups, e.g. of a configuration read from JSON."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for name in tree for k, v in leaves(tree[name], f"{prefix}.{name}" if prefix else name).items()}


def default(key: str) -> Any:
    """The default of a dotted key, as JSON has it; None where there is none."""
    group, phases, rest = key.partition("train.phases.")
    if phases and not group:
        return _defaults_of_a_phase().get(rest.partition(".")[2])
    return _defaults().get(key)


def _float(value: Any, path: str) -> float:
    try:
        return float(value)
    except OverflowError as e:
        raise UserError(f"{path}: a number of {value.bit_length()} bits is more than any float") from e


@functools.cache
def _defaults() -> dict[str, Any]:
    return leaves(json.loads(json.dumps(dataclasses.asdict(Config()))))


@functools.cache
def _defaults_of_a_phase() -> dict[str, Any]:
    return leaves(json.loads(json.dumps(dataclasses.asdict(PhaseConfig()))))


def check_key(path: str) -> None:
    """Raises UserError where a dotted path, such as "quant.experts", names no key. Phases may have any name."""
    hint: Any = Config
    parts = path.split(".")
    for i, part in enumerate(parts):
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        elif dataclasses.is_dataclass(hint):
            hints = typing.get_type_hints(hint)
            if part not in hints:
                raise UserError(_no_such_key(".".join(["config", *parts[:i]]), part, hints))
            hint = hints[part]
        else:
            raise UserError(f"config.{path}: no such key; config.{'.'.join(parts[:i])} is a value")


def _no_such_key(path: str, key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {path}.{close[0]}?" if close else f"known keys: {', '.join(known)}"
    return f"{path}.{key}: no such key; {hint}"


def _build(cls: type, raw: Mapping[str, Any], path: str) -> Any:
    if not isinstance(raw, Mapping | ml_collections.ConfigDict):
        raise UserError(
            f"{path}={raw!r}: expected a group of keys ({', '.join(f.name for f in dataclasses.fields(cls))})"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key in raw:
        if key not in fields:
            raise UserError(_no_such_key(path, key, fields))
        values[key] = _convert(hints[key], raw[key], f"{path}.{key}")
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    origin = typing.get_origin(hint)
    if origin is dict:
        item = typing.get_args(hint)[1]
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise UserError(f"{path}={value!r}: expected named groups of keys")
        if nameless := [name for name in value if not isinstance(name, str)]:
            raise UserError(f"{path}: {nameless[0]!r} is no name; give a string")
        return {name: _convert(item, value[name], f"{path}.{name}") for name in value}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}={value!r}: expected numbers in parentheses: (1, 2), or (1,) for a single one")
        return tuple(_convert(typing.get_args(hint)[0], v, path) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return _float(value, path)
    if isinstance(hint, types.UnionType) or type(value) is not hint:
        raise UserError(f"{path}={value!r}: expected {getattr(hint, '__name__', hint)}, got {type(value).__name__}")
    return value


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _check_model(m: ModelConfig) -> None:
    _require(
        m.n_heads % m.n_kv_heads == 0,
        f"config.model.n_kv_heads={m.n_kv_heads} must divide n_heads={m.n_heads}: each k/v head serves a whole group",
    )
    _require(m.top_k <= m.n_experts, f"config.model.top_k={m.top_k} is more than n_experts={m.n_experts}")
    _require(
        m.n_dense_layers < m.n_layers,
        f"config.model.n_dense_layers={m.n_dense_layers} leaves no MoE layer of n_layers={m.n_layers}",
    )
    rotary = m.head_dim * m.rotary_fraction
    near = math.isclose(rotary, m.rotary_dim, rel_tol=1e-9)  # 0.55 * 40 is 22.000000000000004
    _require(
        near and m.rotary_dim % 2 == 0,
        f"config.model.rotary_fraction={m.rotary_fraction} of head_dim={m.head_dim} gives {rotary:g} rotated dims; "
        "it must be an even number",
    )


def _check_training(cfg: Config) -> None:
    t = cfg.train
    _require(
        t.batch_size % t.grad_accum == 0,
        f"config.train.grad_accum={t.grad_accum} must divide batch_size={t.batch_size}",
    )
    _require(
        len(cfg.optim.betas) == 2 and all(0 <= b < 1 for b in cfg.optim.betas),
        f"config.optim.betas={cfg.optim.betas}: expected two numbers from 0 to below 1",
    )
    _require(bool(t.phases), "config.train.phases is empty: name at least one, e.g. phases.trunk = phase(steps=100)")
    for name, p in t.phases.items():
        where = f"config.train.phases.{name}"
        _require(name.isidentifier(), f"{where}: a phase name is letters, digits and '_'")
        _require(
            name not in RESERVED and not name.startswith("ptq_"),
            f"{where}: {name!r} is a name that reports use themselves ({', '.join(RESERVED)}, ptq_...); choose another",
        )
        _require(p.steps >= 1, f"{where}.steps={p.steps}: must be at least 1")
        _require(
            min(p.warmup, p.decay) >= 0 and p.warmup + p.decay <= p.steps,
            f"{where}: warmup={p.warmup} + decay={p.decay} must fit in steps={p.steps}",
        )
        _require(0 <= p.lr <= _F32, f"{where}.lr={p.lr}: must be {_range(_TINY, _F32)}, or 0, which takes optim.lr")
        _require(
            not p.decay or cfg.optim.schedule == "wsd",
            f"{where}.decay={p.decay} belongs to optim.schedule='wsd'; cosine falls over the whole phase: set it to 0",
        )
        last = t.profile_step + t.profile_steps - 1
        imported = bool(cfg.init_from) and name == next(iter(t.phases))  # it has no step to trace or to save
        beyond = [step for step in p.save_at if not (imported or 1 <= step <= p.steps)]
        _require(
            not beyond,
            f"{where}.save_at={p.save_at}: step {next(iter(beyond), '')} is not among 1 to {where}.steps={p.steps}",
        )
        _require(
            not t.profile_step or imported or last <= p.steps,
            f"config.train.profile_step={t.profile_step}: its {t.profile_steps} profile_steps end at step {last}, and "
            f"{where} has steps={p.steps}",
        )
        _require(
            _is_pattern(p.freeze),
            f"{where}.freeze={p.freeze!r} is not a regular expression, as 'router' or '^(embed|head)$' are",
        )
        _require(
            not (p.freeze and imported),
            f"{where}.freeze={p.freeze!r}: {name} is the first phase, which config.init_from replaces: it is not "
            "trained; let a phase that starts from it freeze",
        )
        held = t.phases[p.start].freeze if p.start in t.phases else ""
        _require(
            not held or held == p.freeze or p.reset_moments,
            f"{where}.start={p.start!r}: moments of what {p.start} freezes have faded, and Adam's count of steps has "
            f"not; set {where}.reset_moments=True, or the same freeze={held!r}",
        )
        _require(0 <= p.distill <= 1, f"{where}.distill={p.distill}: must be between 0 and 1")
        _require(
            not (p.distill and imported),
            f"{where}.distill={p.distill}: {name} is the first phase, which config.init_from replaces: it is not "
            "trained; let a phase that starts from it learn",
        )
        _require(
            not p.distill or bool(p.start or p.teacher),
            f"{where}.distill={p.distill} needs a teacher: set {where}.start or {where}.teacher",
        )
        _require(
            not p.teacher or p.distill > 0,
            f"{where}.teacher={p.teacher!r} is not learned from with distill=0.0: set {where}.distill, or leave it out",
        )
        _require(
            not p.teacher.startswith(":") or bool(cfg.init_from),
            f"{where}.teacher={p.teacher!r} is a phase of the run that config.init_from names, which is empty: "
            f"set it, or name the run: RUN{p.teacher}",
        )


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _waits_for(phase: PhaseConfig) -> dict[str, str]:
    """The phases of the same run that must be finished before this one, by the key that names them."""
    found = {"start": phase.start, "teacher": phase.own_teacher}
    return {key: name for key, name in found.items() if name}


def _in_order(phases: dict[str, PhaseConfig]) -> dict[str, PhaseConfig]:
    """Phases so that each comes after those it starts and learns from (a ConfigDict sorts its keys by name)."""
    done: dict[str, PhaseConfig] = {}
    while len(done) < len(phases):
        ready = [n for n, p in phases.items() if n not in done and all(f in done for f in _waits_for(p).values())]
        if not ready:
            waits = [(n, key, f) for n, p in phases.items() for key, f in _waits_for(p).items() if f not in done]
            name, key, other = min(waits, key=lambda w: w[2] in phases)  # a name that nothing has is the mistake
            more = ", or RUN:PHASE," if key == "teacher" else ""
            raise UserError(
                f"config.train.phases.{name}.{key}={other!r}: must be ''{more} or another phase that does not "
                f"itself wait for {name} (phases: {', '.join(phases)})"
            )
        done |= {n: phases[n] for n in ready}
    return done
