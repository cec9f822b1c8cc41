"""Rows of studies as they are committed, made up, and the runs of a stage."""

from launch import points, study


def runs_of(stage):
    return points.runs_of(stage.sweep, study.folder_of(stage.sweep))


def row(stage, name, seed, loss, **more):
    """One row of a results file: as judged, with plain figures but for `more`."""
    run = f"runs/trunk-{seed}"
    usual = {
        "stage": stage, "row": name, "seed": seed, "loss": loss, "run": run, "reference": f"{run}:control", "rule": "",
        "format": "q2_0", "bits_per_weight": 2.25, "kld": 0.1, "same_top1": 0.5, "expert_agreement": 0.75,
        "health": {"flipped": 0.25}, "seconds": 120.0, "joined_rows": 1,
        "domains": {"d": {"bits_per_byte": 1.5}}, "tokens": 1000, "config": "configs/c.py", "overrides": {},
    }  # fmt: skip
    return usual | more
