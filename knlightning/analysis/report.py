"""A run as one page: how it was trained, how good it is, where it is wrong, what it promises."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from knlightning.analysis.curves import SCORES
from knlightning.analysis.run_results import Evaluation, RunResults
from knlightning.callbacks.pictures import MOST_NAMED_CLASSES
from knlightning.pages import body_of, embedded, facts, page, table, text

NAMES = {
    "acc": "accuracy",
    "acc_top5": "top-5 accuracy",
    "f1_mean": "mean F1",
    "loss": "loss",
    "mean_acc": "mean accuracy of the classes",
    "miou": "mean IoU",
    "pixel_acc": "pixel accuracy",
    "precision_mean": "mean precision",
    "recall_mean": "mean recall",
}
"""Scores as people call them."""
DATA_OF = {"test": "the test images", "validate": "the validation images"}
COLOURS = {"train": "#9aa3b2", "val": "#3f51b5"}
MOST_ROWS = 100
"""Classes in the table; of more, those with the lowest F1 are shown."""


def said(name: str) -> str:
    """Name a score as people do."""
    return NAMES.get(name, name)


def shown(name: str, value: float) -> str:
    """Write a score: a loss as a number, what is a share in percent."""
    return f"{value:.4f}" if "loss" in name or not 0 <= value <= 1 else f"{100 * value:.2f} %"


def write_page(run: RunResults) -> str:
    """Write the page of a run.

    Returns:
        A page in HTML, with all its pictures.
    """
    settings = run.settings
    norm = f" with {settings['model.backbone.norm']} normalization" if "model.backbone.norm" in settings else ""
    parts = [
        f"<h1>{text(run.name)}</h1>",
        f'<p class="soft">{text(run.network)}{text(norm)}, trained on {text(settings.get("data", "data"))}</p>',
        facts(_facts(run)),
        _section("Training", _curves(run) + _settings(run)),
    ]
    if not run.evaluations:
        test = f"knl test --config {run.path}/config.yaml --ckpt_path best"
        parts.append(_section("Scores", f"<p>Nothing is evaluated yet: <code>{text(test)}</code></p>"))
    for evaluation in run.evaluations:
        parts += _evaluation(evaluation)
    if run.privacy:
        parts.append(_section("Privacy", f"<p>{text(run.privacy)}</p>"))
    whole = (
        f"<details><summary>The whole configuration</summary><pre>{text_block(run.text.splitlines())}</pre></details>"
    )
    parts += [_section("Use it", _use(run)), _section("Configuration", whole)]
    return page(f"Report of {run.name}", "\n".join(parts))


def text_block(lines: Sequence[str]) -> str:
    """Make lines from outside fit for a page."""
    return "\n".join(map(text, lines))


def _facts(run: RunResults) -> dict[str, str]:
    found: dict[str, str] = {}
    if run.evaluations:
        evaluation = run.evaluations[0]
        name = next((name for name in ("acc", "miou") if name in evaluation.scores), None)
        if name:
            found[f"{said(name)} on {DATA_OF[evaluation.stage]}"] = shown(name, evaluation.scores[name])
        error = evaluation.report.get("expected_calibration_error")
        if error is not None:
            found["expected calibration error"] = f"{error:.3f}"
    if run.best:
        found[f"best {run.best[0]}, in epoch {run.epoch}"] = shown(*run.best)
    if run.num_parameters:
        found["parameters"] = f"{run.num_parameters:,}"
    return found


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}\n</section>"


def _curves(run: RunResults) -> str:
    """Draw loss and score by epoch."""
    names = ["loss", *[name for name in SCORES if f"val/{name}" in run.metrics][:1]]
    names = [name for name in names if f"val/{name}" in run.metrics or f"train/{name}" in run.metrics]
    if not names:
        return '<p class="soft">There are no metrics by epoch.</p>'
    figure = Figure(figsize=(5.2 * len(names), 3.1), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for part, label in (("train", "training"), ("val", "validation")):
            points = dict(run.metrics.get(f"{part}/{name}", []))  # the last of each epoch
            if points:
                axes.plot(list(points), list(points.values()), color=COLOURS[part], linewidth=2, label=label)
        if run.checkpoint == "best":
            axes.axvline(run.epoch, color="#667080", linewidth=1, linestyle=":", label="best checkpoint")
        axes.set_title(said(name), fontsize=11, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    return png(figure)


def png(figure: Figure) -> str:
    """Embed a figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return embedded(file.getvalue())


def _settings(run: RunResults) -> str:
    """Write the settings that people ask for first."""
    wanted = {
        "network": "model.backbone",
        "normalization": "model.backbone.norm",
        "data": "data",
        "batch size": "data.batch_size",
        "scaling": "data.scaling",
        "optimizer": "model.optimizer",
        "learning rate": "model.optimizer.lr",
        "schedule": "model.lr_scheduler",
        "epochs": "trainer.max_epochs",
        "seed": "seed",
    }
    rows = [{"setting": name, "value": str(run.settings[key])} for name, key in wanted.items() if key in run.settings]
    half = -(-len(rows) // 2)
    sides = [f"<div>{table(part)}</div>" for part in (rows[:half], rows[half:]) if part]
    return f'<div class="pair top">{"".join(sides)}</div>'


def _evaluation(evaluation: Evaluation) -> list[str]:
    """Write scores, classes and mistakes of an evaluation."""
    report, folder = evaluation.report, evaluation.folder
    if checkpoint := report.get("checkpoint"):
        of = f"{Path(checkpoint['path']).name} of epoch {checkpoint['epoch']}, "
    else:
        of = "Weights before any training, "
    scores = [{"score": said(name), "value": shown(name, value)} for name, value in evaluation.scores.items()]
    files = [folder / name for name in ("confusion.png", "reliability.png")]
    pictures = "".join(embedded(file.read_bytes()) for file in files if file.is_file())
    if len(evaluation.classes) <= MOST_NAMED_CLASSES:  # of more, the confusion matrix is wide
        pictures = f'<div class="pair">{pictures}</div>'
    said_of = f'<p class="soft">{text(of)}{report["images"]:,} images, {text(report["date"][:10])}</p>'
    parts = [_section(f"Scores on {DATA_OF[evaluation.stage]}", said_of + table(scores) + pictures)]
    if evaluation.classes:
        parts.append(_section("Classes", _classes(evaluation.classes)))
    if (folder / "mistakes.html").is_file():
        body = body_of((folder / "mistakes.html").read_text(encoding="utf-8")).partition("</h1>")[2]
        parts.append(_section("Worst mistakes", body))
    return parts


def _classes(classes: Sequence[dict[str, str]]) -> str:
    note = ""
    if len(classes) > MOST_ROWS:
        note = f'<p class="soft">The {MOST_ROWS} of {len(classes):,} classes with the lowest F1.</p>'
        classes = sorted(classes, key=lambda row: float(row["f1"] or 2))[:MOST_ROWS]
    heads = {"f1": "F1", "iou": "IoU"}
    return note + table([{heads.get(key, key): _typed(key, value) for key, value in row.items()} for row in classes])


def _typed(key: str, value: str) -> int | float | str:
    if key == "class" or not value:  # a score that is not defined
        return value
    return int(value) if key == "support" else float(value)


def _use(run: RunResults) -> str:
    """Write how the network is used, from Python and from the command line."""
    checkpoint = run.checkpoint or "best"
    lines = (
        "import knlightning",
        "",
        f'model = knlightning.load("{run.path}")',
        'for prediction in model.predict("photos"):',
        "    print(prediction.label, prediction.probability)",
    )
    command = f"knl predict --config {run.path}/config.yaml --ckpt_path {checkpoint} --data.predict_dir photos"
    return f"<pre>{text_block(lines)}</pre><pre>{text(command)}</pre>"
