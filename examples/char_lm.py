"""A character-level language model of Python's standard library, by torch.nn and by fastrnn.

    python examples/char_lm.py --cell lstm

Three trainings take turns, step by step, on the same batches from the same seed:

    torch.nn    an embedding, stacked recurrent layers of torch.nn and a linear layer
    fastrnn     the same model after fastrnn.convert
    rounding    torch.nn again, with every initial weight moved by its last bit

Training amplifies differences, so after some hundred steps no two implementations agree to the last
digits, however right they are. The third training measures how far rounding alone carries the
loss; fastrnn's loss has to stay within that, or the program fails. At the end the model that
fastrnn trained writes some text.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrnn

PACKAGES = ("json", "asyncio", "email", "http", "logging")
LEAST_BYTES = 500_000
HELD_OUT = 0.05  # of the text, for the last loss
ORDER_OF_MAGNITUDE = 10.0


class Corpus:
    """The sources of a few packages of the standard library, in a fixed order, as indices."""

    def __init__(self) -> None:
        library = Path(sysconfig.get_path("stdlib"))
        files = [file for name in PACKAGES for file in sorted((library / name).rglob("*.py"))]
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        if len(text) < LEAST_BYTES:
            raise SystemExit(f"{library} has only {len(text)} characters of {', '.join(PACKAGES)}")
        self.characters = sorted(set(text))
        self.index = {character: index for index, character in enumerate(self.characters)}
        data = torch.tensor([self.index[character] for character in text])
        held_out = int(len(data) * HELD_OUT)
        self.training, self.validation = data[:-held_out], data[-held_out:]
        self.name = f"{len(files)} files of {', '.join(PACKAGES)}: {len(text):,} characters"

    def batch(self, length: int, rows: int, generator: torch.Generator) -> Tensor:
        """Random excerpts, [length + 1, rows]."""
        last = len(self.training) - length - 1
        starts = torch.randint(last, (rows,), generator=generator)
        return torch.stack([self.training[start : start + length + 1] for start in starts], 1)

    def held_out(self, length: int) -> Tensor:
        """All of the held-out text, [length + 1, rows]."""
        rows = len(self.validation) // (length + 1)
        return self.validation[: rows * (length + 1)].view(rows, length + 1).t()


class CharModel(nn.Module):
    def __init__(self, cell: str, characters: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, hidden)
        self.recurrent: nn.RNNBase = getattr(nn, cell.upper())(hidden, hidden, layers)
        self.head = nn.Linear(hidden, characters)

    def forward(self, indices: Tensor, state: object = None) -> tuple[Tensor, object]:
        """[T, B] -> logits [T, B, characters] and the state after the last step."""
        hidden, state = self.recurrent(self.embedding(indices), state)
        return self.head(hidden), state

    def loss(self, text: Tensor) -> Tensor:
        """Mean cross entropy of each next character, in nats."""
        logits, _ = self(text[:-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), text[1:].flatten())


@dataclass
class Training:
    model: CharModel
    rate: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Adam's own epsilon lets gradients that are all rounding move a weight as far as any other.
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.rate, eps=1e-5)

    def step(self, text: Tensor) -> None:
        start = time.perf_counter()
        loss = self.model.loss(text)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    @property
    def milliseconds(self) -> float:
        return statistics.median(self.seconds) * 1e3


class Trainings:
    """The three trainings, and what their losses and times say about each other."""

    def __init__(self, options: argparse.Namespace, characters: int) -> None:
        def model() -> CharModel:
            torch.manual_seed(options.seed)
            return CharModel(options.cell, characters, options.hidden, options.layers)

        self.torch = Training(model(), options.rate)
        self.fastrnn = Training(fastrnn.convert(model()), options.rate)
        self.rounding = Training(moved_by_last_bit(model()), options.rate)
        self.turns = [self.torch, self.fastrnn, self.rounding]

    def step(self, text: Tensor) -> None:
        for training in self.turns:
            training.step(text)
        self.turns.append(self.turns.pop(0))  # so that each comes first as often as the others

    def distances(self, training: Training) -> list[float]:
        """Of its losses from torch.nn's: the largest up to each step."""
        largest, reached = 0.0, []
        for loss, expected in zip(training.losses, self.torch.losses, strict=True):
            largest = max(largest, abs(loss - expected))
            reached.append(largest)
        return reached

    def first_disagreement(self) -> int | None:
        """The first step at which fastrnn is further from torch.nn than rounding explains.

        Differences grow exponentially from roundings that are not the same ones, so an order of
        magnitude is allowed, and the rounding of the loss itself is added.
        """
        epsilon = torch.finfo(torch.float32).eps
        ours, rounding = self.distances(self.fastrnn), self.distances(self.rounding)
        for step, loss in enumerate(self.torch.losses):
            # The negation catches NaN as well.
            if not ours[step] <= ORDER_OF_MAGNITUDE * (rounding[step] + epsilon * loss):
                return step
        return None


def moved_by_last_bit(model: CharModel) -> CharModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
    return model


def train(trainings: Trainings, corpus: Corpus, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    progress = tqdm(range(options.steps), desc="training", unit="step")
    for _ in progress:
        trainings.step(corpus.batch(options.length, options.batch, generator))
        progress.set_postfix(
            loss=f"{trainings.fastrnn.losses[-1]:.3f}",
            torch=f"{trainings.torch.milliseconds:.1f}ms",
            fastrnn=f"{trainings.fastrnn.milliseconds:.1f}ms",
        )


def report(trainings: Trainings, corpus: Corpus, options: argparse.Namespace) -> None:
    ours, rounding = trainings.distances(trainings.fastrnn), trainings.distances(trainings.rounding)
    print("\n  step   torch.nn    fastrnn   largest difference   by rounding alone")
    every = max(1, options.steps // 15)
    for step in sorted({*range(0, options.steps, every), options.steps - 1}):
        losses = f"{trainings.torch.losses[step]:>11.6f}{trainings.fastrnn.losses[step]:>11.6f}"
        print(f"{step:>6}{losses}{ours[step]:>21.1e}{rounding[step]:>20.1e}")
    with torch.inference_mode():
        text = corpus.held_out(options.length)
        before, after = (t.model.loss(text).item() for t in (trainings.torch, trainings.fastrnn))
    print(f"\nheld-out loss: torch.nn {before:.4f}, fastrnn {after:.4f} nats a character")
    print(
        f"time a step (median of {options.steps}, {torch.get_num_threads()} threads): "
        f"torch.nn {trainings.torch.milliseconds:.2f} ms, "
        f"fastrnn {trainings.fastrnn.milliseconds:.2f} ms, ratio {ratio(trainings):.2f}"
    )


def ratio(trainings: Trainings) -> float:
    return trainings.torch.milliseconds / trainings.fastrnn.milliseconds


def sample(model: CharModel, corpus: Corpus, options: argparse.Namespace) -> str:
    """Writes on from the prompt, one character and one timestep at a time."""
    torch.manual_seed(options.seed)
    text: list[str] = list(options.prompt)
    indices = torch.tensor([[corpus.index[character]] for character in text])  # [T, 1]
    state = None
    with torch.inference_mode():
        for _ in range(options.sample):
            logits, state = model(indices, state)
            probabilities = (logits[-1, 0] / options.temperature).softmax(0)
            indices = torch.multinomial(probabilities, 1)[None]  # [1, 1]
            text.append(corpus.characters[int(indices)])
    return "".join(text)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def draw(trainings: Trainings, options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    named = {"torch.nn": trainings.torch, "fastrnn": trainings.fastrnn}
    for (name, training), style in zip(
        named.items(), ({"linewidth": 4, "alpha": 0.4}, {}), strict=True
    ):
        left.plot(running_mean(training.losses, 10), label=name, **style)
    left.set(title="loss, mean of 10 steps", xlabel="step", ylabel="nats a character")
    middle.semilogy(trainings.distances(trainings.fastrnn), label="fastrnn")
    middle.semilogy(trainings.distances(trainings.rounding), label="rounding alone")
    middle.set(title="largest difference from torch.nn's loss so far", xlabel="step")
    bars = right.bar(list(named), [training.milliseconds for training in named.values()])
    right.bar_label(bars, fmt="%.1f")
    right.set(title=f"ms a training step; ratio {ratio(trainings):.2f}")
    left.legend()
    middle.legend()
    figure.suptitle(f"{options.cell}, {options.layers} layers of {options.hidden} units")
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=120)
    print(f"\nwritten: {options.plot}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--length", type=int, default=100, help="characters of an excerpt")
    parser.add_argument("--batch", type=int, default=16, help="excerpts of a step")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=3e-3, help="Adam's learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", default="def ", help="where the sampled text begins")
    parser.add_argument("--sample", type=int, default=400, help="characters to sample")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--plot", type=Path, default=Path("out/char_lm.png"))
    return parser.parse_args()


def main() -> int:
    options = parse()
    corpus = Corpus()
    print(f"text: Python's own sources, {corpus.name}, {len(corpus.characters)} distinct")
    trainings = Trainings(options, len(corpus.characters))
    train(trainings, corpus, options)
    report(trainings, corpus, options)
    print(f"\nsampled at temperature {options.temperature}:\n")
    print(sample(trainings.fastrnn.model, corpus, options))
    draw(trainings, options)
    step = trainings.first_disagreement()
    if step is not None:
        print(f"FAILED: from step {step} on the losses differ by more than rounding explains")
        return 1
    print("the two loss curves are equal to rounding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
