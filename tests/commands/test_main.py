import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from commands.runs import help_text, refused
from standins import knl

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
    assert run("say-twice --help 'with me'") == 2


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


def test_an_interrupt_in_the_first_seconds_is_a_line(tmp_path):
    process = knl("fit", "--help", "all", cwd=tmp_path, PYTHONUNBUFFERED="1")
    time.sleep(0.7)  # libraries are being imported
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130
    assert output == "Interrupted.\n"


def test_a_closed_pipe_is_a_line(tmp_path):
    read, write = os.pipe()
    os.close(read)
    code = "from knlightning.commands.main import main; main(['reproduce'])"
    process = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    os.close(write)
    assert process.returncode == 141
    assert process.stderr == "The output is read by nobody any more: ended.\n"


def test_what_a_command_imports_is_left_alone_by_the_collector(tmp_path, monkeypatch):
    (tmp_path / "collect.py").write_text("import gc\non = gc.isenabled()\ndef main(args):\n    assert not on\n")
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(1))
    for _ in range(2):
        main(["collect"])
        assert gc.isenabled()
    assert frozen == [1]


@pytest.mark.parametrize("args", [["test", "--help"], ["predict", "-h"]])
def test_the_short_help_is_there_at_once(args):
    code = (
        f"import sys; from knlightning.commands.main import main; main({args});"
        " assert not {'torch', 'lightning', 'jsonargparse'} & sys.modules.keys()"
    )
    process = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert f"usage: knl {args[0]} --config FILE" in process.stdout
    assert max(map(len, process.stdout.splitlines())) <= 99
