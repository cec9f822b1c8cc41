import itertools

import matplotlib.image
import numpy as np
import pytest
from matplotlib.text import Text

from qatmoe import audit_report
from qatmoe.errors import UserError
from qatmoe.model.cache import CacheType


def row(name, group, bits, kld, **other):
    """A row as the audit writes it; errors are a tenth of the value."""
    branch, *rest = name.split("/")
    values = {
        "loss": 4.0 + kld, "loss_above": 0.9 * kld, "kld": kld, "kld_p99": 10 * kld, "kld_routing": 0.3 * kld,
        "same_top1": 1 - kld / 2, "expert_agreement": 1 - kld,
    }  # fmt: skip
    return {
        "row": name, "group": group, "branch": branch, "reference": "control", "bits_per_weight": bits,
        "format": rest[0] if rest else "f32", "rule": rest[1] if len(rest) > 1 else "", "joined_rows": 1, "kv": "",
        "kv_bits": None, "tokens": 32768, "documents": 12, "kld_own": None, "kld_own_se": None,
        **values, **{f"{k}_se": v / 10 for k, v in values.items()},
        "expert_agreement_by_layer": [1 - kld, 1 - kld / 2], "expert_agreement_by_layer_se": [0.01, 0.01],
        "mtp_acceptance": [0.5], "mtp_acceptance_se": [0.01],
        "by_position": [
            {"start": s, "end": s + 64, "kld": kld * (1 + s / 64), "kld_se": kld / 10, "loss": 4.0, "loss_se": 0.1}
            for s in (0, 64)
        ],
        "domains": {"novel": {"kld": kld, "kld_se": kld / 10}},
    } | other  # fmt: skip


def cache_row(branch, kv, kld, own=None):
    about = {"row": f"{branch}/kv/{kv}", "kv": kv, "kv_bits": 8 * CacheType.parse(kv).bytes(1, 0)}
    r = row(branch, "kv", 2.25 if own else 32.0, kld, **about, kld_own=own, kld_own_se=own)
    for span in r["by_position"] if own else ():
        span |= {"kld_own": own, "kld_own_se": own / 10}
    return r


PTQ = [
    row("control/Q1_0/stock", "ggml", 1.125, 1.5, joined_rows=2),
    row("control/q2_0/absmax", "grid", 2.25, 0.30),
    row("control/q2_0/search", "grid", 2.25, 0.28),
    row("control/Q2_K/imatrix", "ggml", 2.625, 0.35, joined_rows=4),  # more bits and worse: not on the frontier
    row("control/Q3_K/stock", "ggml", 3.4375, 0.05, joined_rows=4),
    row("control/Q4_0/stock", "ggml", 4.5, 0.02),
    row("control/q4_0/search", "grid", 4.5, 0.02),  # as good as the one before
    row("control/Q8_0/stock", "ggml", 8.5, 0.0001),
]
ROWS = [
    row("control", "control", 32.0, 0.0),
    row("trunk", "trunk", 32.0, 0.2),
    row("qat", "qat", 2.25, 0.06, format="q2_0"),
    *PTQ,
    row("qat/Q4_0/stock", "requantized", 4.5, 0.07, kld_own=0.01, kld_own_se=0.001),
    cache_row("control", "q8_0", 0.0002),
    cache_row("control", "q4_0", 0.01),
    cache_row("qat", "q4_0", 0.065, own=0.008),
]


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


# ---- what the rows say -----------------------------------------------------------------------------------------------


def test_frontier_by_hand():
    names = [r["row"] for r in audit_report.frontier(ROWS)]
    assert names == [
        "control/Q1_0/stock",
        "control/q2_0/search",
        "control/Q3_K/stock",
        "control/Q4_0/stock",
        "control/Q8_0/stock",
    ]
    assert audit_report.frontier(ROWS[:3]) == []


def test_frontier_does_not_depend_on_the_order_of_sizes():
    assert audit_report.frontier(PTQ[::-1])[0] is PTQ[0]


def test_frontier_skips_what_was_not_measured():
    assert audit_report.frontier([PTQ[0] | {"kld": None}, PTQ[1]]) == [PTQ[1]]


def test_rivals_by_hand():
    qat = ROWS[2]
    same_size, as_good = audit_report.rivals(ROWS, qat)
    assert (same_size["row"], as_good["row"]) == ("control/q2_0/search", "control/Q3_K/stock")
    assert audit_report.rivals(ROWS, qat | {"bits_per_weight": 1.0, "kld": 1e-5}) == (None, None)


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_table_groups_and_sorts():
    text = audit_report.table(ROWS)
    assert [line for line in text.splitlines()[2:] if line and line[0] != " "][:7] == [
        "as deployed",
        "control, rounded to grids",
        "control, rounded to llama.cpp types",
        "qat, rounded again",
        "control, with a rounded KV cache",
        "qat, with a rounded KV cache",
        "Against control. Tokens: 32,768. Documents: 12.",
    ]
    section = text.split("llama.cpp types\n")[1].split("\nqat, ")[0]
    assert [line.split()[0] for line in section.splitlines()] == ["Q1_0", "Q2_K", "Q3_K", "Q4_0", "Q8_0"]


def test_table_shows_values_with_their_errors():
    text = audit_report.table(ROWS)
    (line,) = lines_with(text, "q2_0 search *")
    assert line.split("  ")[0] == "" and "2.25" in line
    cells = "4.2800 ±0.4280      0.2520 ±0.0252      0.2800 ±0.0280"
    assert cells in line and "86.00 ±8.60" in line and "72.00 ±7.20" in line
    (small,) = lines_with(text, "Q8_0 stock *")
    assert "0.000100 ±0.000010" in small
    (again,) = lines_with(text, "  Q4_0 stock ", "0.0700 ±0.0070")
    assert "0.0100 ±0.0010" in again  # KLD to itself


def test_table_is_aligned():
    lines = audit_report.table(ROWS).splitlines()
    header = lines[0]
    ends = [header.index(name) + len(name) for name in ("bits", "loss", "above", "KLD", "KLD p99", "same experts %")]
    for line in lines_with("\n".join(lines), "±", "  "):
        if line.startswith("  "):
            assert all(len(line) == end or line[end : end + 2] in ("  ", "") for end in ends), line


def test_table_says_what_qat_is_worth():
    assert (
        "qat: KLD 0.0600 ±0.0060 at 2.25 bits. Rounding in no more bits: 0.2800 ±0.0280 (q2_0 search). "
        "Rounding that is as close takes 3.4375 bits (Q3_K stock †4); without joined rows 4.5 bits (Q4_0 stock)."
        in audit_report.table(ROWS)
    )
    worse = [r for r in ROWS if r["row"] not in ("control/Q3_K/stock", *[p["row"] for p in PTQ[5:]])]
    assert "(q2_0 search). No rounding is as close." in audit_report.table(worse)


def test_headlines_mark_what_no_file_can_hold():
    rows = [*ROWS, row("control/IQ2_S/imatrix", "ggml", 2.25, 0.1, joined_rows=4)]
    expected = "no more bits: 0.1000 ±0.0100 (IQ2_S imatrix †4); without joined rows 0.2800 ±0.0280 (q2_0 search). "
    assert expected in audit_report.table(rows) and expected in audit_report.markdown(rows)
    joined = [r | {"joined_rows": 2} if r["group"] in audit_report.PTQ else r for r in ROWS]
    text = audit_report.table(joined)
    assert "(q2_0 search †2); without joined rows none. " in text
    assert "3.4375 bits (Q3_K stock †2); without joined rows there is none." in text


def test_cache_sections_show_the_bits_of_the_cache():
    text = audit_report.table(ROWS)
    section = text.split("qat, with a rounded KV cache\n")[1].splitlines()
    assert section[0].split()[:2] == ["q4_0", "4.5"]
    assert "per weight of the quantized tensors, or per cached value where the KV cache is rounded" in text
    assert "the cost of rounding its weights or cache" in text
    assert "cached value" not in audit_report.table(PTQ)


def test_shares_of_drafts_have_errors():
    rows = [r | {"mtp_acceptance": [0.5, 0.25, None], "mtp_acceptance_se": [0.01, None, None]} for r in ROWS[:1]]
    assert "| 50.00 ±1.00 / 25.00 / - |" in audit_report.markdown(rows)


def test_joined_rows_and_the_frontier_are_marked():
    text = audit_report.table(ROWS)
    assert lines_with(text, "Q1_0 stock †2 *") and lines_with(text, "Q2_K imatrix †4 ")
    assert not lines_with(text, "Q2_K imatrix †4 *")
    assert lines_with(text, "†n: n rows of a matrix were joined", "no GGUF file")
    plain = audit_report.table(ROWS[:3])
    assert "†" not in plain and "*:" not in plain and "stock:" not in plain


def test_columns_that_nothing_fills_are_left_out():
    dense = [r | {"expert_agreement": None, "expert_agreement_by_layer": []} for r in ROWS[:3]]
    text = audit_report.table(dense)
    assert "same experts" not in text and "KLD to itself" not in text and "same top-1" in text


def test_missing_figures_are_dashes():
    rows = [ROWS[0], ROWS[2] | {"kld": None, "loss_above": None, "loss_se": None, "kld_p99": float("nan")}]
    (line,) = lines_with(audit_report.table(rows), "  qat: q2_0")
    assert line.split()[2:6] == ["2.25", "4.0600", "-", "-"]
    assert "qat: KLD" not in audit_report.table(rows)


def test_nothing_measured():
    assert audit_report.table([]) == "nothing has been measured yet"
    assert audit_report.markdown([]) == "Nothing has been measured yet.\n"


def test_markdown_table():
    text = audit_report.markdown(ROWS)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].startswith(
        "| weights | format | bits | loss | above | KLD | KLD p99 | of it routing | KLD to itself |"
    )
    assert lines[1].count("---") == lines[0].count("|") - 1
    assert all(line.replace(r"\|", "").count("|") == lines[0].count("|") for line in lines)
    (qat,) = [line for line in lines if line.startswith("| **as deployed**")]
    assert "| **qat: q2_0** | **2.25** |" in qat
    assert r"| control, rounded to llama.cpp types | Q1_0 stock †2 \* | 1.125 |" in text
    assert "- †n: n rows of a matrix were joined" in text and text.endswith("\n")
    assert "KLD by text" not in text


def test_a_table_of_some_rows_has_the_headline_and_the_marks_of_all():
    some = {r["row"] for r in ROWS if r["group"] in ("control", "qat", "grid")}
    text, whole = audit_report.markdown(ROWS, some), audit_report.markdown(ROWS)
    assert text.splitlines()[0] == whole.splitlines()[0] and "(Q3_K stock †4)" in text
    body = [line for line in text.splitlines() if line.startswith("|")]
    assert len(body) == 2 + len(some)
    marked = [line for line in whole.splitlines() if r"q2_0 search \*" in line]
    assert len(marked) == 1 and sum(r"q2_0 search \*" in line for line in body) == 1


def test_markdown_escapes_names():
    rows = [r | {"branch": "a|b_*c", "row": "x"} for r in ROWS[:1]] + [ROWS[2] | {"branch": "_q_a_"}]
    text = audit_report.markdown(rows)
    assert r"a\|b\_\*c: f32" in text
    assert r"\_q_a\_: q2_0" in text
    assert "KL(reference \\|\\| row)" in text


def test_markdown_by_text():
    domains = {"novel": {"kld": 0.1, "kld_se": 0.01}, "co|de": {"kld": 0.5, "kld_se": None}}
    text = audit_report.markdown([r | {"domains": domains} for r in ROWS])
    table = text.split("KLD by text:\n\n")[1].splitlines()
    assert table[0] == r"| row | bits | novel | co\|de |"
    assert table[3] == "| qat | 2.25 | 0.1000 ±0.0100 | 0.5000 |"
    assert len(table) == 2 + 2 + 5  # trunk, qat and the frontier


# ---- picture ---------------------------------------------------------------------------------------------------------


def drawn(rows, tmp_path):
    audit_report.plot(rows, tmp_path / "audit.png")
    return matplotlib.image.imread(tmp_path / "audit.png")


def test_plot_is_drawn(tmp_path):
    picture = drawn(ROWS, tmp_path)
    assert picture.shape[0] > 1000 and picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ROWS[:1],
        ROWS[:3],
        PTQ,
        [r | {"kld_se": None, "expert_agreement_by_layer": [None, 0.5], "expert_agreement_by_layer_se": [None, None]}
         for r in ROWS],
    ],
    ids=["nothing", "control alone", "no roundings", "no QAT", "no errors"],
)  # fmt: skip
def test_plot_of_what_there_is(rows, tmp_path):
    assert drawn(rows, tmp_path).size


def panels(rows, monkeypatch, tmp_path):
    """The axes of the figure that was drawn, by title."""
    figures = []
    savefig = audit_report.Figure.savefig
    monkeypatch.setattr(audit_report.Figure, "savefig", lambda f, *a, **k: (figures.append(f), savefig(f, *a, **k)))
    audit_report.plot(rows, tmp_path / "audit.png")
    return {axes.get_title().split(":")[0]: axes for axes in figures[0].axes}


def test_panels_hold_what_they_should(monkeypatch, tmp_path):
    axes = panels(ROWS, monkeypatch, tmp_path)
    size, caches, experts = (
        axes["What rounding costs, and QAT"],
        axes["KV cache"],
        axes["Experts chosen as the reference chooses them"],
    )
    (edge,) = [line for line in size.lines if line.get_label() == "best rounding after training"]
    np.testing.assert_array_equal(edge.get_xdata(), [1.125, 2.25, 3.4375, 4.5, 8.5])
    np.testing.assert_array_equal(edge.get_ydata(), [1.5, 0.28, 0.05, 0.02, 0.0001])
    assert size.get_yscale() == "log"
    assert {t.get_text() for t in size.texts} == {
        "Q1_0", "q2_0", "Q2_K", "Q3_K", "Q4_0", "q4_0", "Q8_0", "qat (q2_0)",
    }  # fmt: skip
    names = caches.get_legend_handles_labels()[1]
    assert names == ["control, q8_0", "control, q4_0", "qat, q4_0"]
    own = caches.containers[2].lines[0]
    np.testing.assert_array_equal(own.get_ydata(), [0.008, 0.008])  # to itself, not to the control
    np.testing.assert_array_equal(own.get_xdata(), [32, 96])
    assert experts.get_legend_handles_labels()[1] == [
        "trunk: f32, 32 bits",
        "qat: q2_0, 2.25 bits",
        "control: q2_0 search, 2.25 bits",
        "control: Q3_K stock †4, 3.4375 bits",
    ]


def test_panels_say_what_was_not_measured(monkeypatch, tmp_path):
    dense = [r | {"expert_agreement_by_layer": []} for r in ROWS if r["group"] != "kv"]
    axes = panels(dense, monkeypatch, tmp_path)
    said = {title: [t.get_text() for t in a.texts] == ["not measured"] for title, a in axes.items()}
    assert list(said.values()) == [False, True, True]


def test_the_panel_of_experts_needs_a_branch(monkeypatch, tmp_path):
    axes = panels(PTQ, monkeypatch, tmp_path)["Experts chosen as the reference chooses them"]
    assert [t.get_text() for t in axes.texts] == ["no branch chosen"]


def test_labels_do_not_overlap(monkeypatch, tmp_path):
    """Forty formats, most of them within two bits of each other."""
    rng = np.random.default_rng(0)
    rows = [
        row(f"control/TYPE{i}_K/stock", "ggml", float(b), float(np.exp(-b + rng.normal() * 0.3)))
        for i, b in enumerate([*rng.uniform(2, 4.5, 30), *[4.5] * 6, 5.5, 6.5, 8.5, 1.1])
    ]
    size = panels(rows, monkeypatch, tmp_path)["What rounding costs, and QAT"]
    boxes = [Text.get_window_extent(t) for t in size.texts]  # without the line to the point
    assert len(boxes) == 40
    overlaps = sum(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert overlaps <= 1, overlaps


def test_unwritable_picture(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        audit_report.plot(ROWS, tmp_path / "none" / "audit.png")
