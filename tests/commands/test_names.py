import pytest

from knlightning.commands.names import complete_class_paths, complete_names

PATH = "knlightning.data.DigitsDataModule"


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        (["--data", "DigitsDataModule"], ["--data", PATH]),
        (["--data=DigitsDataModule"], [f"--data={PATH}"]),
        (["--data.help", "DigitsDataModule", "--x"], ["--data.help", PATH, "--x"]),
        (["--data.help"], ["--data.help"]),
        (["--model.backbone", "knresnet18"], ["--model.backbone", "knlightning.models.knresnet18"]),
        (["--model.init_args.backbone=resnet8"], ["--model.init_args.backbone=knlightning.models.resnet8"]),
        (["--trainer.callbacks+", "EMA"], ["--trainer.callbacks+", "knlightning.callbacks.EMA"]),
        (["--run_dir", "resnet8"], ["--run_dir", "resnet8"]),
        (["--data", "mine.Data"], ["--data", "mine.Data"]),
        (["--data", "data.yaml"], ["--data", "data.yaml"]),
        (["--trainer.callbacks", "ModelSummary"], ["--trainer.callbacks", "ModelSummary"]),
        (["--model.optimizer", "SGD"], ["--model.optimizer", "SGD"]),
    ],
)
def test_names_on_a_command_line(given, completed):
    assert complete_names(given) == completed


def test_a_name_that_is_mistyped_is_refused_with_the_right_one():
    with pytest.raises(ValueError, match=r"--model\.backbone: there is no knresnet188\. Did you mean knresnet18\?"):
        complete_names(["--model.backbone", "knresnet188"])


def test_names_in_a_configuration_file():
    config = {"model": {"class_path": "ClassificationTask", "init_args": {"backbone": {"class_path": "resnet8"}}}}
    assert complete_class_paths([config, 3]) == [config, 3]
    assert config["model"]["class_path"] == "knlightning.tasks.ClassificationTask"
    assert config["model"]["init_args"]["backbone"]["class_path"] == "knlightning.models.resnet8"
