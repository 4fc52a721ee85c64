"""flags.py: what the command line refuses is one line on stderr, exit code 2, the same for every script."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

from flags import one_line_refusals, read_command_line

ROOT = Path(__file__).parents[1]


@dataclass
class Config:
    run: tyro.conf.Positional[str]  # a folder
    lr: float = 1.0  # peak
    quick: bool = False
    careful: bool = True


def test_fields_are_read_with_underscores_and_switches_only_from_their_default():
    assert read_command_line(Config, ["x", "--lr", "2", "--quick", "--no_careful"]) == Config("x", 2.0, True, False)
    assert read_command_line(Config, ["x"]) == Config("x")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["x", "--lrr", "3"], "unrecognized options: --lrr, 3; did you mean --lr? ("),
        (["x", "--lr", "high"], "--lr: could not convert string to float: 'high' ("),
        ([], "missing from script.py: a folder ("),
        (["x", "--no_quick"], "unrecognized options: --no_quick; did you mean --quick? ("),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line_with_what_was_meant(args, says, capsys):
    with pytest.raises(SystemExit) as e:
        read_command_line(Config, args, "script.py")
    printed = capsys.readouterr()
    assert e.value.code == 2 and not printed.out
    assert printed.err.startswith("error: ") and says in printed.err and printed.err.count("\n") == 1
    assert printed.err.endswith(" (script.py --help lists all)\n")


def test_what_is_not_a_refusal_passes_unchanged(capsys):
    with one_line_refusals():
        print("a warning", file=sys.stderr)
    assert capsys.readouterr().err == "a warning\n"
    with pytest.raises(SystemExit) as e:
        read_command_line(Config, ["--help"])
    assert e.value.code == 0 and "peak" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["pretrain.py bert-tiny", "plots.py loss runs", "prepare_c4.py docstrings"])
def test_every_script_refuses_so(script):
    words = [sys.executable, *script.split(), "--no_such_flag"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: unrecognized options: --no_such_flag") and done.stderr.count("\n") == 1
