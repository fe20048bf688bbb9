"""Runs that go on, and runs that meet."""

import json
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from privacy.private_runs import SAMPLES, Net, privacy, task, trainer
from standins import RandomData

from knlightning.privacy.accounting import epsilon


def fit(folder, module, callback, epochs=1, ckpt_path=None, **settings):
    """Train, and write a checkpoint at the end; 4 steps an epoch."""
    run = trainer(folder, *([callback] if callback else []), max_epochs=epochs, **settings)
    run.fit(module, RandomData(SAMPLES, 5), ckpt_path=ckpt_path)
    path = Path(folder) / f"{module.__class__.__name__}-{len(list(Path(folder).glob('*.ckpt')))}.ckpt"
    run.save_checkpoint(path)
    return path


def report(folder):
    return json.loads((Path(folder) / "privacy.json").read_text())


def quick(**settings):
    return privacy(check=False, **settings)


def test_a_cheap_run_in_the_same_directory_replaces_nothing(tmp_path, capsys):
    costly = fit(tmp_path, task(), quick(noise_multiplier=0.5))
    fit(tmp_path, task(), quick(noise_multiplier=50.0), epochs=5)
    assert "tells of another run, which this one does not count" in capsys.readouterr().out
    again = quick(noise_multiplier=50.0)
    fit(tmp_path, task(), again, epochs=2, ckpt_path=costly)
    assert again.ledger.history == [(0.5, 0.25, 4), (50.0, 0.25, 20 + 4)]
    assert report(tmp_path)["epsilon"] == epsilon(again.ledger.history, 1e-3, "rdp")
    assert "tells of 20 steps that are not in the checkpoint: they count too" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "", "{"])
def test_a_report_that_is_missing_or_damaged(tmp_path, capsys, text):
    path = fit(tmp_path, task(), quick())
    (tmp_path / "privacy.json").unlink()
    if text is not None:
        (tmp_path / "privacy.json").write_text(text)
    again = quick()
    fit(tmp_path, task(), again, epochs=2, ckpt_path=path)
    printed = capsys.readouterr().out
    assert ("there is no privacy.json in" if text is None else "privacy.json is damaged") in printed
    assert "What the checkpoint itself has spent counts" in printed
    assert again.ledger.history == [(0.8, 0.25, 8)]
    assert report(tmp_path)["history"] == [[0.8, 0.25, 8]]


def test_a_cell_that_is_run_twice(tmp_path, capsys):
    """The same network, in whatever task, with a new callback and a new trainer."""
    net = Net()
    fit(tmp_path / "1", task(net), quick())
    second = quick(noise_multiplier=2.0)
    fit(tmp_path / "2", task(net), second)
    assert second.ledger.history == [(0.8, 0.25, 4), (2.0, 0.25, 4)]
    assert "the network was trained privately before: its 4 steps count too" in capsys.readouterr().out
    assert report(tmp_path / "2")["epsilon"] == epsilon(second.ledger.history, 1e-3, "rdp")
    new = quick()
    fit(tmp_path / "3", task(Net()), new)
    assert new.ledger.history == [(0.8, 0.25, 4)]


def test_an_interrupted_cell_that_is_run_again(tmp_path):
    class HaltedError(Exception):
        pass

    class Halts(Net):
        times = 0

        def forward(self, x):
            Halts.times += 1
            if Halts.times == 3:
                raise HaltedError
            return super().forward(x)

    net = Halts()
    with pytest.raises(HaltedError):
        fit(tmp_path, task(net), quick())
    again = quick()
    fit(tmp_path, task(net), again)
    assert again.ledger.history == [(0.8, 0.25, 2 + 4)]


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path):
    module, callback = task(), quick()
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, RandomData(SAMPLES, 5))
    run.fit_loop.max_epochs = 3
    run.fit(module, RandomData(SAMPLES, 5))
    assert run.global_step == 12
    assert callback.ledger.history == [(0.8, 0.25, 12)]


@pytest.mark.parametrize("batch", [5, 2])
def test_resumed_within_an_epoch_with_steps_of_another_size(tmp_path, batch):
    """The plan covers exactly the steps that come, whatever those before were; trial steps change nothing of it."""

    class Within(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 6:  # of an epoch of 4 steps
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    first = privacy()
    trainer(tmp_path / "first", first, Within(), max_epochs=2).fit(task(), RandomData(SAMPLES, 5))
    again = privacy(noise_multiplier=None, target_epsilon=12.0)
    run = trainer(tmp_path / "again", again, max_epochs=3)
    (tmp_path / "within.ckpt").rename(tmp_path / "a.ckpt")
    run.fit(task(), RandomData(SAMPLES, batch), ckpt_path=tmp_path / "a.ckpt")
    assert again.plan.num_steps == run.global_step
    noise = again.plan.noise_multiplier
    assert again.ledger.history == [(0.8, 0.25, 6), (noise, batch / SAMPLES, run.global_step - 6)]
    assert 11.9 < again.ledger.epsilon <= 12.0


def test_a_checkpoint_without_privacy_after_a_private_run_is_refused(tmp_path):
    """What the callback and the network remember is not what the checkpoint was trained with."""
    plain = fit(tmp_path, task(), None)
    module, callback = task(), quick()
    fit(tmp_path, module, callback)
    with pytest.raises(ValueError, match="trained without differential privacy"):
        fit(tmp_path, module, callback, epochs=2, ckpt_path=plain)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_going_on_without_the_callback_marks_the_report(tmp_path):
    path = fit(tmp_path, task(), quick())
    assert report(tmp_path)["epsilon"] > 0
    plain = fit(tmp_path, task(), None, epochs=2, ckpt_path=path)
    marked = report(tmp_path)
    assert marked["epsilon"] is None
    assert "went on from step 8 without DifferentialPrivacy" in marked["not_private"]
    assert marked["history"] == [[0.8, 0.25, 4]]
    with pytest.raises(ValueError, match="trained without differential privacy"):
        fit(tmp_path, task(), quick(), epochs=3, ckpt_path=plain)
    fit(tmp_path, task(), quick(), epochs=2, ckpt_path=path)  # these weights are private; others in the folder not
    assert report(tmp_path)["epsilon"] > 0
    assert report(tmp_path)["not_private"] == marked["not_private"]


def test_a_run_without_privacy_leaves_the_reports_of_others(tmp_path):
    fit(tmp_path, task(), quick())
    before = report(tmp_path)
    fit(tmp_path, task(), None)
    assert report(tmp_path) == before


def test_runs_from_python_do_not_meet(tmp_path, monkeypatch):
    """Each reports beside its checkpoints and its log, and a resumed one finds that."""
    monkeypatch.chdir(tmp_path)
    for noise in (0.8, 3.0):
        files = {"logger": CSVLogger("."), "enable_checkpointing": True, "log_every_n_steps": 1}
        run = trainer(None, quick(noise_multiplier=noise), max_epochs=1, **files)
        run.fit(task(), RandomData(SAMPLES, 5))
    folders = [Path("lightning_logs") / f"version_{number}" for number in (0, 1)]
    assert sorted(path.parent for path in Path().rglob("privacy.json")) == folders
    assert [report(folder)["history"][0][0] for folder in folders] == [0.8, 3.0]
    again = quick(noise_multiplier=3.0)
    (first,) = (folders[0] / "checkpoints").glob("*.ckpt")
    run = trainer(None, again, max_epochs=2)
    with pytest.warns(UserWarning, match="Be aware that when using `ckpt_path`"):  # of the callback for checkpoints
        run.fit(task(), RandomData(SAMPLES, 5), ckpt_path=first)
    assert again.ledger.history == [(0.8, 0.25, 4), (3.0, 0.25, 4)]


def test_the_report_lies_beside_the_checkpoints(tmp_path):
    for name, where in (("run/checkpoints", "run"), ("kept", "kept")):
        files = ModelCheckpoint(tmp_path / name)
        trainer(tmp_path / "root", quick(), files, max_epochs=1, enable_checkpointing=True).fit(
            task(), RandomData(SAMPLES, 5)
        )
        assert (tmp_path / where / "privacy.json").is_file()
    assert not (tmp_path / "root" / "privacy.json").exists()


def test_checkpoints_of_weights_alone_are_counted(tmp_path):
    files = ModelCheckpoint(tmp_path / "kept", save_weights_only=True, every_n_train_steps=3)
    run = trainer(tmp_path, quick(), files, max_epochs=1, enable_checkpointing=True)
    run.fit(task(), RandomData(SAMPLES, 5))
    assert [path.name for path in (tmp_path / "kept").glob("*.ckpt")] == ["epoch=0-step=3.ckpt"]
    assert report(tmp_path / "kept")["history"] == [[0.8, 0.25, 3]]
    run.save_checkpoint(tmp_path / "kept" / "end.ckpt", weights_only=True)  # after the fit, too
    assert report(tmp_path / "kept")["history"] == [[0.8, 0.25, 4]]


@pytest.mark.parametrize(
    ("before", "doubt"),
    [
        ({"poisson_sampling": False}, "NOMINAL: batches were shuffled"),
        ({"seed": 5}, "repeated by those who know the seed"),
        ({"check": False}, "no trial steps have looked"),
    ],
)
@pytest.mark.parametrize("way", ["checkpoint", "network"])
def test_what_is_doubtful_about_the_steps_before_stays_doubtful(tmp_path, capsys, before, doubt, way):
    sound, module = {"seed": None, "check": before == {"check": False}}, task()
    path = fit(tmp_path, module, privacy(**(sound | before)))
    assert doubt in capsys.readouterr().out
    again, more = (task(), {"epochs": 2, "ckpt_path": path}) if way == "checkpoint" else (task(module.backbone), {})
    fit(tmp_path, again, privacy(**sound), **more)
    assert doubt in capsys.readouterr().out


def test_a_target_is_kept_where_noise_that_was_given_is_left_to_be_calibrated(tmp_path):
    """A run that was to stop at its budget goes on with as much noise as the rest of it needs."""
    budget = {"target_epsilon": 6.5}
    path = fit(tmp_path, task(), quick(**budget), epochs=5)
    again = quick(**budget, noise_multiplier=None)
    fit(tmp_path, task(), again, epochs=5, ckpt_path=path)
    assert again.plan.noise_multiplier > 0.8
    assert 6.49 < again.ledger.epsilon <= 6.5
