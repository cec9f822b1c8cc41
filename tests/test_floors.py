"""A module imports only from floors below its own."""

import ast
from pathlib import Path

import pytest

import qatmoe

FLOORS: list[set[str]] = [
    {"errors", "tree", "text_table", "hlo"},
    {"files", "topology", "distributed"},
    {"roofline"},
    {"config"},
    {"mesh", "cli"},
    {"quant.grid"},
    {"quant.pack", "quant.plan"},
    {"quant.fake"},
    {"data.corpus", "data.cache"},
    {"data.tokenizer", "data.cloze"},
    {"data.batches"},
    {"data.domains"},
    {"model.layers", "model.cache"},
    {"model.attention", "model.router", "model.moe"},
    {"model.mtp"},
    {"model.transformer"},
    {"decode"},
    {"loss", "optim"},
    {"step", "fidelity"},
    {"checkpoint", "metrics", "workdir"},
    {"convert.names", "convert.hf_config", "convert.upcycle"},
    {"convert.safetensors", "convert.gguf", "convert.compressed"},
    {"convert.vocab", "convert.llama", "convert.llama_numerics"},
    {"requantize", "gptq"},
    {"report", "audit_report", "run"},
    {"initial"},
    {"phases", "parts", "convert.weights"},
    {"convert.gguf_model", "convert.huggingface_model", "convert.hf_import"},
    {"convert.verify", "shapes", "harness", "audit"},
    {"benchmark"},
    {"aot"},
    {"fit"},
    {"train", "export", "import_hf", "generate", "plan", "tasks", "evaluate"},
]
ROOT = Path(qatmoe.__file__).parent
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.rglob("*.py") if p.name != "__init__.py"
}


def imports(path: Path) -> set[str]:
    """Names of the project's modules that the file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qatmoe":
            base = ".".join(node.module.split(".")[1:])
            names = [f"{base}.{a.name}".strip(".") for a in node.names]
            found |= {n if n in MODULES else base for n in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("qatmoe.") for a in node.names if a.name.startswith("qatmoe.")}
    return found & set(MODULES)


def test_every_module_has_a_floor():
    assert set(MODULES) == set().union(*FLOORS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    floor = next(i for i, names in enumerate(FLOORS) if module in names)
    below = set().union(*FLOORS[:floor])
    assert imports(MODULES[module]) <= below


def test_nothing_in_the_package_needs_the_checkouts_other_folders():
    """`launch` and `experiments` stand on the package; they are not installed with it."""
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"launch", "experiments", "configs"}, path
