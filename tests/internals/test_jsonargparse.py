from collections.abc import Callable
from traceback import walk_tb

import pytest
from jsonargparse import ArgumentParser

from knlightning.internals.jsonargparse import in_one_line, made_by, options_of, set_choices, set_titles

MEND = "jsonargparse no longer keeps groups of arguments in `parser.groups`: mend knlightning/internals/jsonargparse.py"


class Engine:
    """Turns."""

    def __init__(self, power: int = 1):
        self.share = 1 / power


def test_titles_of_groups():
    parser = ArgumentParser()
    parser.add_class_arguments(Engine, "engine")
    assert isinstance(getattr(parser, "groups", None), dict), MEND
    assert "engine" in parser.groups, MEND
    set_titles(parser, {"engine": "What drives it"})
    assert "What drives it:" in parser.format_help(), MEND


def test_what_is_made_stands_in_the_traceback():
    mend = "jsonargparse makes objects elsewhere: mend made_by in knlightning/internals/jsonargparse.py"
    parser = ArgumentParser()
    parser.add_argument("--engine", type=Engine)
    parser.add_argument("--maker", type=Callable[[], Engine])
    parsed = parser.parse_args(
        [f"--engine={__name__}.Engine", "--engine.power=0", f"--maker={__name__}.Engine", "--maker.power=0"]
    )
    with pytest.raises(ZeroDivisionError) as at_once:
        parser.instantiate(parsed)
    del parsed["engine"]
    with pytest.raises(ZeroDivisionError) as later:
        parser.instantiate(parsed).maker()
    for error in (at_once.value, later.value):
        made = [made_by(frame) for frame, _ in walk_tb(error.__traceback__)]
        assert (Engine, {"power": 0}) in made, mend


def test_choices_in_the_help():
    mend = "jsonargparse lists choices elsewhere: mend set_choices in knlightning/internals/jsonargparse.py"
    set_choices({Engine: "one of those we have"})
    try:
        parser = ArgumentParser()
        parser.add_argument("--engine", type=Engine, help="Drives it.")
        assert "one of those we have" in " ".join(parser.format_help().split()), mend
    finally:
        set_choices({})


def test_messages_about_values_are_brought_into_one_line(capsys):
    mend = "jsonargparse writes other messages: mend in_one_line in knlightning/internals/jsonargparse.py"
    parser = ArgumentParser()
    parser.add_argument("--engine", type=Engine | None)
    parser.error = lambda message, ex=None: (_ for _ in ()).throw(ValueError(in_one_line(message)))
    with pytest.raises(ValueError, match=r"^engine\.init_args\.power must be int; got much$"):
        parser.parse_args([f"--engine={__name__}.Engine", "--engine.power=much"])
    assert in_one_line("something else") == "something else", mend


def test_options_of_a_parser():
    mend = "argparse no longer keeps options in `_actions`: mend options_of in knlightning/internals/jsonargparse.py"
    parser = ArgumentParser()
    parser.add_class_arguments(Engine, "engine")
    assert {"help", "engine.power"} <= options_of(parser), mend
