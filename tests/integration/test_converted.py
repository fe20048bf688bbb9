"""A network of another package, converted by a line of the command line, through a run."""

import pytest
import torch
from commands.runs import column
from standins import PROJECT

from knlightning import load
from knlightning.commands.main import main
from knlightning.models import is_batch_independent


@pytest.mark.slow
def test_fit_resume_test_and_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = [f"--trainer.limit_{name}_batches=2" for name in ("train", "val", "test")]
    named = ["--model.backbone=knlightning.models.converted", "--model.backbone.name=timm/test_resnet.r160_in1k"]
    main(["fit", f"--config={PROJECT}/configs/digits_resnet8.yaml", *named, *few, "--trainer.max_epochs=1"])
    printed = capsys.readouterr().out
    assert "Network: timm/test_resnet.r160_in1k, " in printed
    assert "         Kernel normalized: " in printed
    run = tmp_path / "runs" / "digits_resnet8" / "0"
    config = f"--config={run}/config.yaml"
    main(["fit", config, "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert column(run, "epoch")[-1][1] == 1
    main(["test", config, "--ckpt_path=best"])
    main(["export", config, "--ckpt_path=best", "--to=out"])
    trained = load(run).network
    assert is_batch_independent(trained)
    assert trained(torch.rand(2, 3, 8, 8)).shape == (2, 10)  # as many classes as the data have
    torch.testing.assert_close(torch.load("out/weights.pt"), dict(trained.state_dict()))
