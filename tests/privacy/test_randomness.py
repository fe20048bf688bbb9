import pytest
import torch
from scipy import stats

from knlightning.privacy.randomness import SecretRandom, fresh_key, known_key

CPU = torch.device("cpu")


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_standard_normal(secure):
    values = SecretRandom(known_key(0), secure).normal(200_001, "noise", 3, CPU)
    assert values.dtype == torch.float64
    assert values.shape == (200_001,)
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    assert values.mean().abs() < 5 / 200_001**0.5
    assert (values.var() - 1).abs() < 5 * (2 / 200_001) ** 0.5
    assert values.abs().max() > 4  # the tails are there


@pytest.mark.parametrize("secure", [False, True])
def test_each_step_and_purpose_has_numbers_of_its_own(secure):
    random = SecretRandom(known_key(0), secure)
    first = random.normal(10_000, "noise", 0, CPU)
    for other in (
        random.normal(10_000, "noise", 1, CPU),
        random.normal(10_000, "other", 0, CPU),
        SecretRandom(known_key(1), secure).normal(10_000, "noise", 0, CPU),
    ):
        assert torch.corrcoef(torch.stack((first, other)))[0, 1].abs() < 0.05
    assert torch.equal(first, random.normal(10_000, "noise", 0, CPU))


@pytest.mark.parametrize("secure", [False, True])
def test_poisson_sampling(secure):
    random = SecretRandom(known_key(0), secure)
    steps = [random.chosen(2000, 0.05, step) for step in range(400)]
    for chosen in steps[:20]:
        assert len(chosen.unique()) == len(chosen)
    sizes = torch.tensor([float(len(chosen)) for chosen in steps])
    variance = 2000 * 0.05 * 0.95
    assert (sizes.mean() - 100).abs() < 5 * (variance / 400) ** 0.5
    assert 0.8 < sizes.var() / variance < 1.25  # not a fixed size
    times = torch.bincount(torch.cat(steps), minlength=2000)  # of each sample
    assert stats.chisquare(times.numpy()).pvalue > 1e-4
    assert not torch.equal(steps[0].sort().values, steps[0])  # pieces of a step get samples from everywhere


def test_the_whole_key_counts(monkeypatch):
    """A generator that uses 32 bits of its seed would give the same noise to two of some ten thousand steps."""
    drawn = []
    for last in (b"\0", b"\1"):
        monkeypatch.setattr(SecretRandom, "_bytes", lambda self, count, *args, last=last: bytes(count - 1) + last)
        random = SecretRandom(fresh_key())
        drawn.append((random.normal(9, "noise", 0, CPU), random.permutation(9, "order", 0), random.chosen(9, 0.5, 0)))
    for one, other in zip(*drawn, strict=True):
        assert not torch.equal(one, other)


def test_nothing_and_everything_can_be_chosen():
    random = SecretRandom(fresh_key())
    assert len(random.chosen(100, 0.0, 0)) == 0
    assert sorted(random.chosen(100, 1.0, 0).tolist()) == list(range(100))


def test_fresh_keys_differ_and_the_global_seed_has_no_part():
    torch.manual_seed(0)
    one = fresh_key()
    torch.manual_seed(0)
    assert fresh_key() != one
    state = torch.get_rng_state()
    SecretRandom(one).normal(10, "noise", 0, CPU)
    SecretRandom(one).chosen(10, 0.5, 0)
    assert torch.equal(torch.get_rng_state(), state)
