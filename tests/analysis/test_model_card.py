import yaml
from analysis.written_run import write_run

from knlightning.analysis.model_card import write_model_card
from knlightning.analysis.run_results import read_run


def test_metadata_are_those_that_the_hub_reads(tmp_path):
    card = write_model_card(read_run(write_run(tmp_path / "tiny" / "3")))
    _, head, text = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("knlightning", "image-classification")
    ((result,),) = [model["results"] for model in metadata["model-index"]]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.875}]
    assert result["dataset"] == {"name": "Digits", "type": "digits", "split": "test"}
    assert "| accuracy on the test images | 87.50 % |" in text
    assert "480 parameters" in text
    assert "## Privacy" not in text


def test_card_of_a_run_without_results(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {class_path: a.SegmentationB}\n")
    card = write_model_card(read_run(tmp_path))
    assert yaml.safe_load(card.split("---\n")[1])["pipeline_tag"] == "image-segmentation"
    assert "Not evaluated yet." in card
