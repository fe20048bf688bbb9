import re

import pytest
from lightning.pytorch import Trainer

from knlightning.commands.early import OPTIONS, USAGES, check_early, print_help, trainer_arguments, unknown
from knlightning.commands.main import main


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        check_early("fit", list(args))
    assert stop.value.code == 2
    return capsys.readouterr().err.removeprefix("knl fit: error: ").rstrip()


@pytest.mark.parametrize("command", USAGES)
def test_every_option_of_the_parser_is_known(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help", "all"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    options = [found for line in lines for found in re.findall(r"^  (?:-\w \w+, )?--([\w.]+)", line)]
    assert len(options) > 50
    assert [option for option in options if unknown(option)] == []


def test_the_arguments_of_the_trainer_are_those_of_the_class():
    assert trainer_arguments() - {"self"} == set(Trainer.__init__.__wrapped__.__kwdefaults__)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--trainer.max_epoch", "3"], "there is no option trainer.max_epoch. Did you mean trainer.max_epochs?"),
        (["--trianer.max_epochs=3"], "there is no option trianer.max_epochs. Did you mean trainer.max_epochs?"),
        (["--dta.root", "x"], "there is no option dta.root. Did you mean data.root?"),
        (["--max_epochs", "3"], "there is no option max_epochs. Did you mean trainer.max_epochs?"),
        (["--ckptpath", "3"], "there is no option ckptpath. Did you mean ckpt_path?"),
        (
            ["--batch_size", "3"],
            "there is no option batch_size. Arguments of model, data and trainer are named as in data.batch_size.",
        ),
        (["--config", "tinny.yaml"], "--config tinny.yaml: there is no such file. Did you mean tiny.yaml?"),
        (["--config=tiny"], "--config tiny: there is no such file. Did you mean tiny.yaml?"),
        (["--config=elsewhere.yaml"], "--config elsewhere.yaml: there is no such file."),
        (["--config", "."], "--config .: this is a folder."),
        (["--config", "run"], "--config run: this is a folder. Did you mean run/config.yaml?"),
        (["tiny.yaml"], "--config stands before tiny.yaml: knl fit --config FILE [--key value ...]"),
        ([], "there is no configuration, which has a model and data: knl fit --config FILE [--key value ...]"),
    ],
)
def test_what_does_not_exist_is_told(empty, capsys, args, said):
    (empty / "run").mkdir()
    (empty / "run" / "config.yaml").touch()
    assert refused(capsys, *args) == said


@pytest.mark.parametrize(
    ("text", "name"), [("trainer:\n  max_epoch: 3\n", "trainer.max_epoch"), ("modl: null\n", "modl"), ("1: 2\n", "1")]
)
def test_keys_of_files_are_looked_at(tmp_path, capsys, text, name):
    (file := tmp_path / "a.yaml").write_text(text)
    assert refused(capsys, "--config", str(file)).startswith(f"{file}: there is no option {name}.")


@pytest.mark.parametrize("text", ["", "3", "[", "a: &a [*a]", "[" * 3000, "trainer: null\n", "trainer.max_epochs: 3"])
def test_what_may_be_right_is_left_to_the_parser(tmp_path, capsys, text):
    (tmp_path / "a.yaml").write_text(text if text != "a: &a [*a]" else "model: &a [*a]")
    check_early("fit", ["--config", "{}", "-c", "$HERE/a.yaml", "-c", "/dev/null"])
    parts = [
        "--trainer.callbacks+=EMA",
        "--model.a.b",
        "--data",
        "x",
        "--trainer",
        "{}",
        "--trainer.logger.x=1",
        "--",
        "-1",
    ]
    check_early("fit", [f"--config={tmp_path / 'a.yaml'}", *parts])
    check_early("export", ["--to", "x"])


def test_the_help_names_every_option(capsys):
    print_help("fit", "Train.")
    printed = capsys.readouterr().out
    assert all(f"  --{name} " in printed for name in (*OPTIONS, "best_checkpoint", "predictions"))
