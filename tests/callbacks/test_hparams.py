import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from knlightning.callbacks.hparams import TensorBoardLog, readable


def test_readable():
    config = {
        "seed_everything": 1,
        "run_dir": "runs/a/0",
        "model": {
            "class_path": "knlightning.tasks.ClassificationTask",
            "init_args": {
                "backbone": {
                    "class_path": "knlightning.models.knresnet8",
                    "init_args": {"num_classes": 10},
                },
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "fused": None}},
                "lr_scheduler": None,
                "betas": [0.9, 0.99],
            },
        },
        "data": {"class_path": "a.b.Digits", "init_args": {"batch_size": 32}},
        "trainer": {"max_epochs": 3, "accumulate_grad_batches": 1, "callbacks": [{"class_path": "a.B"}]},
    }
    assert readable(config) == {
        "seed": 1,
        "model": "ClassificationTask",
        "model.backbone": "knresnet8",
        "model.backbone.num_classes": 10,
        "model.optimizer": "SGD",
        "model.optimizer.lr": 0.1,
        "model.betas": "[0.9, 0.99]",
        "data": "Digits",
        "data.batch_size": 32,
        "trainer.max_epochs": 3,
    }


def test_strings_of_any_kind_can_be_logged(tmp_path):
    config = {"data": {"root": "caf\udce9", "names": ["\x1b"]}}
    assert readable(config) == {"data.root": r"caf\udce9", "data.names": r"['\x1b']"}
    log = TensorBoardLog(tmp_path)
    log.log_hyperparams(readable(config), {"val/best_acc": 0.5})
    log.finalize("success")


def test_what_cannot_be_logged_does_not_end_the_run(tmp_path, monkeypatch):
    log = TensorBoardLog(tmp_path)
    with pytest.warns(UserWarning, match="Left out: the hyperparameters in TensorBoard"):
        log.log_hyperparams({"root": "caf\udce9"}, {"val/best_acc": 0.5})
    with pytest.warns(UserWarning, match="Left out: the log of TensorBoard"):
        log.log_metrics({"caf\udce9": 0.5}, 1)
    log.log_metrics({"caf\udce9": 0.5}, 2)
    log.finalize("success")


def points(directory, tag):
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else None


def test_metrics_by_images_are_those_of_the_run_also_after_it_is_resumed(tmp_path):
    def log(first_step, first_images, epochs):
        log = TensorBoardLog(tmp_path, first_step)
        log.count_images(first_images)
        for epoch, value in epochs:
            log.count_images(32 * epoch)
            log.log_metrics({"train/loss": value, "lr-SGD": 1.0, "privacy/epsilon": 2.0, "epoch": epoch}, 4 * epoch - 1)
        log.finalize("success")

    log(0, 0, [(1, 0.5), (2, 0.25), (3, 0.125)])
    log(8, 64, [(3, 1.0)])  # from the end of the second epoch on
    assert points(tmp_path, "train/loss") == [(3, 0.5), (7, 0.25), (11, 1.0)]
    assert points(tmp_path, "train/lr-SGD") == [(3, 1.0), (7, 1.0), (11, 1.0)]
    assert points(tmp_path, "epoch") is None
    assert points(tmp_path / "versus_images", "versus_images/train/loss") == [(32, 0.5), (64, 0.25), (96, 1.0)]
    assert points(tmp_path / "versus_images", "versus_images/privacy/epsilon") is None
