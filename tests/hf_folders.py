"""Small folders of Hugging Face models, for the tests of their import."""

import json

import safetensors.numpy
from test_huggingface import QWEN

from qatmoe import import_hf

INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"
TINY = QWEN | dict(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=4,
    num_experts=2, num_experts_per_tok=1, moe_intermediate_size=4, vocab_size=300, norm_topk_prob=True,
)  # fmt: skip


def load(folder):
    """{name: array} of a folder of one file, with ml_dtypes' bfloat16."""
    return safetensors.numpy.load_file(folder / ONE)


def store(folder, arrays):
    safetensors.numpy.save_file(arrays, folder / ONE, {"format": "pt"})


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def configure(folder, **changes):
    """Changes keys of config.json; ... removes one."""
    config = config_of(folder) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def refused(capsys, source, out, *more):
    """Exit code 2, one line on stderr, which is returned, and nothing at or beside `out`."""
    capsys.readouterr()
    before = {p.name for p in out.parent.iterdir()}
    assert import_hf.main([str(source), f"--out={out}", *more]) == 2
    said, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert said == "" and line.startswith("error: ") and len(line) < 2000
    assert {p.name for p in out.parent.iterdir()} == before
    return line
