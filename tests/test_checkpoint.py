import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qatmoe import checkpoint, files
from qatmoe.checkpoint import Checkpoints, DamagedCheckpoint
from qatmoe.errors import RunError, UserError
from qatmoe.step import TrainState


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: object
    ema: dict
    key: jax.Array


def make_state(step: int, dim: int = 8) -> State:
    """A state whose every number depends on the step."""
    key = jax.random.key(step)
    model = {"embed": jax.random.normal(key, (16, dim)), "layers": {"attn": {"q": jnp.full((2, dim, dim), step / 3)}}}
    params = {"model": model, "scales": {"layers/attn/q": jnp.full((2, dim), 0.5 + step)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(mu_dtype=jnp.bfloat16))
    return State(jnp.asarray(step, jnp.int32), params, optimizer.init(params), {}, jax.random.key_data(key))


def abstract(tree):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save_steps(workdir: Path, steps, keep: int = 5) -> None:
    with Checkpoints(workdir, "trunk", keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": step}, {"tokenizer": "abc"})


def child(code: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints at steps 1 and 2, to be copied by tests that damage it."""
    workdir = tmp_path_factory.mktemp("saved")
    save_steps(workdir, [1, 2])
    return workdir


# Save and restore.


def test_everything_comes_back(saved):
    with Checkpoints(saved, "trunk") as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest()) == ([1, 2], 2)
        state, data_state, meta = checkpoints.restore(2, abstract(make_state(0)))
    assert_same(state, make_state(2))
    assert data_state == {"position": 2}
    assert {k: meta[k] for k in ("tokenizer", "phase", "step", "done")} == {
        "tokenizer": "abc",
        "phase": "trunk",
        "step": 2,
        "done": False,
    }
    assert meta["tensors"]["params/model/layers/attn/q"] == ["float32", [2, 8, 8]]


def test_groups_can_be_restored_alone(saved):
    with Checkpoints(saved, "trunk") as checkpoints:
        state, _, _ = checkpoints.restore(1, {"params": abstract(make_state(0).params)})
    assert_same(state, {"params": make_state(1).params})


def test_a_group_that_a_state_no_longer_has_is_left_where_it_is(saved):
    """Checkpoints of before held the run's random key, which nothing read."""
    state = make_state(0)
    wanted = TrainState(state.step, state.params, state.opt_state, state.ema)
    with Checkpoints(saved, "trunk") as checkpoints:
        assert "key" in checkpoints.meta(2)["tensors"]
        found = checkpoints.restore_latest(abstract(wanted))[0]
    expected = make_state(2)
    assert_same(found, TrainState(expected.step, expected.params, expected.opt_state, expected.ema))


def test_restored_arrays_lie_on_the_given_shardings(tmp_path):
    code = """
        import sys, jax, numpy as np, jax.numpy as jnp
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from qatmoe.checkpoint import Checkpoints
        jax.config.update("jax_num_cpu_devices", 4)
        mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("data", "expert"))
        place = lambda *spec: NamedSharding(mesh, P(*spec))
        w = jax.device_put(jnp.arange(64.0).reshape(8, 8), place("expert", "data"))
        with Checkpoints(sys.argv[1], "trunk") as c:
            c.save(1, {"w": w}, {}, {})
            for spec in (("data",), (None, "expert"), ()):
                got = c.restore(1, {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=place(*spec))})[0]["w"]
                assert got.sharding.is_equivalent_to(place(*spec), 2), got.sharding
                assert (np.asarray(got) == np.arange(64.0).reshape(8, 8)).all()
        print("same")
    """
    assert child(code, tmp_path).communicate(timeout=120)[0].strip() == "same"


def test_arrays_read_without_orbax_are_those_it_restores(saved):
    with Checkpoints(saved, "trunk") as checkpoints:
        meta = checkpoints.meta(2)
        read = checkpoints.read(meta, meta["tensors"])
        wanted = {n: jax.ShapeDtypeStruct(tuple(s), jnp.dtype(d)) for n, (d, s) in meta["tensors"].items()}
        restored = checkpoints.arrays(meta, wanted)
    assert {a.dtype for a in read.values()} >= {jnp.dtype(d) for d in ("float32", "bfloat16", "int32", "uint32")}
    assert set(read) == set(restored)
    for name, array in read.items():
        assert array.dtype == restored[name].dtype and array.shape == restored[name].shape
        np.testing.assert_array_equal(np.asarray(array), np.asarray(restored[name]))


def test_a_folders_name_is_taken_as_it_is(saved, tmp_path):
    """Also where it would mean another folder in an address, which is there too."""
    shutil.copytree(saved, tmp_path / "50 x")
    for file in (tmp_path / "50 x").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    for name in ("50%20x", "a#b", "a?b|c%", "[x]*"):  # some could not be saved to, `workdir.check_path`
        shutil.copytree(saved, tmp_path / name)
        with Checkpoints(tmp_path / name, "trunk") as checkpoints:
            assert_same(checkpoints.restore(2, abstract(make_state(0)))[0], make_state(2))
            read = checkpoints.read(checkpoints.meta(2), ["params/model/embed"])["params/model/embed"]
        np.testing.assert_array_equal(np.asarray(read), np.asarray(make_state(2).params["model"]["embed"]))


def test_a_run_is_read_by_a_path_with_two_dots(saved, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(saved, tmp_path / "run")
    with Checkpoints("../run", "trunk") as checkpoints:
        read = checkpoints.read(checkpoints.meta(2), ["params/model/embed"])["params/model/embed"]
    np.testing.assert_array_equal(np.asarray(read), np.asarray(make_state(2).params["model"]["embed"]))


def test_arrays_that_were_read_outlive_their_files(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    with Checkpoints(tmp_path / "run", "trunk") as checkpoints:
        meta = checkpoints.meta(2)
        read = checkpoints.read(meta, ["params/model/embed"])["params/model/embed"]
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    np.testing.assert_array_equal(np.asarray(read), np.asarray(make_state(2).params["model"]["embed"]))


def test_weights_in_parts(tmp_path):
    """What `save_weights` writes, both ways of reading give back, and a kill inside leaves nothing."""
    rng = np.random.default_rng(0)
    arrays = {f"params/model/layers/{i}/w": rng.standard_normal((4, 8)).astype(jnp.bfloat16) for i in range(5)}
    parts = [dict(list(arrays.items())[:2]), dict(list(arrays.items())[2:3]), dict(list(arrays.items())[3:])]
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        checkpoints.save_weights(0, iter(parts), {"tokenizer": "abc"})
        meta = checkpoints.meta(0)
        assert meta["done"] and meta["parts"]["params/model/layers/2/w"] == "state-1"
        wanted = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}
        for found in (checkpoints.read(meta, arrays), checkpoints.arrays(meta, wanted)):
            for name, array in arrays.items():
                np.testing.assert_array_equal(np.asarray(found[name]), array)

        def broken():
            yield parts[0]
            raise OSError(errno.ENOSPC, "full")

        with pytest.raises(RunError, match="step 0 is intact"):
            checkpoints.save_weights(1, broken(), {})
        assert checkpoints.steps() == [0]
        assert not list(checkpoints.directory.glob(".saving*"))


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
    w = jnp.arange(3_000_000.0)
    overwrite = jax.jit(lambda a: a * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        checkpoints.save(1, {"w": w}, {}, {})
        w = overwrite(w)
        for _ in range(3):
            w = overwrite(w)
        checkpoints.wait()
        state, _, _ = checkpoints.restore(1, {"w": jax.ShapeDtypeStruct(w.shape, w.dtype)})
    np.testing.assert_array_equal(np.asarray(state["w"]), np.arange(3_000_000.0, dtype=np.float32))


def test_arrays_are_stored_once(tmp_path):
    w = jax.random.normal(jax.random.key(0), (500_000,))
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        checkpoints.save(1, {"w": w}, {}, {})
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert size < 1.05 * w.nbytes


def test_nothing_is_written_by_looking(tmp_path):
    with Checkpoints(tmp_path / "run", "trunk") as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(0))) is None
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match=r"7: no such checkpoint; steps .* there: none"):
            checkpoints.restore(7, abstract(make_state(0)))
    assert not (tmp_path / "run").exists()


# Which checkpoints stay.


def test_the_newest_and_the_final_stay(tmp_path):
    with Checkpoints(tmp_path, "trunk", keep=2) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, {"w": jnp.ones(3)}, {}, {}, final=step == 3)
        checkpoints.wait()
        assert checkpoints.steps() == [3, 5, 6]
        assert checkpoints.meta(3)["done"]
    assert sorted(os.listdir(checkpoints.directory)) == ["3", "5", "6"]


def test_steps_that_are_to_stay_stay_and_those_of_an_abandoned_continuation_do_not(tmp_path):
    with Checkpoints(tmp_path, "trunk", keep=1) as checkpoints:
        for step in (1, 2, 3, 4, 5, 3):
            checkpoints.save(step, {"w": jnp.ones(3)}, {}, {}, stays=step in (2, 4))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def test_a_save_replaces_the_steps_of_an_abandoned_continuation(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    with Checkpoints(tmp_path, "trunk", keep=5) as checkpoints:
        checkpoints.save(4, make_state(4), {}, {}, final=True)
        checkpoints.save(2, make_state(20), {"position": 20}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(2, abstract(make_state(0)))[0], make_state(20))


# What does not fit.


def test_another_architecture_is_named(saved):
    with Checkpoints(saved, "trunk") as checkpoints:
        with pytest.raises(UserError) as caught:
            checkpoints.restore(2, {"params": abstract(make_state(0, dim=4).params)})
        for part in ("params/model/embed", "(16, 8)", "(16, 4)", "3 tensors differ"):
            assert part in str(caught.value)
        with pytest.raises(UserError, match="another architecture"):  # not a reason to fall back to an older one
            checkpoints.restore_latest(abstract(make_state(0, dim=4)))


def test_missing_extra_and_retyped_tensors_are_another_architecture(saved):
    params = abstract(make_state(0).params)
    with Checkpoints(saved, "trunk") as checkpoints:
        extra = params | {"mtp": jax.ShapeDtypeStruct((2,), jnp.float32)}
        with pytest.raises(UserError, match=r"params/mtp is absent there, float32 \(2,\) here"):
            checkpoints.restore(2, {"params": extra})
        with pytest.raises(UserError, match=r"params/scales/layers/attn/q is float32 \(2, 8\) there, absent here"):
            checkpoints.restore(2, {"params": params | {"scales": {}}})
        retyped = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params)
        with pytest.raises(UserError, match=r"float32 \(16, 8\) there, bfloat16 \(16, 8\) here"):
            checkpoints.restore(2, {"params": retyped})


# Damage.


def files_of(workdir: Path, step: int) -> list[Path]:
    return sorted(p for p in (workdir / "checkpoints/trunk" / str(step)).rglob("*") if p.is_file())


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
    "emptied": lambda p: os.truncate(p, 0),
    "removed": os.unlink,
    "flipped": flip_a_bit,
}


def test_a_checkpoint_is_looked_through_once_unless_its_files_change(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    looked, digest = [], checkpoint._digest
    monkeypatch.setattr(checkpoint, "_digest", lambda file: (looked.append(file), digest(file))[1])
    wanted = abstract(make_state(0))
    for _ in range(2):  # as programs do, each with another object
        with Checkpoints(tmp_path, "trunk") as checkpoints:
            checkpoints.restore(2, wanted)
            checkpoints.meta(2)
            assert checkpoints.latest_good() == 2
    assert sorted(looked) == [f for f in files_of(tmp_path, 2) if f.name != "manifest.json"]
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        flip_a_bit(max(looked, key=lambda file: file.stat().st_size))
        with pytest.raises(DamagedCheckpoint, match="its contents changed"):
            checkpoints.restore(2, wanted)
        save_steps(tmp_path, [2])
        assert_same(checkpoints.restore(2, wanted)[0], make_state(2))


@pytest.mark.parametrize("damage", list(DAMAGES.values()), ids=list(DAMAGES))
def test_damage_to_any_file_falls_back_to_the_older_step(saved, tmp_path, caplog, damage):
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        for file in files_of(saved, 2):
            shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
            damage(tmp_path / file.relative_to(saved))
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                state, data_state, _ = checkpoints.restore_latest(abstract(make_state(0)))
            assert_same(state, make_state(1))
            assert data_state == {"position": 1}
            assert [str(checkpoints.path(2)) in r.getMessage() for r in caplog.records] == [True]
            with pytest.raises(DamagedCheckpoint, match="step 1 is complete: to go on from there, delete .*/trunk/2"):
                checkpoints.restore(2, abstract(make_state(0)))


def test_no_complete_checkpoint_left(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in (1, 2):
        os.truncate(files_of(tmp_path, step)[-1], 3)
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        assert checkpoints.latest_good() is None
        with pytest.raises(DamagedCheckpoint, match=r"all its checkpoints \(1, 2\) are damaged"):
            checkpoints.restore_latest(abstract(make_state(0)))
        with pytest.raises(DamagedCheckpoint, match="no older checkpoint"):
            checkpoints.restore(2, abstract(make_state(0)))


def test_training_goes_on_past_a_damaged_checkpoint(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    os.truncate(files_of(tmp_path, 2)[0], 3)
    save_steps(tmp_path, [2, 3], keep=2)
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        assert_same(checkpoints.restore_latest(abstract(make_state(0)))[0], make_state(3))
        assert_same(checkpoints.restore(2, abstract(make_state(0)))[0], make_state(2))


# Interruption.


@pytest.mark.parametrize("instant", ["arrays", "manifest", "rename"])
def test_kill_inside_a_save_leaves_the_previous_checkpoint(saved, tmp_path, instant):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    code = """
        import os, signal, sys
        import test_checkpoint as t
        from qatmoe import checkpoint as c
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints = c.Checkpoints(sys.argv[1], "trunk")
        if sys.argv[2] == "arrays":  # the arrays are on their way to the disk
            save = checkpoints._orbax.save
            checkpoints._orbax.save = lambda *a, **k: (save(*a, **k), die())
        elif sys.argv[2] == "manifest":
            c._digests = die
        else:
            os.rename = die
        checkpoints.save(3, t.make_state(3), {}, {}, wait=True)
    """
    process = child(code, tmp_path, instant)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    directory = tmp_path / "checkpoints/trunk"
    assert ".saving-3" in os.listdir(directory)
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        assert_same(checkpoints.restore_latest(abstract(make_state(0)))[0], make_state(2))
        checkpoints.save(3, make_state(3), {}, {}, wait=True)
        assert_same(checkpoints.restore_latest(abstract(make_state(0)))[0], make_state(3))
    assert not [n for n in os.listdir(directory) if n.startswith(".")]


# A disk that refuses.


def test_a_failed_write_is_raised_and_the_previous_checkpoint_stays(saved, tmp_path):
    """The operating system refuses files over 1 MB, in the thread that writes the arrays."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    code = """
        import os, resource, signal, sys, time
        import jax, test_checkpoint as t
        from qatmoe.errors import RunError
        from qatmoe.checkpoint import Checkpoints
        big = {"w": jax.random.normal(jax.random.key(0), (2_000_000,))}
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with Checkpoints(sys.argv[1], "trunk") as c:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
            c.save(3, big, {}, {})
            try:
                c.save(4, big, {}, {})
            except RunError as e:
                print(e)
            print(c.steps(), sorted(os.listdir(c.directory)))
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            c.save(4, t.make_state(4), {}, {}, wait=True)
            print(c.steps())
    """
    error, after, later = child(code, tmp_path).communicate(timeout=120)[0].strip().splitlines()
    assert "File too large" in error
    assert "step 2 is intact" in error
    assert after == "[1, 2] ['1', '2']"
    assert later == "[2, 4]"


def test_full_disk_while_the_manifest_is_written(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpoints(tmp_path, "trunk") as checkpoints:
        with monkeypatch.context() as m:
            m.setattr(files.os, "fsync", full)
            checkpoints.save(3, make_state(3), {}, {})
            with pytest.raises(RunError, match=r"No space left on device.*step 2 is intact"):
                checkpoints.wait()
        assert_same(checkpoints.restore_latest(abstract(make_state(0)))[0], make_state(2))
    assert sorted(os.listdir(checkpoints.directory)) == ["1", "2"]


def test_a_save_that_takes_too_long(saved, tmp_path, monkeypatch):
    """Not the 20 minutes that orbax gives it by default, in which a slow disk does not write a large state."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    make, given = checkpoint.ocp.AsyncCheckpointer, []
    monkeypatch.setattr(checkpoint.ocp, "AsyncCheckpointer", lambda *a, **k: (given.append(k), make(*a, **k))[1])
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        assert given == [{"timeout_secs": 24 * 3600}]
        wait = checkpoints._orbax.wait_until_finished

        def late():
            wait()
            if (checkpoints.directory / ".saving-3" / "state").exists():
                raise TimeoutError("Timed out after 86400 seconds.")

        monkeypatch.setattr(checkpoints._orbax, "wait_until_finished", late)
        checkpoints.save(3, make_state(3), {}, {})
        with pytest.raises(RunError, match=r"it took longer than 86,400 s.*step 2 is intact"):
            checkpoints.wait()
    assert sorted(os.listdir(checkpoints.directory)) == ["1", "2"]


def test_another_process_that_is_gone_is_not_called_a_slow_disk():
    """orbax gives both as a TimeoutError."""
    gone, late = TimeoutError("Timed out while waiting for barrier."), TimeoutError("Timed out")
    gone.__cause__ = jax.errors.JaxRuntimeError("INTERNAL: connection reset by peer")
    late.__cause__ = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: barrier")
    assert checkpoint._disk_error(gone) is None
    outer = TimeoutError("Timed out")  # orbax waits for what waited
    outer.__cause__ = gone
    assert checkpoint._disk_error(outer) is None
    assert checkpoint._disk_error(late) == checkpoint._disk_error(TimeoutError()) == "it took longer than 86,400 s"


@pytest.fixture(params=["stat", "iterdir"])
def no_answer(request, monkeypatch):
    """A file system that says nothing of a phase's folder, or not what is in it."""
    real = getattr(Path, request.param)

    def refused(path, *args, **kwargs):
        if path.name == "trunk":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, request.param, refused)


def test_a_disk_that_does_not_answer_is_not_taken_for_an_empty_one(saved, no_answer, monkeypatch):
    """Its phase would begin anew and remove its own checkpoints."""
    with Checkpoints(saved, "trunk") as checkpoints:
        with pytest.raises(UserError, match="cannot look at .*trunk: Stale file handle"):
            checkpoints.steps()
        with pytest.raises(RunError, match="No space left.* earlier ones cannot be seen now") as error:
            checkpoints._abandon(checkpoints.directory / ".saving-3", OSError(errno.ENOSPC, "full"))
        assert str(error.value).count("same command") == 1
        monkeypatch.undo()
        assert checkpoints.steps() == [1, 2]


def test_a_file_where_checkpoints_should_lie_is_said_at_once(tmp_path):
    """And not after the steps to the first of them."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "trunk").write_text("")
    with Checkpoints(tmp_path, "trunk") as checkpoints, pytest.raises(UserError, match="trunk: Not a directory"):
        checkpoints.latest()


def test_arrays_that_orbax_did_not_put_together_are_no_checkpoint(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        wait = checkpoints._orbax.wait_until_finished

        def lost():
            wait()
            for file in checkpoints.directory.glob(".saving-3/state/manifest.ocdbt"):
                file.unlink()

        monkeypatch.setattr(checkpoints._orbax, "wait_until_finished", lost)
        checkpoints.save(3, make_state(3), {}, {})
        with pytest.raises(RunError, match=r"state/manifest.ocdbt, without which there are no weights"):
            checkpoints.wait()
    assert sorted(os.listdir(checkpoints.directory)) == ["1", "2"]


def test_an_error_of_our_own_is_not_dressed_up_as_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_digests", lambda *_: 1 / 0)
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(3)}, {}, {})
        with pytest.raises(ZeroDivisionError):
            checkpoints.wait()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with (
        Checkpoints(tmp_path, "trunk") as checkpoints,
        pytest.raises(RunError, match=r"Not a directory.*no earlier checkpoint"),
    ):
        checkpoints.save(1, {"w": jnp.ones(3)}, {}, {})
