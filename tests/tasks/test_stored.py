import pytest
from standins import tiny_config

from knlightning.data import DigitsDataModule
from knlightning.tasks import ClassificationTask
from knlightning.tasks.stored import make_arguments, make_datamodule, task_class


def test_objects_are_made_as_the_configuration_says():
    config = tiny_config()
    assert task_class(config) is ClassificationTask
    arguments = make_arguments(ClassificationTask, config)
    assert type(arguments["backbone"]).__name__ == "TinyNet"
    assert arguments["label_smoothing"] == 0
    data = make_datamodule(config)
    assert (type(data), data.batch_size) == (DigitsDataModule, 64)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("class_path", "os.system", "names no task, but 'os.system'"),
        ("class_path", "", "names no task"),
        ("init_args", {"nothing": 1}, "does not fit the installed packages.*nothing"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(key, value, said):
    config = tiny_config()
    config["model"][key] = value
    with pytest.raises(ValueError, match=said):
        make_arguments(ClassificationTask, config)
