import pytest
import yaml
from commands.runs import refused
from standins import tiny_config, write_config

from knlightning.commands.main import run
from knlightning.commands.yaml_text import DEEPEST, MOST_ALIASED, load_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {}\nmodel: {}\ntrainer: {}\n", "the key trainer stands twice, in line 1 and in line 3"),
        ("a:\n  b:\n    - c: 1\n      c: 1\n", r"the key a.b\[0\].c stands twice, in line 3 and in line 4"),
        ("a: {b: 1, b: 2}", "the key a.b stands twice"),
        ("a: 1\n'a': 2", "the key a stands twice"),
        ("? [1, 2]\n: 3", "line 1 is not a word"),
        (BOMB, f"stand for more than {MOST_ALIASED} values"),
        ("a: &a [*a]", f"deeper than {DEEPEST}"),
        ("a: " + "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), f"deeper than {DEEPEST}"),
        ("a: " + "[" * 100_000, "nesting"),
        ("a: [", "line 2"),
        ("a: !!python/name:os.system", "python/name"),
    ],
)
def test_refused_with_the_file(text, said):
    with pytest.raises(yaml.YAMLError, match=said) as error:
        load_yaml(text, "some.yaml")
    assert "/some.yaml: " in str(error.value)
    with pytest.raises(yaml.YAMLError, match=said) as error:
        load_yaml(text)
    assert "some.yaml" not in str(error.value)


@pytest.mark.parametrize("text", ["", "3", "- 3"])
def test_files_need_keys_and_values_do_not(text):
    with pytest.raises(yaml.YAMLError, match="has keys with values"):
        load_yaml(text, "some.yaml")
    load_yaml(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &a {b: 1}\nc: {<<: *a, b: 2}\nd: *a\n", {"a": {"b": 1}, "c": {"b": 2}, "d": {"b": 1}}),
        ("a: {b: 1}\na.b: 2\n", {"a": {"b": 1}, "a.b": 2}),
        ("a: 1e-3\nb: .inf\nc: 2001-01-01\n", {"a": 1e-3, "b": float("inf"), "c": "2001-01-01"}),
        ("[" + "1," * 10 * MOST_ALIASED + "]", [1] * 10 * MOST_ALIASED),
        ("{a}", "{a}"),
    ],
)
def test_the_rest_is_read_as_jsonargparse_does(text, value):
    assert load_yaml(text) == value


def test_a_second_trainer_in_a_file_is_refused(empty, capsys):
    text = yaml.safe_dump(tiny_config()) + "trainer: {max_epochs: 1}\n"
    (empty / "tiny.yaml").write_text(text)
    message = refused(capsys, "fit", "--config", "tiny.yaml")
    assert f"{empty}/tiny.yaml: the key trainer stands twice" in message
    (empty / "tiny.yaml").write_text("seeds: 3\nseeds: 4\n")
    assert "the key seeds stands twice" in refused(capsys, "curves", "--config", "tiny.yaml")


def test_an_alias_bomb_ends_at_once(empty, capsys):
    (empty / "tiny.yaml").write_text(BOMB)
    assert "aliases" in refused(capsys, "doctor", "--config", "tiny.yaml")


@pytest.mark.parametrize("command", ["fit", "curves"])
def test_files_that_are_not_text_are_named(empty, capsys, command):
    (empty / "tiny.yaml").write_bytes(b"a: \xff\n")
    assert "tiny.yaml is not text in UTF-8" in refused(capsys, command, "--config", "tiny.yaml")


@pytest.mark.parametrize("value", [True, [], -1, float("nan"), {}])
def test_paths_are_text(empty, capsys, value):
    config = tiny_config()
    config["data"]["init_args"]["predict_dir"] = value
    write_config(empty / "tiny.yaml", config)
    message = refused(capsys, "fit", "--config", "tiny.yaml")
    assert "error: data.init_args.predict_dir must be one of str, PathLike[str], null; got " in message
    assert "needs quotes" in message


@pytest.mark.parametrize("value", ["true", "2024"])
def test_names_of_folders_in_quotes_may_be_anything(empty, value):
    config = tiny_config(fast_dev_run=True)
    config["data"]["init_args"]["predict_dir"] = value
    write_config(empty / "tiny.yaml", config)
    assert run(["fit", "--config", "tiny.yaml"]).datamodule.predict_dir == value


def test_names_of_folders_on_the_command_line_need_no_quotes(empty):
    write_config(empty / "tiny.yaml", tiny_config(fast_dev_run=True))
    assert run(["fit", "--config", "tiny.yaml", "--data.predict_dir", "2024"]).datamodule.predict_dir == "2024"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--trainer.max_epochs", "abc"], "trainer.max_epochs must be one of int, null; got abc"),
        (["--best_checkpoint.mode", "x"], "best_checkpoint.mode must be one of 'auto', 'min', 'max'; got x"),
        (["--data.batch_size", "x"], "data.init_args.batch_size must be int; got x"),
        (["--model.norm_weight_decay", "x"], "model.init_args.norm_weight_decay must be one of float, null; got x"),
        (["--model.optimizer.lr", "x"], "model.init_args.optimizer.init_args.lr must be one of float, Tensor; got x"),
        (["--model.lr_scheduler.final", "x"], "model.init_args.lr_scheduler.init_args.final must be float; got x"),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.patience=x"], "patience must be int; got x"),
        (["--trainer.callbacks", "5"], "trainer.callbacks must be one of list[Callback], Callback, null; got 5"),
        (["--model.optimizer", "3"], "model.init_args.optimizer: Expected a dot import path string: 3"),
        (["--model", "no.Task"], "model: class_path 'no.Task': No module named 'no'"),
    ],
)
def test_a_value_that_does_not_fit_is_told_in_one_line(empty, capsys, args, said):
    (line,) = [
        line for line in refused(capsys, "fit", "--config", "tiny.yaml", *args).splitlines() if "error: " in line
    ]
    assert line.endswith(said)
