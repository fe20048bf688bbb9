from knlightning.callbacks.hparams import readable


def test_readable():
    config = {
        "seed_everything": 1,
        "run_dir": "runs/a/0",
        "model": {
            "class_path": "knlightning.tasks.ClassificationTask",
            "init_args": {
                "backbone": {"class_path": "knlightning.models.knresnet8", "init_args": {"num_classes": 10}},
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
