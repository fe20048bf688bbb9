from jsonargparse import ArgumentParser

from knlightning.internals.jsonargparse import set_titles

MEND = "jsonargparse no longer keeps groups of arguments in `parser.groups`: mend knlightning/internals/jsonargparse.py"


class Engine:
    """Turns."""

    def __init__(self, power: int = 1):
        self.power = power


def test_titles_of_groups():
    parser = ArgumentParser()
    parser.add_class_arguments(Engine, "engine")
    assert isinstance(getattr(parser, "groups", None), dict), MEND
    assert "engine" in parser.groups, MEND
    set_titles(parser, {"engine": "What drives it"})
    assert "What drives it:" in parser.format_help(), MEND
