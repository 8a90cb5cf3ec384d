"""What the command line prints."""


def fails(capsys, code, message):
    """Exit code 2, the message in one line on stderr, no traceback."""
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("lineas: error: ")
    assert message in err
