"""Two processes over gloo: DDP and FSDP2 give the gradients and steps of one process. Activation
checkpointing. Lightning."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import LAYERS, STEPS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastrnn

layers = pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
T, B, I, H = 5, 8, 4, 6
WORLD = 2
HANG = 300  # seconds after which processes that wait for each other are given up
CELLS = {param.id: param.values[1:] for param in LAYERS}


class Model(nn.Module):
    def __init__(self, kind: Any, options: Any) -> None:
        super().__init__()
        self.before = nn.Linear(I, I)
        self.layer = kind(I, H, 2, bidirectional=True, **options)
        self.after = nn.Linear(2 * H, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.layer(self.before(x), lengths=lengths)
        result: Tensor = self.after(y)
        return result


def seeded(cell: str) -> Model:
    torch.manual_seed(0)
    kind, options = CELLS[cell]
    return Model(kind, options).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, B, I, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, T + 1, (B,), generator=generator)


def whole(t: Tensor) -> Tensor:
    """A tensor that may be in shards."""
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t.clone()


def train(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Two steps; the first one's gradients and the parameters after the second."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    found: dict[str, Tensor] = {}
    for _ in range(2):
        optimizer.zero_grad()
        for k, (x, lengths) in enumerate(parts):
            last = k == len(parts) - 1
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = last
            (model(x, lengths).square().mean() / len(parts)).backward()
        names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
        for name, p in zip(names, model.parameters(), strict=True):
            assert p.grad is not None
            found.setdefault(f"{name}.grad", whole(p.grad))
        optimizer.step()
    return found | {n: whole(p) for n, p in zip(names, model.parameters(), strict=True)}


def mine(rank: int) -> tuple[Tensor, Tensor]:
    x, lengths = batch()
    return x[:, rank::WORLD], lengths[rank::WORLD]


def halves(part: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    (x, lengths), half = part, len(part[1]) // 2
    return [(x[:, :half], lengths[:half]), (x[:, half:], lengths[half:])]


def ddp(cell: str, rank: int) -> dict[str, Tensor]:
    return train(DistributedDataParallel(seeded(cell)), [mine(rank)])


def ddp_accumulated(cell: str, rank: int) -> dict[str, Tensor]:
    """Gradients of two parts of the batch, synchronized once, as views of DDP's buckets."""
    model = DistributedDataParallel(seeded(cell), gradient_as_bucket_view=True)
    return train(model, halves(mine(rank)))


def ddp_compiled(cell: str, rank: int) -> dict[str, Tensor]:
    model = DistributedDataParallel(seeded(cell))
    model.compile(backend="aot_eager")
    return train(model, [mine(rank)])


def fsdp(cell: str, rank: int) -> dict[str, Tensor]:
    model, mesh = seeded(cell), init_device_mesh("cpu", (WORLD,))
    fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, [mine(rank)])


def fsdp_checkpointed(cell: str, rank: int) -> dict[str, Tensor]:
    model, mesh = seeded(cell), init_device_mesh("cpu", (WORLD,))
    layer = model.layer
    run = layer.forward
    layer.forward = lambda *args, **options: checkpoint(run, *args, use_reentrant=False, **options)
    fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, [mine(rank)])


WAYS: list[Callable[[str, int], dict[str, Tensor]]] = [
    ddp,
    ddp_accumulated,
    ddp_compiled,
    fsdp,
    fsdp_checkpointed,
]


def process(rank: int, folder: str) -> None:
    """One of the two: everything for every cell, into a file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=HANG),
    )
    found = {(way.__name__, cell): way(cell, rank) for way in WAYS for cell in CELLS}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()  # nobody leaves while the other still talks
    gc.collect()  # FSDP's cycles hold the group, whose threads must end before the interpreter does
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("distributed")
    context = torch.multiprocessing.start_processes(
        process, (str(folder),), nprocs=WORLD, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + HANG
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for one in context.processes:
                one.kill()
            pytest.fail(f"the processes did not end within {HANG} s")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_two_processes_are_one(results: list[Any], way: Any, cell: str) -> None:
    expected = train(seeded(cell), [batch()])
    for found in results:
        torch.testing.assert_close(found[way.__name__, cell], expected)


@pytest.mark.parametrize("reentrant", [False, True])
@layers
def test_checkpoint(torch_kind: Any, kind: Any, options: Any, reentrant: bool) -> None:
    """The layer runs again in the backward pass, over the same masks of both dropouts."""
    layer = kind(I, H, 2, dropout=0.5, weight_dropout=0.5, **options)
    x = torch.randn(T, B, I, requires_grad=True)
    found = []
    for through in (lambda f, *args: f(*args), lambda *a: checkpoint(*a, use_reentrant=reentrant)):
        torch.manual_seed(2)
        layer.zero_grad()
        x.grad = None
        y, _ = through(layer, x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_checkpointed_cell(torch_kind: Any, kind: Any, options: Any) -> None:
    cell, x = kind(I, H, **options), torch.randn(B, I, requires_grad=True)
    grads = []
    for through in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        state = through(cell, x)
        h = state[0] if isinstance(state, tuple) else state
        grads.append(torch.autograd.grad(h.square().sum(), [x, *cell.parameters()]))
    assert all(map(torch.equal, *grads))


def test_example_under_torchrun() -> None:
    """The command that its first lines give."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = subprocess.run(
        [*command, "examples/train_ddp.py", "--steps", "20"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert found.returncode == 0, found.stderr
    assert "2 processes" in found.stdout
    assert found.stdout.count("step ") == 2, found.stdout


def test_lightning(tmp_path: Path) -> None:
    """A LightningModule trains, saves a checkpoint and loads it, and does as torch.nn's does."""
    import lightning as pl

    class Regression(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.head = nn.LSTM(I, H, 2, batch_first=True), nn.Linear(H, 1)

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, target = batch
            loss = (self.head(self.layer(x)[0][:, -1]) - target).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    torch.manual_seed(1)
    x = torch.randn(32, T, I)
    data = torch.utils.data.TensorDataset(x, x.sum((1, 2), keepdim=True)[:, 0])
    losses = []
    for convert in (fastrnn.convert, lambda module: module):
        module = convert(Regression())
        trainer = pl.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            gradient_clip_val=1.0,
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
        losses.append(trainer.callback_metrics["loss"])
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    saved = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    again = fastrnn.convert(Regression.load_from_checkpoint(saved))
    torch.testing.assert_close(again.layer(x)[0], module.layer(x)[0])
