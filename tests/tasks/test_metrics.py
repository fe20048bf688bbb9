import pytest
from lightning.pytorch import Callback
from standins import RandomData, TinyNet, trainer
from torch.optim import SGD

from knlightning.tasks import ClassificationTask


class Breaking(Callback):
    """Breaks a run off at the second batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx:
            raise OverflowError

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx:
            raise OverflowError


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_batches_of_a_run_that_was_broken_off_do_not_count(tmp_path, stage):
    task = ClassificationTask(TinyNet(3, dropout_p=0.0), optimizer=lambda params: SGD(params, lr=0.0))

    def metrics(*callbacks):
        run = trainer(tmp_path, *callbacks, max_epochs=1, num_sanity_val_steps=0)
        getattr(run, stage)(task, RandomData())
        return run.callback_metrics

    expected = metrics()
    with pytest.raises(OverflowError):
        metrics(Breaking())
    assert metrics() == expected
