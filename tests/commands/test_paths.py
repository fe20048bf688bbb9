from pathlib import Path

import pytest
from jsonargparse import Namespace

from knlightning.commands.paths import config_first, expand_paths, expanded


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("~/runs/x", "/home/me/runs/x"),
        ("~", "/home/me"),
        ("$SCRATCH/a", "/scratch/a"),
        ("${SCRATCH}2/a", "/scratch2/a"),
        ("a~b/c", "a~b/c"),
        ("price $5", "price $5"),
        ("", ""),
    ],
)
def test_tilde_and_variables(path, meant):
    assert expanded(path) == meant


def test_unknown_variables_and_users_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"\$NOWHERE/a: .* NOWHERE"):
        expanded("$NOWHERE/a")
    with pytest.raises(ValueError, match="no such user"):
        expanded("~nobody-of-this-name/a")
    (tmp_path / "$NOWHERE").mkdir()
    assert expanded("$NOWHERE") == "$NOWHERE"  # it is there


def test_paths_are_found_wherever_they_stand():
    callback = Namespace(class_path="a.B", init_args=Namespace(dirpath="~/d", monitor="~/no"))
    config = Namespace(
        run_dir="~/r",
        ckpt_path="last",
        seed=1,
        data=Namespace(init_args=Namespace(root=Path("$SCRATCH"), predict_dir=None, class_names=["~", "$NO"])),
        trainer=Namespace(callbacks=[callback, {"init_args": {"save_dir": "$SCRATCH/s"}}]),
        runs=["~/a", Path("b")],
    )
    expand_paths(config)
    assert config.run_dir == "/home/me/r"
    assert config.ckpt_path == "last"
    assert config.data.init_args.root == Path("/scratch")
    assert config.data.init_args.class_names == ["~", "$NO"]
    assert vars(callback.init_args) == {"dirpath": "/home/me/d", "monitor": "~/no"}
    assert config.trainer.callbacks[1] == {"init_args": {"save_dir": "/scratch/s"}}
    assert config.runs == ["/home/me/a", Path("b")]


def test_the_command_line_wins_wherever_it_stands():
    args = ["--a", "1", "--config", "x.yaml", "--b=2", "-c", "y.yaml", "--config=~/z.yaml", "--flag"]
    first = ["--config=x.yaml", "--config=y.yaml", "--config=/home/me/z.yaml"]
    assert config_first(args) == [*first, "--a", "1", "--b=2", "--flag"]
    assert config_first(["--a", "--config"]) == ["--a", "--config"]  # which the parser refuses
