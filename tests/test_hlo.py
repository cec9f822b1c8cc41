import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from qatmoe import hlo

AXES = {"a": 4, "b": 2}


def compiled(f, *shapes):
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def one(line, *before):
    """The cost of a program of one instruction and those that make its operands."""
    text = "\n".join(["ENTRY %main (p: f32[]) -> f32[] {", *before, f"  ROOT {line}", "}"])
    return hlo.cost(text, AXES)


# ---- FLOPs and bytes -------------------------------------------------------------------------------------------------


def test_flops_of_a_matmul_are_those_of_xla():
    program = compiled(lambda a, b: a @ b, (48, 32), (32, 96))
    cost = hlo.cost(program.as_text(), {"data": 1})
    assert cost.flops == 2 * 48 * 32 * 96 == program.cost_analysis()["flops"]
    assert cost.bytes == 4 * (48 * 32 + 32 * 96 + 48 * 96)


def test_batched_and_transposed_matmuls():
    program = compiled(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (6, 8, 16), (6, 24, 16))
    assert hlo.cost(program.as_text(), {"data": 1}).flops == 2 * 6 * 8 * 24 * 16


def test_loops_are_multiplied_by_their_trip_counts():
    def f(x, w):
        inner = lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0]  # noqa: E731
        return jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=5)[0]

    program = compiled(f, (16, 16), (16, 16))
    cost = hlo.cost(program.as_text(), {"data": 1})
    assert cost.flops == 5 * 3 * 2 * 16**3
    assert cost.unknown_loops == 0


def test_slices_of_stacked_weights_read_what_they_cut_out():
    """A scan over layers reads each layer once, not the whole stack for each layer."""
    N, D = 64, 32
    f = lambda x, w: jax.lax.scan(lambda c, layer: (jnp.tanh(c @ layer), None), x, w)[0]  # noqa: E731
    cost = hlo.cost(compiled(f, (D, D), (N, D, D)).as_text(), {"data": 1})
    whole = 4 * N * D * D
    assert whole < cost.bytes < 10 * whole  # each layer read, its input and output written; the stack 64 times is 64


def test_the_gradient_of_a_scan():
    f = lambda x, w: jnp.sum(jax.lax.scan(lambda c, layer: (jnp.tanh(c @ layer), None), x, w)[0])  # noqa: E731
    cost = hlo.cost(compiled(jax.grad(f, argnums=(0, 1)), (8, 8), (7, 8, 8)).as_text(), {"data": 1})
    assert cost.flops == 3 * 7 * 2 * 8**3  # one matmul forward, two backward


def test_a_batched_matmul_written_as_a_convolution():
    """How a TPU's compiler writes 16 matmuls (10, 8) x (8, 6): of 16 window positions an output meets one element."""
    cost = one(
        "%c = bf16[16,10,6]{2,1,0:T(8,128)(2,1)} convolution(%l, %r), window={size=16 stride=15 lhs_dilate=16}, "
        "dim_labels=0bf_0io->0bf",
        "  %l = bf16[16,10,8]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)",
        "  %r = bf16[16,8,6]{2,1,0} parameter(1)",
    )
    assert cost.flops == 2 * 16 * 10 * 8 * 6
    assert cost.bytes == 2 * 16 * (8 * 6 + 10 * 6)  # the left operand is on the chip: S(1)


def test_window_fields_belong_to_the_axis_by_its_number():
    """Spatial axes in another order: axis 2 is the batch of 16, axis 0 is contracted, axis 1 is 8 rows more."""
    cost = one(
        "%c = bf16[16,8,5,7,1] convolution(%l, %r), window={size=2x1x16 stride=1x1x15 lhs_dilate=1x1x16}, "
        "dim_labels=21b0f_2o0i1->21bf0",
        "  %l = bf16[16,8,5,2,3] parameter(0)",
        "  %r = bf16[16,7,2,3,1] parameter(1)",
    )
    assert cost.flops == 2 * 16 * 8 * 5 * 7 * (2 * 3)


def test_a_plain_convolution_with_padding():
    """3 taps over 10 elements, padded by one: the taps outside do not count."""
    cost = one(
        "%c = f32[1,10,4] convolution(%l, %r), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
        "  %l = f32[1,10,2] parameter(0)",
        "  %r = f32[3,2,4] parameter(1)",
    )
    assert cost.flops == 2 * 2 * 4 * (3 * 10 - 2)


def test_a_call_of_cublas():
    cost = one(
        '%c = (f32[5,7]{1,0}, s8[64]{0}) custom-call(%l, %r), custom_call_target="__cublas$gemm", backend_config={'
        '"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
        "  %l = f32[5,3]{1,0} parameter(0)",
        "  %r = f32[3,7]{1,0} parameter(1)",
    )
    assert cost.flops == 2 * 5 * 3 * 7


def test_flash_attention_by_its_formula():
    """Half of the pairs of 64 queries and keys, 3 heads of 16: two matmuls forward."""
    queries = "  %q = bf16[1,3,64,16]{3,2,1,0} parameter(0)"
    pair = 2 * 3 * 64 * 64 / 2 * 16
    for name, matmuls in (("fwd_residuals.3", 2), ("dq_no_residuals", 3), ("dkv_no_residuals.1", 4)):
        kernel = (
            f'%splash_mqa_{name} = bf16[1,3,64,16]{{3,2,1,0}} custom-call(%q), custom_call_target="tpu_custom_call"'
        )
        assert one(kernel, queries).flops == matmuls * pair
    for name, matmuls in (("fmhaSoftmax", 2), ("fmhaSoftmaxBackward", 5)):
        kernel = f'%c.1 = bf16[1,3,64,16]{{3,2,1,0}} custom-call(%q), custom_call_target="__cudnn${name}"'
        assert one(kernel, queries).flops == matmuls * pair
    assert one('%c.1 = bf16[1,3,64,16] custom-call(%q), custom_call_target="other"', queries).flops == 0


def test_notes_on_lines_of_their_own():
    """A kernel's metadata is printed over several lines, the last of which begins with a brace."""
    note = 'frontend_attributes={kernel_metadata={\n"block":"{8}"\n}}, metadata={op_name="x"}'
    text = f"""
ENTRY %main (p: f32[4,4]) -> f32[4,4] {{
  %p = f32[4,4] parameter(0)
  %k = f32[4,4] custom-call(%p), custom_call_target="k", {note}
  ROOT %d = f32[4,4] dot(%k, %k), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
"""
    cost = hlo.cost(text, AXES)
    assert cost.flops == 2 * 4**3
    assert [k.name for k in cost.kernels] == ["x", ""]


def test_trip_count_from_the_condition():
    """A TPU's compiler does not note it; the counter's bound does."""
    text = """
%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[]{:T(128)}, f32[4,4]{1,0:T(8,128)}) parameter(0)
  %x = f32[4,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %d = f32[4,4]{1,0:T(8,128)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %t = (s32[]{:T(128)}, /*index=1*/f32[4,4]{1,0:T(8,128)}) tuple(%i, %d)
}

%cond (p: (s32[], f32[4,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(48)
  %p = (s32[]{:T(128)}, f32[4,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %a = (s32[]{:T(128)}, f32[4,4]{1,0:T(8,128)}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, f32[4,4]{1,0:T(8,128)}) while(%a), condition=%cond, body=%body
}
"""
    assert hlo.cost(text, AXES).flops == 48 * 2 * 4**3
    unknown = text.replace("constant(48)", "parameter(1)")
    assert hlo.cost(unknown, AXES).unknown_loops == 1


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.cost("hello", AXES)


# ---- collectives -----------------------------------------------------------------------------------------------------

PROGRAM = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from qatmoe import hlo

mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def gather(x):
    return jax.lax.all_gather(x, "a", tiled=True)

def reduce(x):
    return jax.lax.psum(x, "b")

def both(x):
    return jax.lax.psum(x, ("a", "b"))

def scatter(x):
    return jax.lax.psum_scatter(x, "a", tiled=True)

def exchange(x):
    return jax.lax.all_to_all(x, "a", 0, 0, tiled=True)

def shift(x):
    return jax.lax.ppermute(x, "b", [(0, 1), (1, 0)])

def loop(x):
    return jax.lax.scan(lambda c, _: (jax.lax.psum(jnp.sin(c), "a"), None), x, None, length=5)[0]

found = {}
for f in (gather, reduce, both, scatter, exchange, shift, loop):
    g = jax.shard_map(f, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 32, 16), jnp.float32, sharding=NamedSharding(mesh, P(("a", "b"))))
    cost = hlo.cost(jax.jit(g).lower(x).compile().as_text(), dict(mesh.shape))
    found[f.__name__] = [(c.kind, c.axes, c.size, c.sent, c.runs, c.group) for c in cost.collectives]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def known(child_env):
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=child_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "kind", "axes", "size", "sent", "runs"),
    [  # a device holds 32 x 16 floats, 2048 bytes
        ("gather", "all-gather", ["a"], 4, 3 * 2048, 1),
        ("reduce", "all-reduce", ["b"], 2, 2048, 1),
        ("both", "all-reduce", ["a", "b"], 8, 2 * 7 / 8 * 2048, 1),
        ("scatter", "reduce-scatter", ["a"], 4, 3 / 4 * 2048, 1),
        ("exchange", "all-to-all", ["a"], 4, 3 / 4 * 2048, 1),
        ("shift", "collective-permute", ["b"], 2, 2048, 1),
        ("loop", "all-reduce", ["a"], 4, 2 * 3 / 4 * 2048, 5),
    ],
)
def test_collectives_of_known_programs(known, name, kind, axes, size, sent, runs):
    ((found_kind, found_axes, found_size, found_sent, found_runs, group),) = known[name]
    assert (found_kind, found_axes, found_size, found_runs) == (kind, axes, size, runs)
    assert found_sent == pytest.approx(sent)
    assert len(group) == size


def all_gather(groups):
    line = f"%g = f32[8,4]{{1,0}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    instruction = hlo._instruction(line)
    return hlo.device_groups(instruction, 8)


@pytest.mark.parametrize(
    ("text", "groups", "axes"),
    [  # devices of AXES: number 2 a + b
        ("{{0,2,4,6},{1,3,5,7}}", [[0, 2, 4, 6], [1, 3, 5, 7]], ("a",)),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]], ("a", "b")),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]], ("b",)),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]], ("a",)),
        ("mesh['x'=4,'y'=2] {'y'}", [[0, 1], [2, 3], [4, 5], [6, 7]], ("b",)),
        ("mesh['x'=4,'y'=2] {'x'}", [[0, 2, 4, 6], [1, 3, 5, 7]], ("a",)),
        ("mesh['x'=8] {'x':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]], ("a",)),
        ("mesh['x'=8] {'x':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]], ("b",)),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", [[0, 1], [2, 3], [4, 5], [6, 7]], ("b",)),
        ("mesh['x'=2,'y'=4,'z'=1], device_ids=([4,2]T(1,0)) {'y', 'z'}", [[0, 2, 4, 6], [1, 3, 5, 7]], ("a",)),
        ("mesh['x'=2,'y'=4], device_ids=(7,6,5,4,3,2,1,0) {'y'}", [[7, 6, 5, 4], [3, 2, 1, 0]], ("a", "b")),
    ],
)
def test_every_way_to_write_groups(text, groups, axes):
    assert all_gather(text) == groups
    assert hlo.varying(groups, AXES) == axes


def test_an_unknown_way_to_write_groups():
    with pytest.raises(ValueError, match="unknown form of replica groups"):
        all_gather("<v9>")


def test_parts_of_one_collective_count_once():
    """A TPU's compiler starts a gather in one fusion, works in the next, and waits in a third: one channel."""
    part = (
        "  %g{0} = bf16[64,8] all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={{0}}\n"
        '  ROOT %c = (bf16[16,8], bf16[64,8]) custom-call(%p, %g{0}), custom_call_target="x"\n}}\n'
    )
    fusions = "".join(
        f"\n%f{i} (p: bf16[16,8]) -> bf16[64,8] {{\n  %p = bf16[16,8] parameter(0)\n" + part.format(i) for i in range(3)
    )
    calls = "".join(f"  %s{i} = (bf16[16,8], bf16[64,8]) fusion(%a), kind=kCustom, calls=%f{i}\n" for i in range(3))
    text = f"{fusions}\nENTRY %main (a: bf16[16,8]) -> f32[] {{\n  %a = bf16[16,8] parameter(0)\n{calls}}}\n"
    (found,) = hlo.cost(text, AXES).collectives
    assert (found.kind, found.axes, found.sent, found.overlapped) == ("all-gather", ("a",), 3 * 16 * 8 * 2, True)


def test_a_sum_of_which_each_device_keeps_a_slice():
    text = """
%f (p: f32[64]) -> f32[16] {
  %p = f32[64] parameter(0)
  %i = s32[] constant(0)
  %r = f32[64] all-reduce(%p), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %d = f32[16] dynamic-slice(%r, %i), dynamic_slice_sizes={16}
}

ENTRY %main (a: f32[64]) -> f32[16] {
  %a = f32[64] parameter(0)
  ROOT %s = f32[16] fusion(%a), kind=kCustom, calls=%f
}
"""
    (found,) = hlo.cost(text, AXES).collectives
    assert (found.kind, found.sent) == ("reduce-scatter", 3 / 4 * 64 * 4)


SUM = "all-reduce-start(%a), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add"
WORK = "  %d = f32[8,8] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


@pytest.mark.parametrize(
    ("start", "between", "overlapped"),
    [
        (SUM, WORK, True),
        (SUM, "  %d = f32[8,8] negate(%a)", True),  # no matmul, but bytes
        (SUM, "  %d = (f32[8,8]) tuple(%a)", False),
        (SUM + ', backend_config={"collective_backend_config":{"is_sync":true}}', WORK, False),
        (SUM + ', backend_config={"collective_backend_config":{"is_sync":false}}', WORK, True),
        (SUM, "  %w = f32[8,8] call(%a), to_apply=%work", True),
        (SUM, "  %w = f32[8,8] call(%a), to_apply=%idle", False),
    ],
)
def test_a_collective_runs_beside_work_that_stands_between_its_start_and_its_end(start, between, overlapped):
    def inner(name, line):
        return f"%{name} (a: f32[8,8]) -> f32[8,8] {{\n  %a = f32[8,8] parameter(0)\n{line}\n}}\n\n"

    lines = [
        "  %a = f32[8,8] parameter(0)",
        f"  %s = f32[8,8] {start}",
        between,
        "  %e = f32[8,8] all-reduce-done(%s)",
        "  ROOT %n = f32[8,8] negate(%e)",  # after its end
    ]
    before = inner("work", WORK) + inner("idle", "  %b = f32[8,8] bitcast(%a)")
    text = before + "ENTRY %main (a: f32[8,8]) -> f32[8,8] {\n" + "\n".join(lines) + "\n}\n"
    (found,) = hlo.cost(text, AXES).collectives
    assert (found.kind, found.overlapped) == ("all-reduce", overlapped)


def test_every_branch_of_a_conditional_is_read():
    matmul = WORK.replace("  %d", "  ROOT %d")
    branches = [f"%b{i} (a: f32[8,8]) -> f32[8,8] {{\n  %a = f32[8,8] parameter(0)\n{matmul}\n}}\n" for i in range(3)]
    for form, n in (
        ("branch_computations={%b0, %b1, %b2}", 3),
        ("true_computation=%b0, false_computation=%b1", 2),
    ):
        text = "\n".join([*branches, "ENTRY %main (a: f32[8,8]) -> f32[8,8] {", "  %a = f32[8,8] parameter(0)"])
        cost = hlo.cost(
            f"{text}\n  %p = s32[] constant(1)\n  ROOT %c = f32[8,8] conditional(%p, %a), {form}\n}}\n", AXES
        )
        assert cost.flops == n * 2 * 8**3
