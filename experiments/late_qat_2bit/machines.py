"""The tables of late_qat_2bit that put two machines beside each other."""

import itertools
import json
import operator
from collections.abc import Sequence
from pathlib import Path

from experiments.late_qat_2bit.recipes import BEST, best_of
from experiments.late_qat_2bit.tables import Groups, goals_of, groups_of, rates_of, shares_of
from experiments.scales import DISTILL, RATE, TEACHER, Scale
from launch.study_results import Row
from launch.study_tables import above_control, compared, minus, select, table, with_interval, with_se
from qatmoe.text_table import markdown

EARLIER = Path(__file__).parent / "earlier" / "small.json"  # results of the study on another machine


def machines_tables(s: Scale, found: Groups, rows: Sequence[Row], added: Sequence[Row]) -> dict[str, str]:
    """What branches lose here and on the machine that the study was run on before, over both, and the goals there.

    Args:
      rows: of the seeds that both machines have.
      added: of other seeds: the config and the best recipe here, and others that this does not look at.
    """
    rows_before = json.loads(EARLIER.read_text())
    before = groups_of(s, rows_before)
    here, there = ([g.config, *g.recipes.values(), *g.followed, *g.in_full] for g in (found, before))
    labels = [group.label.partition(" (")[0] for group in here]
    best = labels.index(f"rate {best_of(s)[RATE]:g}, half KL to the control")
    head = ["loss minus the control's", "here", "earlier", "both (95 % interval)", "both, minus the config's"]
    averages = [f"both, minus {name}, runs of a seed averaged" for name in ("the config's", f"{BEST}'s")]
    lines = [[*head, f"both, minus {BEST}'s", *averages, "KLD here", "KLD earlier"]]
    for now, then in zip(here, there, strict=True):
        gaps, gaps_before = above_control(now, rows), above_control(then, rows_before)
        cells = [with_se(gaps), with_se(gaps_before), with_interval([*gaps, *gaps_before])]
        beside = [(minus(now, here[i]), minus(then, there[i])) if now is not here[i] else ([], []) for i in (0, best)]
        cells += [with_interval([*of_here, *of_there]) for of_here, of_there in beside]
        cells += [with_interval(averaged(of_here, of_there)) for of_here, of_there in beside]
        lines.append([now.label, *cells, *(with_se([r["kld"] for r in group.rows]) for group in (now, then))])
    return {
        "machines": markdown(lines),
        "best": best_table(s, {"earlier, where it was chosen": rows_before, "here": rows, "here, other seeds": added}),
        "goals_earlier": goals_of(before, rows_before),
        "rates_earlier": table(rates_of(s, rows_before, before.config, before.control), [], rows_before),
        "shares_machines": shares_of_both(s, rows, rows_before),
    }


def best_table(s: Scale, samples: dict[str, Sequence[Row]]) -> str:
    """The best recipe and the config beside each other in each sample, of which the first chose it, and in the others
    together."""
    of_best = dict.fromkeys((TEACHER, DISTILL)) | best_of(s)
    lines: dict[str, list[list[float]]] = {}
    head = ["(95 % interval)"]
    for name, rows in samples.items():
        config = select(rows, "", f"{s.name}_trunks")
        best = select(rows, "", f"{s.name}_followed", **of_best)
        head.append(name + config.label + (best.label if best.label != config.label else ""))  # which runs it lacks
        for label, values in (
            ("the config: loss minus the control's", above_control(config, rows)),
            (f"{BEST}: loss minus the control's", above_control(best, rows)),
            (f"{BEST}: loss minus the config's", minus(best, config)),
            (f"{BEST}: KLD minus the config's", minus(best, config, "kld")),
        ):
            lines.setdefault(label, []).append(values)
    body = [[label, *map(with_interval, [*of, list(itertools.chain(*of[1:]))])] for label, of in lines.items()]
    return markdown([[*head, "all but where it was chosen"], *body])


def averaged(now: Sequence[float], then: Sequence[float]) -> list[float]:
    """The mean of a seed's two runs, which share batches and first weights. Both lists are by seed, of the same seeds;
    none where one is shorter."""
    return [(a + b) / 2 for a, b in zip(now, then, strict=True)] if len(now) == len(then) else []


def shares_of_both(s: Scale, rows: Sequence[Row], rows_before: Sequence[Row]) -> str:
    """QAT's distance to its own control by share, here and before, and beside that of the last share but one."""
    here, there = ([qat for _, qat, _ in shares_of(s, own)] for own in (rows, rows_before))
    shares = [share for share, _, _ in shares_of(s, rows)]
    head = ["QAT in the last", "loss minus its control's, here", "earlier", "both (95 % interval)"]
    last = f"both, minus that of {100 * shares[-2]:g} %"
    lines = [[*head, last, f"{last}, runs of a seed averaged"]]
    for share, now, then in zip(shares, here, there, strict=True):
        gaps, gaps_before = above_control(now, rows), above_control(then, rows_before)
        beside = compared(now, here[-2], rows, operator.sub), compared(then, there[-2], rows_before, operator.sub)
        cells = [with_se(gaps), with_se(gaps_before), with_interval([*gaps, *gaps_before])]
        pooled = [with_interval([*beside[0], *beside[1]]), with_interval(averaged(*beside))]
        lines.append([f"{100 * share:g} %", *cells, *(["", ""] if now is here[-2] else pooled)])
    return markdown(lines)
