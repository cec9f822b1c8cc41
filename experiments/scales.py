"""The two sizes at which the studies are run, and the runs that they share: trunks, sizes, branches on a grid.

small   configs/moe_2bit.py and its branches on the bundled novels: 2 CPU cores, minutes a run.
h100    configs/h100_study.py on a corpus: one H100.

Branches of the same trunks under the same name are the same runs in every study (launch/study.py); a study may have
them of more seeds.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from launch.algebra import Point, Points, chain, product, values, zip_
from launch.points import Sweep
from launch.study import Stage, Study, branches, joined
from qatmoe.errors import UserError

TEACHER, DISTILL, RATE, QUANTIZE = (f"train.phases.qat.{key}" for key in ("teacher", "distill", "lr", "quantize"))
RATE_ALL = "optim.lr"  # of every phase that has none of its own
FULL = "full"  # stands for a grid where there is none: full precision


@dataclasses.dataclass(frozen=True)
class Scale:
    """One size."""

    name: str
    config: str  # trunk, control and q2_0 QAT
    branch: str  # q2_0 QAT alone, from a trunk
    scratch: str  # on the grid from the first step
    experts: Sequence[int]  # the studies of size: numbers of experts
    share_steps: Sequence[int]  # of a share's branch
    trunk_steps: int
    checkpoint_every: int  # steps
    rates: Sequence[float]  # searched for control and QAT, besides the config's
    scale_rates: Sequence[float]  # searched for learned scales, besides the config's
    followed: Points  # the best of both searches and one rate beyond, on every seed, with and without a teacher
    taught: dict[str, Points]  # {grid: what is set in late QAT with a teacher, where studies compare formats}
    longer: dict[str, Point]  # {how long control and the best recipe are: their steps}, shortest first
    k_quants: bool  # rows are whole blocks of the K formats
    tokens: int
    widths: Points = dataclasses.field(default_factory=list)  # the study of width: models of other widths
    width_rates: Sequence[Sequence[float]] = ()  # for each width, searched on the first seed
    best_rates: Sequence[float] = ()  # for each width, that of the lowest control: on every seed
    in_depth: int = 0  # how many widths, from the first, are trained on less text and with a teacher too
    less_text: Points = dataclasses.field(default_factory=list)  # what is set for less of it, at each width's best rate
    common: Point = dataclasses.field(default_factory=dict)  # what is set in every run
    texts: tuple[str, ...] = ()
    seeds: Sequence[int] = (0, 1, 2)
    more_seeds: dict[str, Sequence[int]] = dataclasses.field(default_factory=dict)  # {study: those that it has besides}
    fp4_rate_seeds: Sequence[int] = (0,)  # of those of fp4_experts: on which its rates are searched

    def study(self, *stages: Stage, needs_llama: bool = True) -> Study:
        """Stages, judged on this size's text."""
        return Study(stages, self.tokens, self.texts, needs_llama)

    def on_more_seeds(self, study: str) -> "Scale":
        """The same on all seeds that a study has."""
        return dataclasses.replace(self, seeds=(*self.seeds, *self.more_seeds.get(study, ())))

    def trunks(self, judged: str) -> Stage:
        """Trunk, control and q2_0 QAT with learned scales, every seed. Checkpoints stay where shares branch off."""
        branched = sorted(self.trunk_steps - steps for steps in self.share_steps)
        points = product(self._seeds(), [{"train.phases.trunk.save_at": tuple(branched)}])
        return Stage(Sweep(f"{self.name}_trunks", self.config, points), judged)

    def size_name(self, n_experts: int) -> str:
        """What the names of a size's sweeps begin with."""
        return f"{self.name}_size_{n_experts}"

    def size(self, n_experts: int, judged: str) -> Stage:
        """As `trunks` with a number of experts, and no MTP module.

        A module has as many experts as a layer, and they stay in bfloat16: sizes would differ in more than what is on
        the grid, and pairs of equal bytes would not be equal.
        """
        points = product(values("model.n_experts", [n_experts]), values("model.n_mtp", [0]), self._seeds())
        return Stage(Sweep(self.size_name(n_experts), self.config, points), judged)

    def by_width(self, judged: str) -> list[Stage]:
        """As `trunks` at several widths, and no MTP module: rates searched, then every seed, then less text.

        With all of the text branches with a teacher too, on q2_0 and in full precision. Less text and a teacher at the
        widths of `widths_in_depth` alone. No stage where there are no widths.
        """
        if not self.widths:
            return []
        seeds = self._seeds()
        points = chain(product(self.searched_widths(), seeds[:1]), product(self.best_widths(), seeds[1:]))
        shorter = product(self.widths_in_depth(), self.less_text, seeds)
        sweeps = {f"{self.name}_width": points, f"{self.name}_width_text": shorter}
        no_mtp = values("model.n_mtp", [0])
        whole, less = (Stage(Sweep(name, self.config, product(no_mtp, p)), judged) for name, p in sweeps.items())
        return [whole, less, *(self.taught_widths(whole, grid) for grid in ("q2_0", FULL))]

    def taught_widths(self, trunks: Stage, grid: str) -> Stage:
        """Branches with a teacher from `by_width`'s trunks at each width's best rate, at twice that rate."""
        name = taught_name(trunks.sweep.name, grid)
        where, teacher = in_full_or_on(grid), taught_by(":control", 0.5)
        return joined(
            *(
                branches(trunks, name, self.branch, product(where, teacher, values(RATE, [2 * at[RATE_ALL]])), at=at)
                for at in self.widths_in_depth()
            )
        )

    def searched_widths(self) -> Points:
        """Each width at each rate that is searched there."""
        pairs = zip(self.widths, self.width_rates, strict=True)
        return chain(*(product([width], values(RATE_ALL, rates)) for width, rates in pairs))

    def best_widths(self) -> Points:
        """Each width at its best rate."""
        return zip_(self.widths, values(RATE_ALL, self.best_rates))

    def widths_in_depth(self) -> Points:
        """Of those the ones with less text and a teacher too."""
        return self.best_widths()[: self.in_depth]

    def on_grid(self, trunks: Stage, grid: str) -> Stage:
        """QAT of all experts on a grid, from trunks of any size."""
        return branches(trunks, grid_name(trunks.sweep.name, grid), self.branch, experts_on(grid))

    def at_rates(self, trunks: Stage, grid: str, seeds: Sequence[int]) -> Stage:
        """As `on_grid`, at each rate that is searched besides the config's, from the trunks of some seeds. FULL: on no
        grid."""
        variants = product(in_full_or_on(grid), values(RATE, self.rates))
        name = rates_name(trunks.sweep.name, grid)
        return joined(*(branches(trunks, name, self.branch, variants, at={"train.seed": seed}) for seed in seeds))

    def with_teacher(self, trunks: Stage, grid: str) -> list[Stage]:
        """As `on_grid` with the size's recipes that have a teacher; no stage where there is none. FULL: on no grid."""
        variants = product(in_full_or_on(grid), self.taught.get(grid, []))
        name = taught_name(trunks.sweep.name, grid)
        return [branches(trunks, name, self.branch, variants)] if variants else []

    def taught_kinds(self, grid: str) -> dict[str, Point]:
        """{what each of those recipes is called: what is set, None for what is not}."""
        unset = {TEACHER: None, DISTILL: None, RATE: None}
        return {
            f"taught, {rate_kind(point[RATE])}" if RATE in point else "taught": unset | point
            for point in self.taught.get(grid, [])
        }

    def _seeds(self) -> Points:
        shared = {"train.checkpoint_every": self.checkpoint_every, "train.keep": 1}
        return product([self.common], [shared], values("train.seed", self.seeds))


def grid_name(trunks: str, grid: str) -> str:
    """The sweep of a grid's branches, by the name of their trunks' sweep."""
    return f"{trunks.removesuffix('_trunks')}_{grid}"


def rates_name(trunks: str, grid: str) -> str:
    """The sweep of a grid's branches at other rates, by the name of their trunks' sweep."""
    return f"{grid_name(trunks, grid)}_rates"


def taught_name(trunks: str, grid: str) -> str:
    """The sweep of a grid's branches with a teacher, by the name of their trunks' sweep."""
    return f"{grid_name(trunks, grid)}_taught"


def rate_kind(rate: float) -> str:
    """What branches at another rate than the config's are called."""
    return f"rate {rate:g}"


def taught_by(teacher: str, share: float) -> Points:
    """One point: a share of the loss is the KL to a teacher; ":control" is that of the trunk's run."""
    return [{TEACHER: teacher, DISTILL: share}]


def experts_on(grid: str, **more: object) -> Points:
    """One point: routed and shared experts on a grid."""
    return [point | more for point in zip_(values("quant.experts", [grid]), values("quant.shared", [grid]))]


def in_full_or_on(grid: str) -> Points:
    """One point: no grid for FULL, all experts on the grid otherwise."""
    return [{QUANTIZE: False}] if grid == FULL else experts_on(grid)


def of_width(dim: int) -> Points:
    """One point: configs/moe_2bit.py at another width, in the same proportions, weights drawn with 1 / sqrt(width)."""
    shape = {"dim": dim, "dense_dim": 2 * dim, "expert_dim": dim, "n_heads": dim // 32, "n_kv_heads": dim // 64}
    shape |= {"init_std": round(0.64 / math.sqrt(dim), 4)}
    return [{f"model.{key}": value for key, value in shape.items()}]


def of_text(trunk: int, warmup: int, branch: int) -> Points:
    """One point: another number of steps in each phase."""
    return [{"train.phases.trunk.steps": trunk, "train.phases.trunk.warmup": warmup} | of_branch(branch)]


def of_branch(steps: int) -> Point:
    """Another number of steps for control and QAT, in all of which rates fall."""
    return {f"train.phases.{phase}.{key}": steps for phase in ("control", "qat") for key in ("steps", "decay")}


SMALL = Scale(
    name="small",
    config="configs/moe_2bit.py",
    branch="configs/moe_2bit_branch.py",
    scratch="configs/moe_2bit_scratch.py",
    experts=(4, 8, 16, 32),
    share_steps=(45, 90, 180, 360),
    trunk_steps=900,
    checkpoint_every=45,
    rates=(0.005, 0.02),
    scale_rates=(1e-5, 1e-4, 1e-3, 3e-3, 1e-2),
    followed=chain(values("optim.scale_lr", [1e-3]), values(RATE, [0.02, 0.04])),
    taught={  # the best that late_qat_2bit found on q2_0; elsewhere at the config's rate too
        "q2_0": product(taught_by(":control", 0.5), values(RATE, [0.02])),
        **dict.fromkeys((FULL, "mxfp4", "nvfp4", "q4_0"), product(taught_by(":control", 0.5), [{}, {RATE: 0.02}])),
    },
    longer={"twice as long": of_branch(1100), "four times as long": of_branch(2200)},
    k_quants=False,
    tokens=32_768,
    more_seeds={"fp4_experts": (3, 4, 5, 6, 7, 8), "iso_memory": (3, 4), "late_qat_2bit": (3, 4, 5)},
    fp4_rate_seeds=(6, 7, 8),  # one machine ran these with all of their branches
    widths=chain(*map(of_width, (64, 128, 192, 256))),
    width_rates=((0.0025, 0.005, 0.01), (0.0025, 0.005, 0.01), (0.00125, 0.0025, 0.005), (0.00125, 0.0025, 0.005)),
    best_rates=(0.005, 0.005, 0.0025, 0.0025),
    in_depth=3,  # width 256 takes six times as long as width 64
    less_text=chain(  # a half and a quarter
        of_text(trunk=450, warmup=25, branch=275),
        of_text(trunk=225, warmup=12, branch=138),
    ),
)
H100 = Scale(
    name="h100",
    config="configs/h100_study.py",
    branch="configs/h100_study_branch.py",
    scratch="configs/h100_study_scratch.py",
    experts=(16, 32, 64, 128),
    share_steps=(120, 240, 480, 960),
    trunk_steps=4_800,
    checkpoint_every=480,
    rates=(1.5e-3, 6e-3),
    scale_rates=(1e-5, 1e-4, 1e-3),
    followed=[],  # not searched yet
    taught={},
    longer={},
    k_quants=True,
    tokens=65_536,
)


HELDOUT = ("novel", "wiki", "techdoc", "code")


def get(name: str) -> Scale:
    """The size of that name. Raises UserError where there is none."""
    sizes = {scale.name: scale for scale in (SMALL, H100)}
    if name not in sizes:
        raise UserError(f"--scale {name}: must be {' or '.join(sizes)}")
    return sizes[name]


def on(name: str, corpus: str) -> Scale:
    """The size of that name with the text that it is trained and judged on.

    corpus: for h100 a folder with train*.jsonl* and heldout/{novel,wiki,techdoc,code}.jsonl; small has its own text.

    Raises:
      UserError: there is no such size, it takes no corpus, or the corpus lacks a file.
    """
    scale = get(name)
    if scale is SMALL:
        if corpus:
            raise UserError(f"--corpus {corpus}: scale small has its own text; leave it out, or --scale h100")
        return scale
    folder = Path(corpus)
    wanted = ["train*.jsonl*", *(f"heldout/{text}.jsonl" for text in HELDOUT)]
    missing = [pattern for pattern in wanted if not corpus or not any(folder.glob(pattern))]
    if missing:
        raise UserError(f"--corpus {corpus!r}: scale h100 needs a folder with {missing[0]}")
    common = {"data.source": f"{folder}/train*.jsonl*", "data.valid": f"{folder}/heldout/{HELDOUT[0]}.jsonl"}
    texts = tuple(f"{text}={folder}/heldout/{text}.jsonl" for text in HELDOUT[1:])
    return dataclasses.replace(scale, common=common, texts=texts)
