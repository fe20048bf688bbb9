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
        (["--trainer.callbacks", "Timer"], ["--trainer.callbacks", "lightning.pytorch.callbacks.Timer"]),
        (["--model.optimizer", "SGD"], ["--model.optimizer", "torch.optim.SGD"]),
        (["--model.lr_scheduler=StepLR"], ["--model.lr_scheduler=torch.optim.lr_scheduler.StepLR"]),
        (["--model.optimizer", "Lion"], ["--model.optimizer", "Lion"]),
    ],
)
def test_names_on_a_command_line(given, completed):
    assert complete_names(given) == completed


@pytest.mark.parametrize(
    ("key", "given", "meant"),
    [("model.backbone", "knresnet188", "knresnet18"), ("model.optimizer", "Adm", "Adam")],
)
def test_a_name_that_is_mistyped_is_refused_with_the_right_one(key, given, meant):
    with pytest.raises(ValueError, match=rf"--{key}: there is no {given}\. Did you mean {meant}\?"):
        complete_names([f"--{key}", given])


def test_names_in_a_configuration_file():
    config = {"model": {"class_path": "ClassificationTask", "init_args": {"backbone": {"class_path": "resnet8"}}}}
    assert complete_class_paths([config, 3]) == [config, 3]
    assert config["model"]["class_path"] == "knlightning.tasks.ClassificationTask"
    assert config["model"]["init_args"]["backbone"]["class_path"] == "knlightning.models.resnet8"
