import pytest

from knlightning.analysis.settings import check_overrides, short


def test_keys_are_shortened_as_on_the_command_line():
    assert short("model.init_args.backbone.init_args.norm") == "model.backbone.norm"


@pytest.mark.parametrize("key", ["data.batch_size", "data.init_args.batch_size", "model.optimizer.lr"])
def test_what_a_command_settles_is_left_alone(key):
    with pytest.raises(ValueError, match=f"{key} is settled"):
        check_overrides([key], ["data.init_args.batch_size"])
    check_overrides(["data.root"], ["data.init_args.batch_size"])
