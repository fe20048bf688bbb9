import subprocess
import sys

import pytest
from commands.runs import help_text, refused

from knlightning import commands
from knlightning.commands.main import list_commands, main, run


def test_help(capsys):
    lines = help_text(capsys)
    assert len(lines) < 40
    for command in ("fit", "validate", "test", "predict"):
        assert any(line.split()[:1] == [command] for line in lines)


def test_a_command_is_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "say_twice.py").write_text(
        '"""Say a word twice.\\n\\nMore."""\ndef main(args):\n    print(*args, *args)\n    return len(args)\n'
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    assert any(line.split() == ["say-twice", *["Say", "a", "word", "twice."]] for line in help_text(capsys))
    main(["say-twice", "no"])
    assert capsys.readouterr().out == "no no\n"
    assert run(["say-twice", "--help", "me"]) == 2  # its own arguments, whatever they are


def test_commands_begin_with_those_of_a_run():
    found = list_commands()
    assert list(found)[:4] == ["fit", "validate", "test", "predict"]
    assert list(found)[4:] == sorted(list(found)[4:])
    assert found["sweep-lr"][0] == "sweep_lr"
    assert all(text.endswith(".") for _, text in found.values())


@pytest.mark.parametrize("args", [(), ("fly",)])
def test_missing_and_unknown_commands(args, capsys):
    assert "fit" in refused(capsys, *args)


def test_the_list_of_commands_imports_none_of_them():
    """So that it is there at once."""
    code = (
        "import sys; from knlightning.commands.main import list_commands; list_commands();"
        " assert not {'torch', 'lightning', 'jsonargparse', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
