"""Run by test_devices.py: the audit's forward pass compiled for four TPU chips; prints {layers: bytes} as JSON.

Bytes are what a chip needs to work in, beside the weights it keeps, the windows and what comes of them.
"""

import json

from qatmoe import topology

CHIPS = topology.parse("v5p:2x2x1")
topology.prepare(CHIPS)  # before jax is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402

from qatmoe import fidelity  # noqa: E402
from qatmoe.config import MeshConfig, ModelConfig  # noqa: E402
from qatmoe.mesh import batch_groups, fitted, make_mesh, spec  # noqa: E402
from qatmoe.model import transformer  # noqa: E402

B, L = 4, 256


def work(layers: int) -> int:
    """Bytes of a model of so many layers, each with 38 million weights, that all are gathered in bfloat16."""
    cfg = ModelConfig(
        vocab_size=512, dim=1024, n_layers=layers, n_dense_layers=0, n_heads=2, n_kv_heads=1, head_dim=128,
        n_experts=24, top_k=2, expert_dim=512, n_shared_experts=0, n_mtp=0, scan_layers=False, dtype="bfloat16",
        attention="splash",
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), topology.devices(CHIPS))

    def kept(shape: jax.ShapeDtypeStruct, parts: jax.sharding.PartitionSpec) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, fitted(mesh, parts, shape.shape))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

    params = jax.tree.map(kept, transformer.abstract_params(cfg), transformer.kept_specs(cfg))
    batch = {"tokens": kept(jax.ShapeDtypeStruct((B, L + 1), jnp.int32), spec(("batch", None)))}
    with jax.set_mesh(mesh):
        compiled = fidelity.run_model.lower(params, batch, cfg=cfg, groups=batch_groups(mesh)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    print(json.dumps({layers: work(layers) for layers in (1, 5)}))
