"""Measures this machine; each mode writes what it found to results/<mode>-<device>.json.

    python bench.py kernels    # the Triton kernels against their peers and the GPU's roofline (needs a GPU)
    python bench.py step       # a whole training step against transformers' encoders
    python bench.py data       # text -> token shards against datasets and tokenizers

`python bench.py MODE --help` lists a mode's settings.
"""

import importlib
import sys

from flags import read_command_line

MODES = ("kernels", "step", "data")  # bench_<mode>.py holds `Config`, and `run(cfg)` that measures, prints and writes


def main() -> None:
    """Command line: what to measure, then any setting of it."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if mode in ("-h", "--help"):
        print(__doc__.strip())
        return
    if mode not in MODES:
        raise SystemExit(f"error: bench.py {mode}: the modes are {', '.join(MODES)}")
    module = importlib.import_module(f"bench_{mode}")  # the others' imports take seconds, or are not installed
    prog = f"bench.py {mode}"
    module.run(read_command_line(module.Config, sys.argv[2:], prog, module.__doc__))


if __name__ == "__main__":
    main()
