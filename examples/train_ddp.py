"""Train a recurrent layer in several processes, each on its part of every batch.

    torchrun --standalone --nproc-per-node=2 examples/train_ddp.py
    torchrun --standalone --nproc-per-node=2 examples/train_ddp.py --fsdp --cell rnn

The task is the adding problem of Hochreiter and Schmidhuber 1997: of a sequence of random numbers,
two are marked; the answer is their sum. Answering always 1 gives a squared error of 1/6.

Without torchrun it is one process, and gives the same losses, as the gradients are the same."""

from __future__ import annotations

import argparse
import gc
import os
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastrnn

CELLS = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}


class Adder(nn.Module):
    """The last state of a recurrent layer, and one number from it."""

    def __init__(self, cell: str, hidden_size: int) -> None:
        super().__init__()
        self.layer = CELLS[cell](2, hidden_size)
        self.answer = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.layer(x)
        answer: Tensor = self.answer(output[-1]).squeeze(-1)
        return answer


def adding_problem(length: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences [length, batch, 2] of numbers and marks, and the sums [batch] of the marked."""
    numbers = torch.rand(length, batch, generator=generator)
    places = torch.rand(length, batch, generator=generator).argsort(0)[:2]
    marks = torch.zeros(length, batch).scatter(0, places, 1.0)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def distributed(model: nn.Module, shard: bool) -> nn.Module:
    """The model, synchronized among the processes."""
    if not shard:
        return DistributedDataParallel(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    model = distributed(Adder(arguments.cell, arguments.hidden), arguments.fsdp)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    started = time.perf_counter()
    if rank == 0:
        print(f"{world} processes, {torch.get_num_threads()} threads each")
    for step in range(1, arguments.steps + 1):
        x, target = adding_problem(arguments.length, arguments.batch, generator)
        x, target = x[:, rank::world], target[rank::world]
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        if step % max(arguments.steps // 10, 10) == 0:
            mean = loss.detach() / world
            dist.all_reduce(mean)
            if rank == 0:
                seconds = time.perf_counter() - started
                print(f"step {step}: squared error {mean.item():.4f}, {seconds:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="The adding problem in several processes.")
    parser.add_argument("--cell", choices=CELLS, default="gru")
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters (FSDP2)")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128, help="of all processes together")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    single = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in single.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")
    train(arguments)
    dist.barrier()  # nobody leaves while another still talks
    gc.collect()  # FSDP's cycles hold the group, whose threads must end before the interpreter does
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
