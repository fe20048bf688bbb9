import torch
from lightning.pytorch import Trainer
from standins import RandomData, TinyNet

from knlightning.callbacks import RunConfig
from knlightning.tasks import ClassificationTask


def test_file_and_checkpoint_hold_the_configuration(tmp_path):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    for text in ("a: 1\n", "a: 2\n"):  # the second run overwrites the file
        config = RunConfig(text, {"a": 1})
        run = Trainer(default_root_dir=tmp_path, callbacks=[config], enable_checkpointing=False, max_epochs=1, **quiet)
        run.fit(ClassificationTask(TinyNet(3)), RandomData())
        assert (tmp_path / "config.yaml").read_text() == text
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert RunConfig.stored_in(torch.load(tmp_path / "a.ckpt", weights_only=True)) == {"a": 1}
    assert RunConfig.stored_in({}) == {}


def test_checkpoints_of_a_cluster_know_their_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert RunConfig("", {}).state_dict() == {"config": {}}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert RunConfig.job_of({"callbacks": {"RunConfig": RunConfig("", {}).state_dict()}}) == "7"
    for other in ({}, {"callbacks": 3}, {"callbacks": {"RunConfig": 3}}):
        assert RunConfig.job_of(other) is None
        assert RunConfig.stored_in(other) == {}


def test_evaluation_writes_nothing(tmp_path):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    run = Trainer(default_root_dir=tmp_path, callbacks=[RunConfig("a: 1\n", {})], **quiet)
    run.validate(ClassificationTask(TinyNet(3)), RandomData(), verbose=False)
    assert not (tmp_path / "config.yaml").exists()
