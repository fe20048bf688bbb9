"""The model card of a run: a README for the Hugging Face Hub, to be completed by hand."""

from typing import Any

import yaml

from knlightning import __version__
from knlightning.analysis.report import DATA_OF, said, shown
from knlightning.analysis.run_results import RunResults
from knlightning.text import printable

METRICS = {"acc": "accuracy", "miou": "mean_iou", "f1_mean": "f1"}
"""Scores as the Hub calls them."""


def write_model_card(run: RunResults) -> str:
    """Write the model card of a run.

    Returns:
        Markdown, with the metadata that the Hub reads at its head.
    """
    task = "image-segmentation" if "Segmentation" in str(run.settings.get("model")) else "image-classification"
    data = str(run.settings.get("data", "")).removesuffix("DataModule")
    head: dict[str, Any] = {
        "library_name": "knlightning",
        "pipeline_tag": task,
        "tags": ["kernel-normalization", "pytorch", "lightning"],
        "metrics": [
            METRICS[name] for evaluation in run.evaluations[:1] for name in evaluation.scores if name in METRICS
        ],
    }
    results = [
        {
            "task": {"type": task},
            "dataset": {"name": data, "type": data.lower(), "split": evaluation.stage},
            "metrics": [
                {"type": METRICS[name], "value": round(value, 6)}
                for name, value in evaluation.scores.items()
                if name in METRICS
            ],
        }
        for evaluation in run.evaluations
    ]
    if results:
        head["model-index"] = [{"name": run.name, "results": results}]
    norm = run.settings.get("model.backbone.norm")
    rows = [
        f"| {said(name)} on {DATA_OF[evaluation.stage]} | {shown(name, value)} |"
        for evaluation in run.evaluations
        for name, value in evaluation.scores.items()
    ]
    scores = ["| score | value |", "| --- | --- |", *rows] if rows else ["Not evaluated yet."]
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {run.name}",
        f"{run.network}{f' with {norm} normalization' if norm else ''}, {run.num_parameters:,} parameters, trained on"
        f" {data} with knlightning {__version__}.",
        "## Scores",
        "\n".join(scores),
        "## Use",
        f'```python\nimport knlightning\n\nmodel = knlightning.load("{run.checkpoint or "best"}.ckpt")\n'
        'print(model.predict("photo.jpg"))\n```',
        "## Training",
        "\n".join(f"- {key}: `{value}`" for key, value in run.settings.items()),
        *(["## Privacy", run.privacy] if run.privacy else []),
        "## Limits",
        "Say here what the network is for, on which images it was not tried, and whose images it was trained on.",
    ]
    return "\n\n".join("\n".join(map(printable, line.split("\n"))) for line in lines) + "\n"
