"""Which kernels a GPU spends pretraining in: pretrain.py under PyTorch's profiler.

    python -m bench.profile mosaic-base --data data/c4 --max_steps 4 --name profiled

Takes pretrain.py's arguments. Prints the kernels by their time on the device, as `bench.dryrun`
models them, and writes a trace for chrome://tracing into the run's folder.
"""

import sys

from torch.profiler import profile

import pretrain

if __name__ == "__main__":
    with profile() as profiled:
        run = pretrain.train(*pretrain.read_command_line(sys.argv[1:]))
    print(profiled.key_averages().table(
        sort_by="self_device_time_total", row_limit=50, max_name_column_width=60))
    profiled.export_chrome_trace(f"{run}/trace.json")
