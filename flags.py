"""Command lines: a dataclass's fields as flags, read by tyro; what it refuses is said in one line.

cfg = read_command_line(Config)                          # sys.argv; --help shows the comments beside the fields
cfg = read_command_line(Config, ["runs/x", "--lr", "1"])
"""

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import TypeVar

import tyro

T = TypeVar("T")
# a switch has one flag, --no_x where x is on by default, else --x; pretrain.py, whose presets differ, has both
OPTIONS = {"use_underscores": True, "config": (tyro.conf.FlagCreatePairsOff,)}


def read_command_line(
    config: type[T],
    args: Sequence[str] | None = None,
    prog: str | None = None,
    about: str = "",
    positional: bool = False,
) -> T:
    """A `config` from the command line `args`, default sys.argv[1:]. Exits with code 2 and one line on stderr if it
    does not fit. `prog` is what --help calls the script, `about` what it says above the flags; `positional`: fields
    without a default are given without their --name."""
    bare = (tyro.conf.PositionalRequiredArgs,) * positional
    options = OPTIONS | {"config": OPTIONS["config"] + bare}
    with one_line_refusals():
        return tyro.cli(config, args=args, prog=prog, description=about or config.__doc__, **options)


@contextmanager
def one_line_refusals() -> Iterator[None]:
    """Around a call of tyro: its box about a wrong command line becomes one line, with what was perhaps meant."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as e:
        text = said.getvalue()
        if e.code != 2 or "For full helptext" not in text:
            raise
        said.truncate(0)
        rows = [row.strip(" │") for row in text.splitlines() if row.strip() and row[0] not in "╭╰"]
        parts = [part.strip().splitlines() for part in re.split(r"^[─-]{5,}$", "\n".join(rows), flags=re.MULTILINE)]
        what, *more = parts if "╭" in text else parts[1:]  # without the box's characters its title is a part
        line = re.sub(r"(?<!\.)\.$", "", " ".join(" ".join(what).split()))
        line = re.sub(r"\bSTR | \(required\)", "", line)
        meant = [row.split()[0] for part in more for row in part if row.startswith("--")]
        hint = f"; did you mean {meant[0]}?" if meant and meant[0] not in re.findall(r"[\w-]+", line) else ""
        where = re.search(r"(\S+\.py.* --help)", " ".join(more[-1]))
        where = f" ({where[1]} lists all)" if where else ""
        print(f"error: {line[0].lower()}{line[1:]}{hint}{where}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        sys.stderr.write(said.getvalue())
