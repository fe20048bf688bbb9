"""Private runs as users start them: two processes, kill -9, and what an attacker can tell of a trained network."""

import json
import math
import random
from contextlib import nullcontext

import pytest
import torch
from integration.test_kill import kill_at_some_moment
from scipy import stats
from standins import TWO, assert_same_weights, finished, knl, tiny_config, trainer, weights, write_config
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from knlightning.privacy import DifferentialPrivacy
from knlightning.privacy.accounting import epsilon
from knlightning.tasks import ClassificationTask

FEW = ["--trainer.limit_train_batches", "3", "--trainer.precision", "64-true"]  # rounding grows with every step


def private_config(batch_size=64, epochs=2, callbacks=(), **settings):
    config = tiny_config(max_epochs=epochs, limit_val_batches=1)
    config["model"]["init_args"]["backbone"] = {
        "class_path": "knlightning.models.knresnet8",
        "init_args": {"low_resolution": False, "dropout_p": 0.0},
    }
    config["model"]["init_args"]["lr_scheduler"] = None
    config["data"]["init_args"].update(batch_size=batch_size, augment=False)
    config["pictures"] = {"every_n_epochs": 0}
    settings = {"noise_multiplier": 1.0, "target_delta": 1e-4, "accountant": "rdp", "seed": 3} | settings
    private = {"class_path": "knlightning.privacy.DifferentialPrivacy", "init_args": settings}
    config["trainer"]["callbacks"] = [private, *callbacks]
    return config


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    """The same samples, the noise once, the same accounting; evaluation is not private and counts every image once."""
    write_config(tmp_path / "one.yaml", private_config(64, physical_batch_size=16))
    write_config(tmp_path / "two.yaml", private_config(32, physical_batch_size=16))
    output = finished(knl("fit", "--config", "one.yaml", "--run_dir", "one", *FEW, cwd=tmp_path))
    assert "Privacy:    epsilon" in output
    output = finished(knl("fit", "--config", "two.yaml", "--run_dir", "two", *FEW, *TWO, cwd=tmp_path))
    assert output.count("Privacy:    epsilon") == 1
    one, two = (weights(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)
    reports = [json.loads((tmp_path / run / "privacy.json").read_text()) for run in ("one", "two")]
    starts = [report.pop("segments")[0][0] for report in reports]
    assert reports[0] == reports[1]
    assert starts[0] != starts[1]
    assert reports[0]["history"] == [[1.0, 64 / 1437, 6]]
    assert reports[0]["epsilon"] == epsilon([(1.0, 64 / 1437, 6)], 1e-4, "rdp")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 3], ids=["secret", "seeded"])
def test_killed_private_run_has_spent_what_a_whole_one_has(tmp_path, seed):
    config = private_config(epochs=5, seed=seed, target_epsilon=6.0, noise_multiplier=None)
    config["last_checkpoint"] = {"every_n_steps": 4}
    write_config(tmp_path / "a.yaml", config)
    finished(knl("fit", "--config", "a.yaml", "--run_dir", "whole", cwd=tmp_path))
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    for resume in ([], ["--ckpt_path", "last"]):
        process = knl("fit", "--config", "a.yaml", "--run_dir", "killed", *resume, cwd=tmp_path)
        kill_at_some_moment(process, last, random.Random())
        process.communicate()
    finished(knl("fit", "--config", "a.yaml", "--run_dir", "killed", "--ckpt_path", "last", cwd=tmp_path))
    whole, killed = (json.loads((tmp_path / run / "privacy.json").read_text()) for run in ("whole", "killed"))
    assert killed["epsilon"] == whole["epsilon"] <= 6.0
    assert killed["history"] == whole["history"] == [[whole["plan"]["noise_multiplier"], 64 / 1437, 110]]
    with nullcontext() if seed else pytest.raises(AssertionError, match="differ in"):  # secret noise is drawn anew
        assert_same_weights(last, tmp_path / "whole" / "checkpoints" / "last.ckpt")


def guesses(tmp_path, noise, runs):
    """Train with a canary in every other run; guess from its loss in which, by the median."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 4, 4, generator=generator)
    labels = (images.mean((1, 2, 3)) > 0.5).long()
    images[:, 0] = 0.0  # the weights of this channel are the canary's alone
    canary = torch.zeros(1, 3, 4, 4)
    canary[:, 0] = 1.0
    losses = []
    for run in range(runs):
        member = run % 2 == 0
        # in the other runs the canary's place is empty: a sample that is not finite contributes nothing
        extra = canary if member else torch.full_like(canary, math.nan)
        data = TensorDataset(torch.cat((images, extra)), torch.cat((labels, torch.tensor([1]))))
        torch.manual_seed(0)
        module = ClassificationTask(
            nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False)), optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
        )
        private = DifferentialPrivacy(noise_multiplier=noise, target_delta=1e-3, accountant="rdp", check=False)
        loader = torch.utils.data.DataLoader(data, 20)
        module.validation_step = None
        trainer(tmp_path, private, max_epochs=4).fit(module, loader)
        with torch.no_grad():
            losses.append(F.cross_entropy(module.backbone(canary), torch.tensor([1])).item())
    order = torch.tensor(losses).argsort()
    guessed = torch.zeros(runs, dtype=torch.bool)
    guessed[order[: runs // 2]] = True  # the lower losses are taken for members
    return int((guessed == (torch.arange(runs) % 2 == 0)).sum()), private.report()["epsilon"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_canary_cannot_be_told_more_often_than_epsilon_allows(tmp_path):
    """With equal odds, membership is guessed right with probability e^epsilon / (1 + e^epsilon) + delta at most."""
    runs = 30
    right, spent = guesses(tmp_path, 6.0, runs)
    allowed = math.exp(spent) / (1 + math.exp(spent)) + 1e-3
    assert spent < 1.0
    assert stats.binomtest(right, runs, allowed, alternative="greater").pvalue > 1e-3, f"{right} of {runs} guessed"
    # the attack is one that works: without noise it is nearly always right, more than any such epsilon allows
    right, _ = guesses(tmp_path, 1e-3, runs)
    assert stats.binomtest(right, runs, allowed, alternative="greater").pvalue < 1e-2, f"{right} of {runs} guessed"
