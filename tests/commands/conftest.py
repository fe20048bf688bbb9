import shutil

import pytest
from standins import knl, tiny_config, write_config


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with tiny.yaml and one finished run of it, runs/tiny/0, and what fit printed."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder / "tiny.yaml", tiny_config() | {"pictures": {"every_n_epochs": 3}})
    process = knl("fit", "--config", config, cwd=folder)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return folder, output


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A folder with tiny.yaml alone."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "tiny.yaml", tiny_config())
    return tmp_path
