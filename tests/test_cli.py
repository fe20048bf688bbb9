def test_the_earlier_path_is_the_command():
    from knlightning import cli
    from knlightning.commands import main

    assert cli.main is main.main
