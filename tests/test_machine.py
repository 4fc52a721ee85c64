"""machine.py: command lines as every script reads them."""

from dataclasses import dataclass

import pytest
import tyro
from conftest import python, refused

from machine import read_command_line, script


@dataclass
class Config:
    run: tyro.conf.Positional[str]  # a folder
    lr: float = 1.0  # peak
    quick: bool = False
    careful: bool = True


def test_fields_are_read_with_underscores_and_switches_only_from_their_default():
    args = ["x", "--lr", "2", "--quick", "--no_careful"]
    assert read_command_line(Config, args) == Config("x", 2.0, True, False)
    assert read_command_line(Config, ["x"]) == Config("x")


@pytest.mark.parametrize(("args", "says"), [
    (["x", "--lrr", "3"], ("--lrr", "--lr ")), (["x", "--lr", "high"], ("--lr", "'high'")),
    ([], ("a folder",)), (["x", "--no_quick"], ("--no_quick", "--quick")),
])
def test_a_wrong_flag_is_named_with_what_was_meant(args, says, capsys):
    with pytest.raises(SystemExit) as e:
        read_command_line(Config, args)
    printed = capsys.readouterr()
    assert e.value.code == 2 and not printed.out
    assert all(words in printed.err for words in says)


def test_what_the_user_can_mend_is_one_line():
    def run(cfg: Config) -> float:
        if cfg.quick:
            raise ValueError(f"{cfg.run} is\nno folder")
        return cfg.lr

    main = script(run, Config)
    assert main(["x"]) == 1.0
    with refused("error: x is"):
        main(["x", "--quick"])


@pytest.mark.parametrize("file", ["pretrain.py bert-tiny", "plots.py loss runs"])
def test_scripts_that_read_their_command_line_themselves_refuse_so_too(file):
    ended = python(*file.split(), "--no_such_flag", code=2)
    assert not ended.stdout and "--no_such_flag" in ended.stderr
