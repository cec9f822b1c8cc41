"""A Hugging Face folder as a run whose trunk QAT branches from.

Weights keep their type and are stored in the unrolled layout, layer by layer, so that the model is never in memory as
a whole: at most one parameter of one layer (of a dense model that becomes a MoE, with all its copies), and what orbax
holds while it writes a part.
"""

import dataclasses
import itertools
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qatmoe.checkpoint import Checkpoints
from qatmoe.config import Config, DataConfig, ModelConfig, PhaseConfig, QuantConfig, TrainConfig, resolve, to_json
from qatmoe.convert import hf_config, names, upcycle
from qatmoe.convert.names import Part
from qatmoe.convert.safetensors import MAX_JSON, Folder, open_regular
from qatmoe.convert.upcycle import Upcycling
from qatmoe.convert.weights import ORIGIN, Origin
from qatmoe.data import tokenizer
from qatmoe.errors import UserError
from qatmoe.files import atomic_folder, check_apart, write_atomically
from qatmoe.workdir import check_path

TRUNK = "trunk"
_PART_BYTES = 1 << 28  # weights per part of the checkpoint
_TYPES = ("F32", "F16", "BF16")
_UNUSED = ("rotary_emb.inv_freq",)
_DROP = "; --drop_mtp imports the model without its MTP modules"

_QAT = '''"""Late-stage QAT of an imported model. Edit it, then give it to qatmoe.train as --config.

Name it in the same way each time, from the repository's root: the folder that it lies in is among its runs' settings.

The trunk is the imported model; the branches train on `data.source`, which has no default here. Each step trains on
train.batch_size sequences of data.seq_len tokens, and the devices share the weights (mesh.fsdp); batch_size must be
a multiple of their number.
"""

from pathlib import Path

from qatmoe.config import default_config, phase

HERE = Path(__file__).parent  # as --config names it, so that a run has the same settings where runs lie elsewhere
MODEL = {model}


def get_config():
    config = default_config()
    config.name = {name!r}
    config.init_from = str(HERE)
    config.model.update(MODEL)
    config.data.source = ""  # your text: a file, folder, glob, "hf:DATASET"; "default" is six novels
    config.data.tokenizer = str(HERE / "tokenizer.json")
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.quant.experts = "{grid}"
    config.quant.shared = "{shared}"  # of shared experts and dense FFNs
    config.optim.lr = 1e-5
    config.optim.scale_lr = 1e-6
    config.train.bias_rate = {bias}
{experts}    config.train.phases.trunk = phase(steps=1)
    config.train.phases.control = phase(start="trunk", steps=1000, warmup=50, decay=500)
    config.train.phases.qat = phase(start="trunk", steps=1000, warmup=50, decay=500, quantize=True)
    return config
'''


def import_folder(
    source: Path, out: Path, *, drop_mtp: bool = False, upcycling: Upcycling | None = None, force: bool = False
) -> ModelConfig:
    """Writes the run folder `out` from the model in `source`.

    Args:
      drop_mtp: leave its MTP modules out.
      upcycling: how a dense model becomes a MoE.

    Raises:
      UserError: something in `source` is unusable or is not what config.json describes, or `out` cannot be written.
        Nothing is left behind.
    """
    raw = _read_json(source / "config.json")
    arch, model = hf_config.read(raw, str(source / "config.json"))
    made = _made(source, arch, model, upcycling)
    check_apart(out, source)
    check_path(out, "--out")
    _check_model(out, made, source)
    tok = _tokenizer(source, model)
    with Folder(source) as files:
        kept = dataclasses.replace(model, n_mtp=0) if drop_mtp else model
        made = made if upcycling else kept
        _check_counts(source, model, files)
        wanted = _by_parameter(kept, arch)
        _check_tensors(source, model, kept, arch, files)
        dtype = "bfloat16" if any(t.dtype == "BF16" for t in files.tensors.values()) else "float32"
        cfg = _config(out, made, dtype)
        with atomic_folder(out, force=force) as place:
            (place / "tokenizer.json").write_text(tok.json, encoding="utf-8")
            write_atomically(place / "config.json", to_json(cfg))
            write_atomically(place / ORIGIN, json.dumps(_origin(source, raw, tok)._asdict(), default=dict))
            write_atomically(place / "qat.py", _qat(out, _shape(made, dtype), made, upcycling))
            meta = {"config": json.loads(to_json(cfg)), "data": "", "tokenizer": tok.hash, "trained_tokens": 0}
            with Checkpoints(place, TRUNK) as checkpoints:
                checkpoints.save_weights(0, _parts(_arrays(source, files, wanted, made, upcycling)), meta)
    return made


def _made(source: Path, arch: str, model: ModelConfig, upcycling: Upcycling | None) -> ModelConfig:
    """The model that an import makes of what config.json describes: itself, or a MoE of a dense one."""
    dense = arch in hf_config.DENSE
    if dense and not upcycling:
        raise UserError(f"{source}/config.json: {arch} is a dense model: --copies N makes a MoE of it (--help)")
    if upcycling and not dense:
        raise UserError(f"{source}/config.json: {arch} is a MoE already: leave --copies out")
    return upcycle.moe_of(model, upcycling) if upcycling else model


def _check_model(out: Path, model: ModelConfig, source: Path) -> None:
    """The rules that every model here obeys, before anything is made by the numbers of a config.json."""
    try:
        resolve(json.loads(to_json(_config(out, model, "float32"))))
    except UserError as e:
        raise UserError(f"{source}/config.json describes a model that cannot be: {e}") from e


def _config(out: Path, model: ModelConfig, dtype: str) -> Config:
    """The folder's own config: a run of one phase, its weights in the unrolled layout."""
    return Config(
        name=out.name,
        model=dataclasses.replace(model, scan_layers=False, dtype=dtype),
        quant=QuantConfig(experts="none"),
        data=DataConfig(tokenizer=str(out.absolute() / "tokenizer.json")),
        train=TrainConfig(phases={TRUNK: PhaseConfig(steps=1)}),
    )


def _shape(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The fields of the model that differ from a default."""
    default = vars(ModelConfig())
    return {k: v for k, v in {**vars(model), "dtype": dtype}.items() if v != default[k]}


def _qat(out: Path, shape: dict[str, Any], model: ModelConfig, upcycling: Upcycling | None) -> str:
    widths = [model.dense_dim] * (model.n_dense_layers > 0) + [model.n_shared_experts * model.expert_dim]
    widths = [width for width in widths if width]
    shared = _grid(model.dim, *widths) if widths else "none"
    fields = "".join(f"    {key!r}: {value!r},\n" for key, value in shape.items()).replace("'", '"')
    bias = "0.0  # the model's router is balanced: its selection biases stay"
    experts = ""
    if upcycling:
        experts = '    config.model.experts = "blocked"  # drops no token: the router is new, and its load uneven\n'
        bias = "0.001  # the router is new: its selection biases follow the load"
    if not model.router_bias:
        bias = "0.0  # the router has no selection biases: config.train.balance_weight balances its load"
    named = {"name": f"{out.name}_qat", "model": "{\n" + fields + "}", "grid": _grid(model.dim, model.expert_dim)}
    return _QAT.format(**named, shared=shared, bias=bias, experts=experts)


def _grid(*rows: int) -> str:
    """Q2_0 where its blocks of 64 divide all rows; where those of Q4_0 do not either, training says which row."""
    return "q4_0" if any(row % 64 for row in rows) else "q2_0"


def _read(path: Path) -> bytes:
    """A file of the folder, opened as the weights are: it may be a link of the Hugging Face cache, and no other."""
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        if size > MAX_JSON:
            raise UserError(f"{path} has {size} bytes, over {MAX_JSON}; download the model again")
        return f.read(size)


def _read_json(path: Path) -> dict[str, Any]:
    content = _read(path)
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON; download the model again") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; download the model again")
    return value


def _tokenizer(source: Path, model: ModelConfig) -> tokenizer.Tokenizer:
    path = source / "tokenizer.json"
    if not os.path.lexists(path):
        raise UserError(
            f"{path} is missing: make it with transformers (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))"
        )
    try:
        content = _read(path).decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text; download the model again") from e
    found = tokenizer.parse(content, str(path))
    found.check_vocab(model.vocab_size)
    return found


Settings = Mapping[Path, dict[str, Any]]  # a file of the folder -> the object in it


def _origin(source: Path, raw: dict[str, Any], tok: tokenizer.Tokenizer) -> Origin:
    """What the folder says of the model's use: its context, what ends a turn, its chat template, its tokens' roles."""
    files = (source / "generation_config.json", source / "tokenizer_config.json")
    settings = {path: _read_json(path) for path in files if os.path.lexists(path)}
    roles = _roles(settings, tok)
    template = next((found for path, c in settings.items() if (found := _template(path, c.get("chat_template")))), "")
    if os.path.lexists(source / "chat_template.jinja"):
        template = _read(source / "chat_template.jinja").decode("utf-8", errors="replace").replace("\r\n", "\n")
    context = raw.get("max_position_embeddings")
    if isinstance(context, bool) or not isinstance(context, int) or not 0 < context < 1 << 31:
        context = 0
    ends = _ends({**settings, source / "config.json": raw}, tok) or [i for role, i in roles.items() if role == "eos"]
    return Origin(context, tuple(ends), template, roles)


def _ends(settings: Settings, tok: tokenizer.Tokenizer) -> list[int]:
    """The tokenizer's tokens among the eos_token_id, one or a list, of the first file that has it."""
    for path, config in settings.items():
        if (given := config.get("eos_token_id")) is None:
            continue
        ends = given if isinstance(given, list) else [given]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ends):
            raise UserError(f"{path}: eos_token_id={reprlib.repr(given)} is neither a token's id nor a list of such")
        return [i for i in ends if 0 <= i < tok.vocab_size]
    return []


def _roles(settings: Settings, tok: tokenizer.Tokenizer) -> dict[str, int]:
    """{eos, bos, pad, unk: id} of the tokens that tokenizer_config.json names, as text or as an object with it."""
    found = {}
    for (path, config), role in itertools.product(settings.items(), ("eos", "bos", "pad", "unk")):
        named = config.get(f"{role}_token")
        text = named.get("content") if isinstance(named, dict) else named
        if isinstance(text, str) and (i := tok.id_of(_whole(path, f"{role}_token", text))) is not None:
            found[role] = i
    return found


def _template(path: Path, given: Any) -> str:
    """A chat template; of several, [{"name", "template"}], the default one; "" where there is none."""
    if isinstance(given, list):
        given = next((t.get("template") for t in given if isinstance(t, dict) and t.get("name") == "default"), "")
    return _whole(path, "chat_template", given) if isinstance(given, str) else ""


def _whole(path: Path, key: str, text: str) -> str:
    """The text, if it is one: JSON can spell half of a surrogate pair, which no file can hold as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{path}: {key} holds half of a surrogate pair, which no UTF-8 text can; remove it") from e
    return text


# ---- is it what config.json says? ------------------------------------------------------------------------------------


def _check_counts(source: Path, model: ModelConfig, files: Folder) -> None:
    """Before names are made for every expert of every layer: could the files hold them?"""
    layers = model.n_layers + model.n_mtp
    if layers + (layers - model.n_dense_layers) * model.n_experts > len(files.tensors):
        raise UserError(
            f"{source}/config.json says {layers} layers and {model.n_experts} experts, and the files hold "
            f"{len(files.tensors)} tensors: a file or an index is missing, or the config is another model's"
        )


def _by_parameter(model: ModelConfig, arch: str) -> dict[tuple[str, int | None], dict[str, Part]]:
    """{(path, layer): {tensor name: part}}, in the order of the file's blocks."""
    groups: dict[tuple[str, int | None], dict[str, Part]] = {}
    for name, part in names.huggingface_parts(model, arch).items():
        if 0 in names.shape_of(model, part):
            continue
        groups.setdefault((part.path, part.layer), {})[name] = part
    stacks = list(names.stack_sizes(model))

    def order(key: tuple[str, int | None]) -> tuple[int, int]:
        stack = key[0].split("/")[0]
        return (stacks.index(stack) if stack in stacks else -1, key[1] or 0)

    return {key: groups[key] for key in sorted(groups, key=order)}


def _check_tensors(source: Path, model: ModelConfig, kept: ModelConfig, arch: str, files: Folder) -> None:
    """Every tensor has the shape that config.json gives it, and none is left over."""
    all_names = names.huggingface_parts(model, arch)
    for name, part in names.huggingface_parts(kept, arch).items():
        found, expected = files.tensors.get(name), names.shape_of(kept, part)
        if found is None and 0 in expected:
            continue
        if found is None:
            hint = f"a shard may be missing{_DROP}" if part.path.startswith("mtp/") else "a shard may be missing"
            raise UserError(f"{source}: no tensor {name}, which config.json's {arch} has; {hint}")
        if found.shape != expected:
            raise UserError(
                f"{source}: {name} has shape {found.shape}, and config.json says {expected}: get both from one model"
            )
        if found.dtype not in _TYPES:
            raise UserError(f"{source}: {name} is {found.dtype}: only {', '.join(_TYPES)} weights can be imported")
    for name in files.tensors:
        if name in all_names or name.endswith(_UNUSED):
            continue
        own = _copied_from(name, model, kept)
        if own == "":
            continue
        if own is None or own not in files.tensors:
            raise UserError(f"{source}: {name} is nothing that config.json's {arch} has: get both from one model")
        if files.read(name).tobytes() != files.read(own).tobytes():
            raise UserError(
                f"{source}: {name} differs from {own}, which it should repeat (the model here shares it)"
                + (_DROP if "layers" in name else "")
            )


def _copied_from(name: str, model: ModelConfig, kept: ModelConfig) -> str | None:
    """The tensor that a redundant one must equal; "" where it belongs to a module that is left out."""
    head = "model.embed_tokens.weight" if kept.tie_embeddings else "lm_head.weight"
    if name == "lm_head.weight" and kept.tie_embeddings:
        return head
    for block in range(model.n_layers, model.n_layers + model.n_mtp):
        prefix = f"model.layers.{block}."
        if name == f"{prefix}embed_tokens.weight":
            return "model.embed_tokens.weight" if kept.n_mtp else ""
        if name == f"{prefix}shared_head.head.weight":
            return head if kept.n_mtp else ""
    return None


# ---- weights ---------------------------------------------------------------------------------------------------------


def _arrays(
    source: Path,
    files: Folder,
    wanted: dict[tuple[str, int | None], dict[str, Part]],
    made: ModelConfig,
    upcycling: Upcycling | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """(path in the checkpoint, array) of every parameter, in the unrolled layout."""
    for (path, layer), tensors in wanted.items():
        array = _assemble(source, files, tensors)
        stack, _, rest = path.partition("/")
        if layer is None:
            yield f"params/model/{path}", array
        elif upcycling:
            for name, own in upcycle.layer_of(made, upcycling, layer, rest, array).items():
                yield f"params/model/layers/{layer}/{name}", own
        else:
            yield f"params/model/{stack}/{layer}/{rest}", array


def _parts(arrays: Iterator[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The same in parts of about 256 MB."""
    part: dict[str, np.ndarray] = {}
    size = 0
    for name, array in arrays:
        part[name] = array
        size += array.nbytes
        del array
        if size >= _PART_BYTES:
            yield part
            part, size = {}, 0
    if part:
        yield part


def _assemble(source: Path, files: Folder, tensors: dict[str, Part]) -> np.ndarray:
    """One parameter of one layer: its experts stacked, gate and up joined."""
    first, shape = next(iter(tensors.values())), files.tensors[next(iter(tensors))].shape
    types = {files.tensors[name].dtype for name in tensors}
    if len(types) > 1:
        raise UserError(
            f"{source}: {first.path} of layer {first.layer} mixes {', '.join(sorted(types))}: save it in one"
        )
    experts = 1 + max(part.expert or 0 for part in tensors.values())
    halves = 1 if first.half is None else 2
    rows = shape[:1] if len(shape) == 1 else (halves * shape[0], *shape[1:])
    out = np.empty((experts, *rows), files.read(next(iter(tensors))).dtype)
    for name, part in tensors.items():
        start = (part.half or 0) * shape[0]
        out[part.expert or 0, start : start + shape[0]] = files.read(name)
    if not all(np.isfinite(e).all() for e in out):
        raise UserError(f"{source}: {first.path} of layer {first.layer} holds NaN or inf; the file is broken")
    return out if first.expert is not None else out[0]
