import contextlib
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qatmoe.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from qatmoe.errors import UserError
from qatmoe.mesh import AXES, RULES, constrain, fitted, kept, local_mesh, make_mesh, spec
from qatmoe.run import check_mesh


class FakeDevice:
    """A device by name only: meshes of any size need no hardware."""

    def __init__(self, i):
        self.id, self.process_index, self.platform, self.device_kind = i, 0, "cpu", "fake"


def test_all_four_axes_always_exist():
    assert dict(make_mesh(MeshConfig()).shape) == dict.fromkeys(AXES, 1) | {"data": jax.device_count()}


@pytest.mark.parametrize(
    ("cfg", "sizes"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(expert=4), (2, 1, 4, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 1, 2)),
        (MeshConfig(data=2, fsdp=2, expert=2), (2, 2, 2, 1)),
    ],
)
def test_free_axis_takes_what_is_left(cfg, sizes):
    mesh = make_mesh(cfg, [FakeDevice(i) for i in range(8)])
    assert tuple(mesh.shape[a] for a in AXES) == sizes


@pytest.mark.parametrize(
    "cfg", [MeshConfig(expert=3), MeshConfig(data=4), MeshConfig(fsdp=-1), MeshConfig(tensor=0), MeshConfig(data=16)]
)
def test_impossible_meshes_are_refused(cfg):
    with pytest.raises(UserError, match="mesh="):
        make_mesh(cfg, [FakeDevice(i) for i in range(8)])


@pytest.mark.parametrize(
    ("chunk", "accum", "message"),
    [
        (100, 1, "loss_chunk=100 must divide the 512 tokens of a micro-batch"),
        (160, 4, ""),
        (48, 4, "loss_chunk=48 must divide the 128 tokens of a micro-batch"),
        (128, 4, ""),
        (600, 4, ""),
    ],
)
def test_chunks_of_the_loss_divide_what_is_on_the_devices_at_once(chunk, accum, message):
    train = TrainConfig(batch_size=8, grad_accum=accum, loss_chunk=chunk)
    cfg = Config(data=DataConfig(seq_len=64), train=train)
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_mesh(cfg, mesh)


@pytest.mark.parametrize(
    ("model", "seq_len", "fits"),
    [({}, 64, True), ({"head_dim": 256}, 64, False), ({"head_dim": 20}, 64, False), ({}, 63, False)]
    + [({"dtype": "float32"}, 64, False)],
)
def test_cudnns_attention_is_refused_where_it_has_no_kernel(model, seq_len, fits):
    model = ModelConfig(**{"head_dim": 64, "dtype": "bfloat16", "attention": "cudnn"} | model)
    cfg = Config(model=model, data=DataConfig(seq_len=seq_len))
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    gpu = types.SimpleNamespace(shape=mesh.shape, devices=np.array([types.SimpleNamespace(platform="gpu")]))
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="attention='cudnn' needs a GPU"):
        check_mesh(cfg, gpu)
    with pytest.raises(UserError, match="and here are cpu"):
        check_mesh(cfg, mesh)


def test_two_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="same mesh axis"):
        spec(("batch", "experts"))
    with pytest.raises(ValueError, match="unknown logical axis"):
        spec(("btach",))
    assert {a for axes in RULES.values() for a in axes} == set(AXES)


def test_axis_that_does_not_divide_is_copied():
    mesh = make_mesh(MeshConfig(data=1, tensor=8), [FakeDevice(i) for i in range(8)])
    assert fitted(mesh, spec(("heads", None)), (16, 3))[0] == "tensor"
    assert fitted(mesh, spec(("heads", None)), (12, 3))[0] is None


def test_parameters_are_kept_split_along_fsdp_and_what_their_own_axes_leave():
    assert kept(("heads", None), 0) == PartitionSpec(("tensor", "fsdp", "expert"), None)
    assert kept(("experts", None, "mlp"), 1) == PartitionSpec("expert", "fsdp", "tensor")
    assert kept(("experts", "mlp", None), 1) == PartitionSpec("expert", ("tensor", "fsdp"), None)
    assert kept(("layers", None), None) == PartitionSpec(None, None)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=2), [FakeDevice(i) for i in range(8)])
    parts = kept(("heads", None), 0)
    assert fitted(mesh, parts, (16, 3))[0] == ("tensor", "fsdp", "expert")
    assert fitted(mesh, parts, (12, 3))[0] == ("tensor", "fsdp")  # what does not divide is left out, the last first


def test_a_command_of_one_process_splits_batches_and_parameters_alike(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [FakeDevice(i) for i in range(8)])
    assert dict(local_mesh().shape) == dict.fromkeys(AXES, 1) | {"fsdp": 8}


def test_a_command_of_one_process_refuses_to_be_several(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="is one process and here are 4: start it on one machine"):
        local_mesh()


def test_constrain_without_a_mesh_is_the_identity():
    x = np.ones((2, 3))
    assert constrain(x, ("batch", None)) is x
