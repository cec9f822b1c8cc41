import json
import sys

import jax.numpy as jnp
import pytest

from qatmoe import cli
from qatmoe.config import Config, default_config, leaves, phase, resolve, to_json
from qatmoe.convert import gguf_model, hf_config
from qatmoe.errors import UserError
from qatmoe.model.layers import rope_angles


def small(**changes):
    config = default_config().to_dict()
    config["train"]["phases"]["trunk"] = phase(steps=10).to_dict()
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[last] = value
    return config


def test_json_round_trip():
    cfg = resolve(small(optim__betas=(0.8, 0.9), train__phases={"trunk": {"steps": 5, "save_at": (2, 4)}}))
    assert resolve(json.loads(to_json(cfg))) == cfg


def test_leaves():
    assert leaves({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}
    assert resolve(small(train__profile_step=8)).train.profile_step == 8  # steps 8, 9 and 10 of 10


def test_an_imported_phase_has_no_steps_to_trace():
    phases = {"trunk": {"steps": 1}, "qat": {"steps": 10, "start": "trunk"}}
    changes = {"train__phases": phases, "train__profile_step": 8}
    assert resolve(small(init_from="run", **changes)).train.profile_step == 8
    with pytest.raises(UserError, match="trunk has steps=1"):
        resolve(small(**changes))
    with pytest.raises(UserError, match="qat has steps=10"):
        resolve(small(init_from="run", **changes | {"train__profile_step": 9}))
    phases["trunk"]["save_at"] = (1, 2)  # nor to save
    assert resolve(small(init_from="run", train__phases=phases))
    with pytest.raises(UserError, match="step 2 is not among"):
        resolve(small(train__phases=phases))


def test_every_config_file_resolves(config_files):
    for file in config_files:
        cfg, _ = cli.parse(["x", f"--config={file}"], "", {})
        assert isinstance(cfg, Config)
        assert cfg.name == file.stem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__dimm": 3}, r"config\.model\.dimm: no such key; did you mean config\.model\.dim\?"),
        ({"model__dim": "x"}, r"config\.model\.dim='x': expected int, got str"),
        ({"model__dim": True}, "expected int, got bool"),
        ({"model__n_kv_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        ({"model__top_k": 9}, "top_k=9 is more than n_experts=8"),
        ({"model__n_dense_layers": 4}, "leaves no MoE layer"),
        ({"model__rotary_fraction": 0.1}, "even number"),
        ({"model__rotary_fraction": float("nan")}, "rotary_fraction=nan: must be more than 0 and at most 1 and finite"),
        ({"model__rotary_fraction": 1e308}, r"rotary_fraction=1e\+308: must be more than 0 and at most 1"),
        ({"model__routed_scale": float("nan")}, "routed_scale=nan: must be from 0 to 3.4e.38 and finite"),
        ({"optim__lr": 1e39}, r"lr=1e\+39: must be more than 0 and at most 3.4e\+38"),
        ({"optim__lr": 10**400}, "config.optim.lr: a number of 1329 bits is more than any float"),
        ({"model__rotary_fraction": 1e-12}, "gives 3.2e-11 rotated dims"),
        ({"model__rotary_fraction": 0.5625001}, "gives 18 rotated dims"),
        ({"model__router": "hash"}, "must be one of 'softmax', 'sigmoid'"),
        ({"train__batch_size": 0}, "at least 1"),
        ({"train__grad_accum": 3}, "must divide batch_size=8"),
        ({"optim__lr": 0.0}, r"optim\.lr=0\.0: must be more than 0"),
        ({"eval__final_batches": -1}, "final_batches=-1: must be at least 0"),
        ({"optim__clip": -1.0}, "clip=-1.0: must be at least 0"),
        ({"optim__ema": 1.0}, "ema=1.0: must be from 0 to 0.999999"),
        ({"optim__eps": 1e-45}, "eps=1e-45: must be at least 1.2e-38"),
        ({"model__capacity_factor": float("inf")}, "capacity_factor=inf: must be more than 0 and finite"),
        ({"optim__betas": (0.9, 1.5)}, "from 0 to below 1"),
        ({"optim__betas": 0.9}, r"config.optim.betas=0.9: expected numbers in parentheses: \(1, 2\)"),
        ({"optim__betas": (0.9, "x")}, "config.optim.betas='x': expected float, got str"),
        ({"train__loss_chunk": -1}, "loss_chunk=-1"),
        ({"train__seed": -1}, "seed=-1"),
        ({"train__seed": 2**32}, "seed=4294967296: must be from 0 to 4294967295"),
        ({"train__phases": {"ptq": {"steps": 3}}}, "'ptq' is a name that reports use themselves"),
        ({"train__phases": {"total": {"steps": 3}}}, "'total' is a name that reports use themselves"),
        ({"train__phases": {"ptq_control_search": {"steps": 3}}}, "'ptq_control_search' is a name that reports"),
        ({"train__phases": {}}, "name at least one"),
        ({"train__profile_step": -1}, "profile_step=-1: must be at least 0"),
        ({"train__profile_step": 5, "train__profile_steps": 0}, "profile_steps=0: must be at least 1"),
        ({"train__profile_step": 9}, r"profile_step=9: its 3 profile_steps end at step 11, and .*trunk has steps=10"),
        ({"model": 3}, "expected a group of keys"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        resolve(small(**changes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 5, "start": "nowhere"}, "start='nowhere'"),
        ({"steps": 5, "start": "other"}, "does not itself wait"),
        ({"steps": 5, "warmup": 4, "decay": 2}, "must fit in steps=5"),
        ({"steps": 5, "save_at": (2, 6)}, r"other.save_at=\(2, 6\): step 6 is not among 1 to .*other.steps=5"),
        ({"steps": 5, "freeze": "(router"}, r"other.freeze='\(router' is not a regular expression"),
        ({"steps": 5, "save_at": (0,)}, r"save_at=\(0,\): step 0 is not among 1"),
        ({"steps": 5, "save_at": (2.5,)}, "save_at=2.5: expected int, got float"),
        ({"steps": 5, "distill": 0.5}, "needs a teacher"),
        ({"steps": 5, "start": "trunk", "distill": 1.5}, "between 0 and 1"),
        ({"steps": 5, "start": "trunk", "teacher": "trunk"}, "not learned from with distill=0.0"),
        ({"steps": 5, "start": "trunk", "distill": 1.0, "teacher": "nowhere"}, "teacher='nowhere'.*or RUN:PHASE"),
        ({"steps": 5, "start": "trunk", "distill": 1.0, "teacher": "other"}, "teacher='other'.*itself wait for other"),
        ({"steps": 5, "distill": 1.0, "teacher": ":control"}, "config.init_from names, which is empty"),
    ],
)
def test_phase_mistakes_are_named(fields, message):
    config = small()
    config["train"]["phases"]["other"] = phase(**fields).to_dict()
    with pytest.raises(UserError, match=message):
        resolve(config)


@pytest.mark.parametrize(
    ("head_dim", "fraction", "rotated"), [(40, 0.55, 22), (100, 0.58, 58), (96, 0.3333333333, 32), (32, 0.5, 16)]
)
def test_a_share_of_a_head_may_be_off_by_rounding(head_dim, fraction, rotated):
    """The first product is a little more than 22 in floating point, the next two a little less than 58 and 32."""
    model = resolve(small(model__head_dim=head_dim, model__rotary_fraction=fraction)).model
    assert rope_angles(jnp.zeros((1, 1), int), head_dim, fraction, 1e4)[0].shape == (1, 1, rotated // 2)
    assert gguf_model.hyper_parameters(model, "glm4moe", "", 8)["glm4moe.rope.dimension_count"].value == rotated
    assert int(head_dim * hf_config._rotary_factor(model)) == rotated  # as transformers computes it


def test_what_was_frozen_is_trained_with_new_moments():
    config = small()
    config["train"]["phases"]["held"] = phase(steps=5, start="trunk", freeze="norm").to_dict()
    for more in ({"reset_moments": True}, {"freeze": "norm"}, {}):
        config["train"]["phases"]["last"] = phase(steps=5, start="held", **more).to_dict()
        if more:
            resolve(config)
    with pytest.raises(UserError, match="last.start='held': moments .* set .*reset_moments=True, or .* freeze='norm'"):
        resolve(config)


def test_an_imported_phase_freezes_nothing():
    config = small(init_from="runs/other")
    config["train"]["phases"]["trunk"]["freeze"] = "norm"
    with pytest.raises(UserError, match="trunk.freeze='norm': trunk is the first phase, which config.init_from"):
        resolve(config)


def test_cosine_has_no_decay():
    config = small(optim__schedule="cosine")
    config["train"]["phases"]["trunk"]["decay"] = 5
    with pytest.raises(UserError, match="decay=5 belongs to"):
        resolve(config)


def test_phases_run_after_what_they_start_and_learn_from():
    config = small()
    config["train"]["phases"]["a"] = phase(steps=1, start="b").to_dict()
    config["train"]["phases"]["b"] = phase(steps=1, start="trunk", distill=0.5, teacher="c").to_dict()
    config["train"]["phases"]["c"] = phase(steps=1, start="trunk", distill=0.5, teacher="run:b").to_dict()
    order = list(resolve(config).train.phases)
    assert order.index("trunk") < order.index("c") < order.index("b") < order.index("a")


def test_the_phase_that_is_replaced_cannot_learn():
    config = small(init_from="run")
    config["train"]["phases"]["trunk"] |= {"distill": 0.5, "teacher": ":control"}
    with pytest.raises(UserError, match="trunk is the first phase, which config.init_from replaces"):
        resolve(config)


def test_a_phase_that_nothing_has_is_the_mistake_that_is_named():
    config = small()
    config["train"]["phases"]["a"] = phase(steps=1, start="trunk", distill=0.5, teacher="b").to_dict()
    config["train"]["phases"]["b"] = phase(steps=1, start="nowhere").to_dict()
    with pytest.raises(UserError, match="b.start='nowhere'"):
        resolve(config)


def test_command_line_overrides(config_files):
    toy = next(f for f in config_files if f.stem == "toy")
    args = ["x", "--config", str(toy), "--config.model.dim=256", "--config.train.phases.qat.steps=17", "--workdir=w"]
    cfg, given = cli.parse(args, "", {"workdir": ""})
    assert (cfg.model.dim, cfg.train.phases["qat"].steps, given["workdir"]) == (256, 17, "w")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no configuration: give --config FILE"),
        (["--config", "nowhere.py"], "--config nowhere.py: no such file"),
        (
            ["--config", "TOY", "--config.model.dimm=3"],
            r"config\.model\.dimm: no such key; did you mean config\.model\.dim\?",
        ),
        (["--config", "TOY", "--config.modle.dim", "3"], r"config\.modle: no such key; did you mean config\.model\?"),
        (
            ["--config", "TOY", "--config.model.dim.x=3"],
            r"model\.dim\.x: no such key; config\.model\.dim is a value",
        ),
        (["--config="], "no configuration: give --config FILE"),
        (
            ["--config", "TOY", "--noconfig.model.tie_embedding"],
            r"config\.model\.tie_embedding: no such key; did you mean config\.model\.tie_embeddings\?",
        ),
        (
            ["--config", "TOY", "--config.train.phases.tunk.steps=3"],
            r"^--config\.train\.phases\.tunk\.steps: there is no phase 'tunk'; the file has control, qat, trunk$",
        ),
        (["--config", "TOY", "--quant.experts=mxfp4"], r"'quant\.experts'; did you mean --config\.quant\.experts\?"),
        (["--config", "MOVED"], "No module named 'configs'; run it from the repository's root"),
        (["--config", "TOY", "--config.model.dim=many"], "--config.model.dim=many"),
        (["--config", "TOY", "--confg.model.dim=3"], "confg.model.dim"),
        (["--config", "TOY", "more"], "unexpected argument 'more'"),
        (["--config", "BROKEN"], "SyntaxError"),
    ],
)
def test_command_line_mistakes_are_one_line(args, message, config_files, tmp_path, monkeypatch):
    toy = next(f for f in config_files if f.stem == "toy")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "moved.py").write_text("from configs import toy\n")
    monkeypatch.setattr("sys.path", [p for p in sys.path if p not in ("", str(toy.parent.parent))])
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    names = {"TOY": str(toy), "BROKEN": str(tmp_path / "broken.py"), "MOVED": str(tmp_path / "moved.py")}
    with pytest.raises(UserError, match=message) as error:
        cli.parse(["x", *(names.get(a, a) for a in args)], "", {})
    assert "\n" not in str(error.value)


FILE = """import os
import numpy as np
from qatmoe.config import default_config, phase
def get_config({}):
    c = default_config()
    c.train.phases = {{"trunk": {{"steps": 5}}}}
    {}
    return c
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c.modle.dim = 64", """: line 7: AttributeError: 'modle' Did you mean "model" instead of "modle"?"""),
        ("os.environ['QATMOE_NONE']", ": line 7: KeyError: QATMOE_NONE"),
        ("open('nothing.txt')", ": line 7: FileNotFoundError: [Errno 2] No such file or directory: 'nothing.txt'"),
        (
            "c.train.phases.trunk = phase(step=2)",
            ": line 7: TypeError: PhaseConfig.__init__() got an unexpected keyword argument 'step'",
        ),
        ("return", ": get_config() returns a NoneType; return a ConfigDict"),
        (
            "import ml_collections; c.optim.lr = ml_collections.config_dict.required_placeholder(float)",
            ": config.optim.lr: a required placeholder; give it a value in the file, not on the command line",
        ),
    ],
)
def test_a_config_file_that_fails_is_told_by_its_own_line(body, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE.format("", body))
    for overrides in [], ["--config.train.phases.trunk.steps=3"]:
        with pytest.raises(UserError) as error:
            cli.parse(["x", f"--config={file}", *overrides], "", {})
        assert str(error.value) == f"--config {file}{message}"


def test_a_value_of_another_type_is_told_by_its_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE.format("", "c.model.dim = np.int64(64)"))
    with pytest.raises(UserError, match=r"mine\.py: line 7: TypeError: .*'dim'.*numpy\.int64") as error:
        cli.parse(["x", f"--config={file}"], "", {})
    assert "Traceback" not in str(error.value) and "\n" not in str(error.value)


def test_a_config_file_without_the_function_and_its_argument(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("dim = 64\n")
    with pytest.raises(UserError, match=r"mine\.py: has no get_config\(\); configs/toy\.py shows one$"):
        cli.parse(["x", f"--config={file}"], "", {})
    file.write_text(FILE.format("n", "c.model.dim = int(n)"))
    with pytest.raises(UserError, match=r"get_config\(n\): missing a required argument: 'n'; what stands after FILE:"):
        cli.parse(["x", f"--config={file}"], "", {})
    assert cli.parse(["x", f"--config={file}:96"], "", {})[0].model.dim == 96


def test_what_a_file_leaves_out_can_be_set(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return {'train': {'phases': {'trunk': {'steps': 5}}}}\n")
    overrides = ["--config.train.phases.trunk.warmup=1", "--config.optim.betas=(0.5, 0.6)", "--config.model.dim=96"]
    cfg, _ = cli.parse(["x", f"--config={file}", *overrides], "", {})
    trunk = cfg.train.phases["trunk"]
    assert (trunk.steps, trunk.warmup, cfg.optim.betas, cfg.model.dim) == (5, 1, (0.5, 0.6), 96)
    assert cfg == resolve(
        small(train__phases={"trunk": {"steps": 5, "warmup": 1}}, optim__betas=(0.5, 0.6), model__dim=96)
    )


def test_flags_of_a_file(config_files, tmp_path):
    toy = next(f for f in config_files if f.stem == "toy")
    (tmp_path / "flags").write_text(f"--config={toy}\n--config.model.dim=96\n")
    assert cli.parse(["x", f"--flagfile={tmp_path / 'flags'}"], "", {})[0].model.dim == 96
    with pytest.raises(UserError, match="nowhere"):
        cli.parse(["x", "--flagfile=nowhere"], "", {})
