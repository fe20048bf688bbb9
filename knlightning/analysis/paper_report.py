"""What was found of the paper: each result beside the published one, with a verdict, as a page."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import ttest_ind_from_stats

from knlightning.analysis.curves import read_metrics, score_of
from knlightning.analysis.paper import MEMORY, SCALING, TIMES, TITLES, Row
from knlightning.analysis.search import mean_and_sd
from knlightning.analysis.settings import DROPOUT
from knlightning.pages import embedded, facts, page, table, text

PUBLISHED_RUNS = 3
"""Runs behind a published standard deviation."""
LEVEL = 0.05
"""Level of the tests behind the verdicts."""
REPRODUCED, NOT, NOT_COMPARABLE = "reproduced", "not reproduced", "not comparable"
SECTIONS: dict[str, str] = {
    **{key: TITLES[key] for key in ("1", "2", "3", "4")},
    "5": "Table 5: the best learning rates of Table 1, by search",
    "6": "Table 6: time of a training step and of inference, relative to batch normalization from primitives",
    "7": "Table 7: memory of a training step, relative to batch normalization from primitives",
    "8": "Table 8: time and memory of inference of four KNConv layers, relative to stride 1 and 32x32",
    "figure 4": "Figure 4: kernel normalized networks converge faster",
    "figure 7": "Figure 7: kernel normalized networks have the flattest loss, then those with batch normalization",
    **{key: TITLES[key] for key in ("ablation", "cifar10", "convnext")},
}
PICTURES: dict[str, tuple[tuple[str, str], ...]] = {
    "8": (("table8/table8.png", "Time and memory against resolution and stride."),),
    "figure 4": (
        (
            "figure4.png",
            "Validation accuracy by epoch, mean and a band of one SD over the seeds. The published figure shows such"
            " curves; its networks are not named in the text, and here are those of 18 layers.",
        ),
    ),
    "figure 7": (
        ("landscape/surfaces.png", "Loss around the weights, as in the published figure; all on one scale."),
        ("landscape/contours.png", "The same as contours."),
    ),
}
NOTES = {
    "6": "The paper compares with batch normalization from primitives of PyTorch. Ours: KNConv of knlightning, then"
    " Algorithm 1 as published.",
    "7": "Ours: KNConv of knlightning, then Algorithm 1 as published. On a CPU a peak is the growth of the process,"
    " which for small networks says little.",
    "figure 4": "The number is the mean of the validation accuracy over all epochs: the faster, the higher.",
    "figure 7": "The number is the rise of the loss, from the minimum to the mean in a ball around it; then the largest"
    " eigenvalue of the Hessian, with the filters' norms as units. Batch normalization uses its running statistics, as"
    " in the code of Li et al., which can make it look sharper than it is.",
}


@dataclass(frozen=True)
class Finding:
    """A result beside the published one.

    Attributes:
        section: Key in `SECTIONS`.
        labels: What tells it from the others of the section.
        published: The published value.
        ours: What was found, with the number of runs.
        difference: Ours minus the published value.
        verdict: Whether that is the same.
        command: What finds it again.
        seconds: How long that took.
    """

    section: str
    labels: dict[str, str]
    published: str
    ours: str
    difference: str
    verdict: str
    command: str
    seconds: float = 0.0


def labels_of(row: Row) -> dict[str, str]:
    """Tell a row from the others of its table."""
    dropout = {} if DROPOUT not in row.settings else {"dropout": str(row.settings[DROPOUT])}
    return {"network": row.backbone, "norm": row.norm, "batch size": str(row.batch_size), **dropout}


def compare_scores(
    section: str, row: Row, runs: Sequence[Sequence[float]], command: str, seconds: float, obstacle: str
) -> Finding:
    """Compare scores with the published ones.

    Args:
        section: Where it belongs.
        row: The published result.
        runs: Of each run all scores in %, as in `Row.published`.
        command: What trains for it.
        seconds: How long that took.
        obstacle: Why ours cannot be compared; "" if they can.
    """
    published = ((row.accuracy, row.sd), *row.further)
    differences, verdicts = [], []
    for (mean, sd), values in zip(published, zip(*runs, strict=True), strict=True):
        difference = statistics.mean(values) - mean
        in_sd = f" ({difference / sd:+.1f} SD)" if sd else ""
        differences.append(f"{difference:+.2f}{in_sd}")
        verdicts.append(_same(mean, sd, values))
    verdict = next((found for found in verdicts if found.startswith(NOT)), verdicts[0])
    return Finding(
        section,
        labels_of(row),
        row.published,
        f"{' / '.join(mean_and_sd(values) for values in zip(*runs, strict=True))} ({len(runs)})",
        " / ".join(differences),
        f"{NOT_COMPARABLE}: {obstacle}" if obstacle else verdict,
        command,
        seconds,
    )


def _same(mean: float, sd: float | None, values: Sequence[float]) -> str:
    """Ask a t-test; a published value without a deviation is one more run."""
    count = 1 if sd is None else PUBLISHED_RUNS
    if count + len(values) < 3:
        return f"{NOT_COMPARABLE}: a single run each"
    ours = statistics.stdev(values) if len(values) > 1 else 0.0
    found = ttest_ind_from_stats(mean, sd or 0.0, count, statistics.mean(values), ours, len(values))
    higher = statistics.mean(values) > mean
    return f"{NOT}: {'higher' if higher else 'lower'}" if found.pvalue < LEVEL else REPRODUCED


def compare_learning_rates(row: Row, found: float, command: str, seconds: float, obstacle: str) -> Finding:
    """Compare the best learning rate of a search with the published one; arguments as in `compare_scores`."""
    ratio = found / row.learning_rate
    verdict = f"{NOT_COMPARABLE}: {obstacle}" if obstacle else REPRODUCED if abs(ratio - 1) < 0.01 else NOT
    published = f"{row.learning_rate:g}"
    return Finding("5", labels_of(row), published, f"{found:g}", f"{ratio:.3g} times", verdict, command, seconds)


def compare_convergence(
    title: str, lines: Mapping[str, Sequence[Path]], kernel: str, command: str, obstacle: str
) -> Finding:
    """Compare how fast networks converge.

    Args:
        title: The panel of the figure.
        lines: Directories of the runs of each network.
        kernel: Name of the kernel normalized network among them.
        command: What trains for it.
        obstacle: As in `compare_scores`.
    """
    score = score_of([run for runs in lines.values() for run in runs])
    means = {
        name: [100 * statistics.mean(value for _, value in read_metrics(run)[f"val/{score}"]) for run in runs]
        for name, runs in lines.items()
    }
    order = sorted(means, key=lambda name: -statistics.mean(means[name]))
    second = next(name for name in order if name != kernel)
    ours, other = (
        (statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))
        for found in (means[kernel], means[second])
    )
    if obstacle or len(means[kernel]) + len(means[second]) < 3:
        verdict = f"{NOT_COMPARABLE}: {obstacle or 'a single run each'}"
    elif order[0] != kernel:
        verdict = NOT
    else:
        certain = ttest_ind_from_stats(*ours, *other, alternative="greater").pvalue < LEVEL
        verdict = REPRODUCED if certain else f"{NOT}: ahead, but it may be chance"
    shown = "; ".join(f"{name} {mean_and_sd(means[name])} ({len(means[name])})" for name in order)
    return Finding(
        "figure 4", {"panel": title}, f"{kernel} first", shown, f"{ours[0] - other[0]:+.2f}", verdict, command
    )


def compare_landscapes(results: Mapping[str, Mapping[str, Any]], command: str, obstacle: str) -> list[Finding]:
    """Compare how flat the loss is.

    Args:
        results: What `knl landscape` has found of the normalizations layer, group, batch and kernel, by their names.
        command: What finds it again.
        obstacle: As in `compare_scores`.
    """
    rises = {norm: statistics.mean(result["ball"]) - result["loss"] for norm, result in results.items()}
    order = sorted(rises, key=lambda norm: rises[norm])
    published = {"kernel": (1,), "batch": (2,), "group": (3, 4), "layer": (3, 4)}
    found = []
    for place, norm in enumerate(order, 1):
        verdict = REPRODUCED if place in published[norm] else NOT
        verdict = f"{NOT_COMPARABLE}: {obstacle}" if obstacle else verdict
        ours = f"{place}: {rises[norm]:.3g}; {results[norm]['eigenvalues'][1]:.4g}"
        ranks = " or ".join(map(str, published[norm]))
        found.append(Finding("figure 7", {"norm": norm}, ranks, ours, "", verdict, command))
    return found


def compare_network_costs(rows: Sequence[Mapping[str, Any]], machine: str, command: str) -> list[Finding]:
    """Compare what `knl benchmark` has measured, relative to batch normalization from primitives, with Tables 6, 7."""
    by_variant = {(row["network"], row["variant"]): row for row in rows}
    found = []
    for depth in TIMES:
        kernel, published, batch = (
            by_variant[f"resnet{depth}", variant] for variant in ("kernel", "algorithm1", "batch-primitives")
        )
        labels = {"network": f"KNResNet-{depth}", "images": f"{kernel['resolution']}x{kernel['resolution']}"}
        times, memory = TIMES[depth], MEMORY[depth]
        train, test = (times["kernel"][i] / times["batch-primitives"][i] for i in (0, 1))
        shares = {
            "6": (f"{train:.2f} / {test:.2f}", ("step_ms", "evaluation_ms")),
            "7": (f"{memory['kernel'] / memory['batch-primitives']:.2f}", ("step_peak",)),
        }
        for section, (known, measures) in shares.items():
            ours = f"{_ratios(kernel, batch, *measures)}; {_ratios(published, batch, *measures)}"
            found.append(Finding(section, labels, known, ours, "", _elsewhere(machine), command))
    return found


def compare_layer_costs(rows: Sequence[Mapping[str, Any]], machine: str, command: str) -> list[Finding]:
    """Compare time and memory of layers, relative to those at stride 1 on images of 32x32, with Table 8."""
    by_case = {(row["stride"], row["resolution"]): row for row in rows if row["variant"] == "kernel"}
    found = []
    for (stride, size), row in by_case.items():
        known = [a / b for a, b in zip(SCALING[stride][size], SCALING[1][32], strict=True)]
        labels = {"stride": str(stride), "images": f"{size}x{size}"}
        ours = _ratios(row, by_case[1, 32], "evaluation_ms", "evaluation_peak")
        shown = " / ".join(f"{share:.2f}" for share in known)
        found.append(Finding("8", labels, shown, ours, "", _elsewhere(machine), command))
    return found


def _ratios(row: Mapping[str, Any], base: Mapping[str, Any], *measures: str) -> str:
    shares = [row[key] / base[key] if row[key] and base[key] else None for key in measures]
    return " / ".join("-" if share is None else f"{share:.2f}" for share in shares)


def _elsewhere(machine: str) -> str:
    return f"{NOT_COMPARABLE}: another machine, {machine}"


def write_markdown(findings: Sequence[Finding], about: Mapping[str, str], out: Path) -> str:
    """Write the report in Markdown.

    Args:
        findings: What was found so far.
        about: What holds for all of it, such as versions.
        out: Directory of the report, in which the pictures lie.
    """
    lines = ["# The paper, reproduced", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    for title, note, rows, pictures in _sections(findings, out):
        lines += [f"## {title}", "", *([note, ""] if note else [])]
        lines += ["| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
        lines += ["| " + " | ".join(f"`{v}`" if k == "command" else v for k, v in row.items()) + " |" for row in rows]
        lines += [f"\n![{caption}]({name})\n\n{caption}" for name, caption in pictures]
        lines.append("")
    return "\n".join(lines)


def write_html(findings: Sequence[Finding], about: Mapping[str, str], out: Path) -> str:
    """Write the report as a page with all its pictures; arguments as in `write_markdown`."""
    verdicts = [finding.verdict.partition(":")[0] for finding in findings]
    counts = {name: str(verdicts.count(name)) for name in (REPRODUCED, NOT, NOT_COMPARABLE)}
    parts = ["<h1>The paper, reproduced</h1>", facts(counts)]
    parts.append(f"<section>{table([{'of all': name, 'value': value} for name, value in about.items()])}</section>")
    for title, note, rows, pictures in _sections(findings, out):
        shown = "".join(
            f'{embedded((out / name).read_bytes())}<p class="soft">{text(caption)}</p>' for name, caption in pictures
        )
        commands = "\n".join(dict.fromkeys(row["command"] for row in rows))
        cells = [{key: value for key, value in row.items() if key != "command"} for row in rows]
        details = f"<details><summary>Commands</summary><pre>{text(commands)}</pre></details>"
        shown = f"<h2>{text(title)}</h2><p>{text(note)}</p>{table(cells)}{shown}{details}"
        parts.append(f'<section class="words">{shown}</section>')
    return page("The paper, reproduced", "\n".join(parts))


def _sections(
    findings: Sequence[Finding], out: Path
) -> Iterator[tuple[str, str, list[dict[str, str]], list[tuple[str, str]]]]:
    """Order what was found: title, note, rows of a table with the same keys, and pictures of each section."""
    for section, title in SECTIONS.items():
        mine = [finding for finding in findings if finding.section == section]
        labels = dict.fromkeys(label for finding in mine for label in finding.labels)
        rows = [
            {
                **{label: finding.labels.get(label, "") for label in labels},
                "published": finding.published,
                "ours (runs)": finding.ours,
                "difference": finding.difference,
                "verdict": finding.verdict,
                "minutes": f"{finding.seconds / 60:.1f}" if finding.seconds else "",
                "command": finding.command,
            }
            for finding in mine
        ]
        if rows:
            kept = [key for key in rows[0] if any(row[key] for row in rows)]
            pictures = [picture for picture in PICTURES.get(section, ()) if (out / picture[0]).is_file()]
            yield title, NOTES.get(section, ""), [{key: row[key] for key in kept} for row in rows], pictures
