import pytest
from jsonargparse import ActionConfigFile

from knlightning.commands.parser import RunArgumentParser


@pytest.fixture
def parse(tmp_path, monkeypatch):
    (tmp_path / "runs" / "copy" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "copy" / "config.yaml").write_text("run_dir: runs/original\na: 1\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.yaml").write_text("config: ../runs/copy/config.yaml\na: 2\n")
    (tmp_path / "add.yaml").write_text("a: 3\n")
    monkeypatch.chdir(tmp_path)
    parser = RunArgumentParser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--run_dir", type=str | None)
    parser.add_argument("--a", type=int)

    def parsed(*args):
        config = parser.parse_args(list(args))
        return config.run_dir, config.a

    return parsed


def test_the_configuration_of_a_run_means_the_folder_it_lies_in(parse, tmp_path):
    assert parse("--config=runs/copy/config.yaml") == ("runs/copy", 1)
    assert parse("--config=runs/copy/config.yaml", "--config=add.yaml") == ("runs/copy", 3)
    assert parse("--config=runs/copy/config.yaml", "--run_dir=new") == ("new", 1)
    assert parse("--config=add.yaml") == (None, 3)
    assert parse(f"--config={tmp_path}/runs/copy/config.yaml") == (str(tmp_path / "runs/copy"), 1)


def test_so_it_does_within_another_configuration(parse, tmp_path):
    run, a = parse("--config=more/b.yaml")
    assert a == 2
    assert run is not None
    assert (tmp_path / run).resolve() == tmp_path / "runs" / "copy"
