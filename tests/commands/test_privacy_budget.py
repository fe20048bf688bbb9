import pytest
from commands.runs import refused
from standins import tiny_config, write_config

from knlightning.commands.main import main
from knlightning.privacy.accounting import epsilon
from knlightning.privacy.plan import Budget, calibrate_noise, count_affordable_steps, largest_sampling_probability

GIVEN = {"noise_multiplier": 1.5, "sampling_probability": 0.1, "num_steps": 50, "epsilon": 2.0}
BUDGET = Budget(2.0, 1e-4, accountant="rdp")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("noise_multiplier", calibrate_noise(BUDGET, 0.1, 50)),
        ("sampling_probability", largest_sampling_probability(BUDGET, 1.5, 50)),
        ("num_steps", count_affordable_steps(BUDGET, 1.5, 0.1, 10**9)),
        ("epsilon", epsilon([(1.5, 0.1, 50)], 1e-4, "rdp")),
    ],
)
def test_the_fourth_follows_from_three(capsys, asked, found):
    line = [f"--{name}={value}" for name, value in GIVEN.items() if name != asked]
    main(["privacy-budget", *line, "--delta=1e-4", "--accountant=rdp"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{asked} {found:.6g}"
    assert second.endswith("; delta 0.0001, accountant rdp)")
    assert all(f"{name} {value:g}" in second for name, value in GIVEN.items() if name != asked)


@pytest.fixture
def private(tmp_path, monkeypatch):
    """A folder with private.yaml: 23 steps of 64 of 1437 samples."""
    monkeypatch.chdir(tmp_path)
    init_args = {"target_epsilon": 3.0, "target_delta": 1e-4, "accountant": "rdp"}
    callback = {"class_path": "knlightning.privacy.DifferentialPrivacy", "init_args": init_args}
    write_config(tmp_path / "private.yaml", tiny_config(callbacks=[callback], max_epochs=1))
    write_config(tmp_path / "plain.yaml", tiny_config(max_epochs=1))
    return tmp_path


def test_a_private_run_is_tabled_and_drawn_and_not_trained(private, capsys):
    main(["privacy-budget", "--config=private.yaml", "--out=cost.png", "--data.batch_size=64"])
    printed = capsys.readouterr().out
    assert "22 steps (22 an epoch) of 64 of 1437 samples" in printed
    noise = calibrate_noise(Budget(3.0, 1e-4, accountant="rdp"), 64 / 1437, 22)
    for factor in (0.5, 1.0, 4.0):
        cost = epsilon([(factor * noise, 64 / 1437, 22)], 1e-4, "rdp")
        assert f"| {factor * noise:.4g}{' (this run)' if factor == 1 else ''} | {cost:.4g} |" in printed
    assert (private / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in private.iterdir()) == ["cost.png", "plain.yaml", "private.yaml"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "give three of --noise_multiplier, --sampling_probability, --num_steps, --epsilon"),
        (["--epsilon=2", "--num_steps=5"], "give three of"),
        ([f"--{name}={value}" for name, value in GIVEN.items()], "give three of"),
        (["--epsilon=0"], "--epsilon must be a number above 0, or null for what is asked for, got 0"),
        (["--sampling_probability=2"], "--sampling_probability must be a number above 0 and at most 1"),
        (["--delta=1"], "--delta must be a number above 0 and below 1"),
        (["--accountant=moments"], "accountant"),
        (["--data.batch_size=5"], "--data.batch_size is of a configuration: give --config FILE, too"),
        (["--config=private.yaml", "--epsilon=2"], "--epsilon: of --config FILE the run itself says it"),
        (["--config=plain.yaml"], "privacy-budget needs a private run"),
        (
            ["--epsilon=0.1", "--noise_multiplier=0.5", "--sampling_probability=1"],
            "--epsilon must be at least 10, which is what one step costs",
        ),
    ],
)
def test_requests_that_cannot_be_met(private, capsys, args, said):
    assert said in refused(capsys, "privacy-budget", *args)
