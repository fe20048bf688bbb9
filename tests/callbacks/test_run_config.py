import torch
from standins import RandomData, TinyNet, trainer

from knlightning.callbacks import RunConfig
from knlightning.checkpoint_files import stored_config
from knlightning.tasks import ClassificationTask


def test_file_and_checkpoint_hold_the_configuration(tmp_path):
    for text in ("a: 1\n", "a: 2\n"):  # the second run overwrites the file
        run = trainer(tmp_path, RunConfig(text, {"a": 1}), max_epochs=1)
        run.fit(ClassificationTask(TinyNet(3)), RandomData())
        assert (tmp_path / "config.yaml").read_text() == text
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert stored_config(torch.load(tmp_path / "a.ckpt", weights_only=True)) == {"a": 1}


def test_checkpoints_of_a_cluster_know_their_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert RunConfig("", {}).state_dict() == {"config": {}}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert stored_config({"callbacks": {"RunConfig": RunConfig("", {}).state_dict()}}, "job") == "7"
    for other in (None, {}, {"callbacks": 3}, {"callbacks": {"RunConfig": 3}}):
        assert stored_config(other) == stored_config(other, "job") == {}


def test_evaluation_writes_nothing(tmp_path):
    run = trainer(tmp_path, RunConfig("a: 1\n", {}))
    run.validate(ClassificationTask(TinyNet(3)), RandomData(), verbose=False)
    assert not (tmp_path / "config.yaml").exists()
