"""Distils from Python in several processes, in a program that uses torch.distributed itself.

torchrun --nproc-per-node=2 examples/several_processes.py --losses dm,dkkt --ipc 10

Every process calls `ddkit.distill(..., distributed=True)`; all get the run, and the first writes its files.
"""

from __future__ import annotations

import argparse

import torch.distributed as distributed

import ddkit


def main() -> None:
    """Parses the command line, joins the group that torchrun started, and distils."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", default="dm,dkkt", help="losses, separated by commas (default: dm,dkkt)")
    parser.add_argument("--ipc", type=int, default=1, help="synthetic images per class (default: 1)")
    parser.add_argument("--steps", type=int, help="updates of the synthetic set (default: the recipe's)")
    given = parser.parse_args()
    distributed.init_process_group("gloo")  # ddkit uses the group that is there, and leaves it as it was
    run = ddkit.distill(losses=given.losses, ipc=given.ipc, steps=given.steps, distributed=True)
    if distributed.get_rank() == 0:
        print(f"{distributed.get_world_size()} processes, {run.steps} steps in {run.seconds:.1f} s: {run.path}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
