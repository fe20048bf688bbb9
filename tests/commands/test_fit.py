import signal
import time

import pytest
import torch
import yaml
from commands.runs import column, refused, rows, scalars
from standins import assert_same_weights, knl, tiny_config, write_config

from knlightning.commands.main import main, run


def test_run_directory_holds_everything(trained):
    run = trained[0] / "runs" / "tiny" / "0"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["run_dir"] == "runs/tiny/0"
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
    names = {path.name.partition(".")[0] for path in run.iterdir()}
    assert names == {"config", "checkpoints", "metrics", "events", "versus_images"}


def test_curves_of_loss_accuracy_rate_and_throughput(trained):
    run = trained[0] / "runs" / "tiny" / "0"
    steps = [22, 45, 68]  # 1437 images in batches of 64: 23 steps an epoch
    for name in ("train/loss", "train/acc", "train/acc_top5", "val/loss", "val/acc", "val/acc_top5"):
        assert [step for step, _ in column(run, name)] == steps
    rates = column(run, "lr-SGD")
    assert [step for step, _ in rates] == [0, 23, 46]
    assert rates[1][1] == pytest.approx(0.5 * (0.01 + 0.99 * 0.75))  # a cosine over the three epochs
    assert all(rate > 0 for _, rate in column(run, "train/images_per_s"))
    tags = scalars(run).Tags()
    assert {"train/loss", "val/acc", "train/lr-SGD", "train/images_per_s", "train/loss_step"} <= set(tags["scalars"])
    assert tags["images"] == ["val/confusion", "val/predictions"]


def test_fit_ends_by_telling_where_how_well_and_what_next(trained):
    folder, output = trained
    run = folder / "runs" / "tiny" / "0"
    accuracies = [value for _, value in column(run, "val/acc")]
    best = max(accuracies)
    assert "Run:        runs/tiny/0" in output
    assert f"Best:       val/acc {best:.4f}, in epoch {accuracies.index(best)}" in output
    for command, more in (("test", ""), ("predict", " --data.predict_dir IMAGES")):
        assert f"knl {command} --config runs/tiny/0/config.yaml --ckpt_path best{more}\n" in output


def test_quiet_where_there_is_nothing_to_act_on(trained):
    for word in ("Warning", "warn", "litlogger", "num_workers", "deprecated", "weights_only"):
        assert word not in trained[1]


def test_hparams_tab_shows_settings_with_the_best_score(trained):
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.list_session_groups import Handler

    run = trained[0] / "runs" / "tiny" / "0"
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(run.parent))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(run.parent))
    context = Context(TBContext(data_provider=provider))
    request = RequestContext()
    metadata = context.hparams_metadata(request, experiment_id="")
    experiment = context.experiment_from_metadata(
        request, "", True, metadata, context.hparams_from_data_provider(request, "", limit=None)
    )
    listing = Handler(
        request,
        context,
        "",
        api_pb2.ListSessionGroupsRequest(
            start_index=0, slice_size=10, allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN]
        ),
    ).run()
    (group,) = listing.session_groups
    assert group.hparams["model.optimizer.lr"].number_value == 0.5
    assert group.hparams["model.backbone"].string_value == "TinyNet"
    (metric,) = (metric for metric in group.metric_values if metric.name.tag == "val/best_acc")
    best = max(value for _, value in column(run, "val/acc"))
    assert metric.value == pytest.approx(best, abs=1e-6)
    assert "val/best_acc" in [info.name.tag for info in experiment.metric_infos]
    assert not any(info.differs for info in experiment.hparam_infos)  # there is but one run


def test_saved_configuration_is_a_configuration(folder, capsys):
    assert "--ckpt_path last" in refused(capsys, "fit", "--config", "runs/tiny/0/config.yaml")
    main(["fit", "--config", "runs/tiny/0/config.yaml", "--run_dir", "again"])
    assert_same_weights(folder / "again" / "checkpoints" / "last.ckpt", folder / "runs/tiny/0/checkpoints/last.ckpt")


@pytest.mark.filterwarnings("ignore:No seed found, seed set to 0:UserWarning")  # and none is given
def test_any_seed_is_kept_when_the_run_resumes(empty):
    config = tiny_config(max_epochs=1) | {"seed_everything": True}
    write_config(empty / "tiny.yaml", config)
    main(["fit", "--config", "tiny.yaml"])
    saved = empty / "runs" / "tiny" / "0" / "config.yaml"
    seed = yaml.safe_load(saved.read_text())["seed_everything"]
    assert isinstance(seed, int)
    assert not isinstance(seed, bool)
    main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    assert yaml.safe_load(saved.read_text())["seed_everything"] == seed


def test_loggers_and_callbacks_of_ones_own(empty):
    config = tiny_config(
        max_epochs=1,
        logger={"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "own"}},
        callbacks=[{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}],
    )
    write_config(empty / "tiny.yaml", config)
    main(["fit", "--config", "tiny.yaml"])
    run = empty / "runs" / "tiny" / "0"
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert (run / "metrics.csv").is_file()  # our logs are there beside any other
    assert list(run.glob("events.*"))
    assert list((empty / "own").rglob("metrics.csv"))
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert any(key.startswith("EarlyStopping") for key in stored["callbacks"])


def test_add_on_file_appends_callbacks(empty):
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
    write_config(empty / "a.yaml", tiny_config(max_epochs=1, callbacks=[stopping]))
    summary = {"class_path": "lightning.pytorch.callbacks.ModelSummary"}
    write_config(empty / "add.yaml", {"trainer": {"callbacks+": [summary]}})
    main(["fit", "--config", "a.yaml", "--config", "add.yaml"])
    run = empty / "runs" / "add" / "0"  # named after the last file
    config = yaml.safe_load((run / "config.yaml").read_text())
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["EarlyStopping", "ModelSummary"]


def test_schedule_and_its_interval_come_from_the_configuration(empty):
    schedule = {"class_path": "torch.optim.lr_scheduler.PolynomialLR", "init_args": {"total_iters": 46, "power": 0.9}}
    config = tiny_config(max_epochs=1, log_every_n_steps=1)
    config["model"]["init_args"] |= {"lr_scheduler": schedule, "lr_scheduler_interval": "step"}
    write_config(empty / "tiny.yaml", config)
    main(["fit", "--config", "tiny.yaml"])
    rates = [rate for _, rate in column(empty / "runs" / "tiny" / "0", "lr-SGD")]
    assert rates == pytest.approx([0.5 * (1 - step / 46) ** 0.9 for step in range(23)])


def test_schedule_works_with_the_default_optimizer(empty):
    config = tiny_config(max_epochs=1)
    del config["model"]["init_args"]["optimizer"]
    write_config(empty / "tiny.yaml", config)
    main(["fit", "--config", "tiny.yaml"])
    assert column(empty / "runs" / "tiny" / "0", "lr-SGD")[0] == (0, 0.05)


def test_another_network_takes_no_arguments_of_the_first(empty, capsys):
    backbone = ["--model.backbone", "torch.nn.Flatten", "--print_config"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tiny.yaml", "--model.backbone.dropout_p", "0.3", *backbone])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["backbone"]["class_path"] == "torch.nn.Flatten"
    assert "dropout_p" not in config["model"]["init_args"]["backbone"]["init_args"]


def test_configuration_wins_over_the_checkpoint_and_differences_are_shown(folder, capsys):
    lr = "model.init_args.optimizer.init_args.lr"
    changed = ["--trainer.max_epochs", "4", f"--{lr}", "0.9", "--model.label_smoothing", "0.2"]
    assert run(["fit", "--config", "tiny.yaml", "--ckpt_path", "last", *changed]).model.label_smoothing == 0.2
    output = capsys.readouterr().out
    assert f"  {lr}: 0.5 -> 0.9\n" in output
    assert "  trainer.max_epochs: 3 -> 4\n" in output
    assert "  model.init_args.label_smoothing: 0.0 -> 0.2\n" in output
    assert output.count("->") == 4  # these three and the heading
    kept = folder / "runs" / "tiny" / "0"
    config = yaml.safe_load((kept / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.9
    assert [image.step for image in scalars(kept).Images("val/confusion")] == [68, 91]  # none is lost
    step, rate = column(kept, "lr-SGD")[-1]
    assert step == 69
    assert rate == pytest.approx(0.9 * (0.01 + 0.99 * (1 - 2**-0.5) / 2))  # epoch 3 of 4, at once


def test_finished_run_resumes_without_harm(folder, capsys):
    run = folder / "runs" / "tiny" / "0"
    before = rows(run)
    main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last"])
    assert rows(run) == before
    assert "Best:" in capsys.readouterr().out


def test_loss_that_is_not_finite_ends_the_run(empty, capsys):
    message = refused(capsys, "fit", "--config", "tiny.yaml", "--model.optimizer.lr", "1e38")
    assert "learning rate" in message


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(empty):
    args = ["--trainer.max_epochs", "1000"]
    process = knl("fit", "--config", "tiny.yaml", *args, cwd=empty)
    last = empty / "runs" / "tiny" / "0" / "checkpoints" / "last.ckpt"
    while not last.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Go on with: knl fit --config runs/tiny/0/config.yaml --ckpt_path last" in output
    assert "Traceback" not in output
