"""A small self-attentive sequence model of our own: what comes after what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from metarec_gym import seeding
from metarec_gym.devices import single_thread
from metarec_gym.recommenders.base import JSON, FitRows, Strategy

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset


class SasRec(Strategy):
    """Causal self-attention over the last items, trained to predict each next item among all items.

    Kang and McAuley, "Self-attentive sequential recommendation", ICDM 2018, with three changes: a learned bias per
    distance between two items takes the place of position embeddings (Raffel et al., "Exploring the limits of transfer
    learning", JMLR 2020), so a history of any length is scored alike and left padding means nothing; the loss is the
    full softmax cross-entropy in place of one sampled negative; and the output has an item bias that starts at log
    popularity.

    The weights are plain buffers and the forward pass is a function of them: `fit` trains copies with gradients and
    freezes the result. Dropout and the order of the batches come from the seed, never from a global generator.

    Args:
        name: Name in the pool.
        width: Length of the item embeddings.
        blocks: Attention blocks.
        heads: Attention heads.
        max_length: Newest items that are read.
        steps: Training steps, whatever the size of the log: the time of a fit is known beforehand.
        batch_size: Windows of `max_length` items in a training step.
        learning_rate: Peak step size of AdamW (warm-up of a tenth, then linear decay to 0).
        weight_decay: Decoupled decay of every matrix.
        dropout: Share of hidden units dropped in training.
    """

    kind: ClassVar[str] = "sequential"

    def __init__(
        self,
        name: str = "sasrec",
        width: int = 64,
        blocks: int = 1,
        heads: int = 2,
        max_length: int = 50,
        steps: int = 260,
        batch_size: int = 64,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        dropout: float = 0.4,
    ) -> None:
        super().__init__(name)
        if width % heads:
            raise ValueError(f"width is a multiple of heads, came width={width} and heads={heads}")
        self.width = width
        self.blocks = blocks
        self.heads = heads
        self.max_length = max_length
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        for key in self._initial(0, torch.Generator()):
            self.register_buffer(key, torch.zeros(0))

    def _initial(self, n_items: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The untrained weights."""
        width = self.width

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.randn(*shape, generator=generator) * scale

        weights = {"item_embedding": normal(n_items, width, scale=width**-0.5), "item_bias": torch.zeros(n_items)}
        for block in range(self.blocks):
            weights |= {
                f"norm1_{block}": torch.ones(width),
                f"attend_{block}": normal(3 * width, width, scale=width**-0.5),
                f"merge_{block}": normal(width, width, scale=width**-0.5 / self.blocks),
                f"distance_{block}": torch.zeros(self.heads, self.max_length),
                f"norm2_{block}": torch.ones(width),
                f"widen_{block}": normal(2 * width, width, scale=width**-0.5),
                f"narrow_{block}": normal(width, 2 * width, scale=(2 * width) ** -0.5 / self.blocks),
            }
        weights["norm_out"] = torch.ones(width)
        return weights

    def _forward(self, weights: dict[str, Tensor], items: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """State after every item, (batch, length, width); items int64 (batch, length) with -1 anywhere on the left."""
        batch, length = items.shape
        # embedding, not indexing: the gradient of an indexed tensor is summed by several threads in no fixed order
        hidden = functional.embedding(items.clamp(min=0), weights["item_embedding"]) * math.sqrt(self.width)
        hidden = self._drop(hidden, generator)
        place = torch.arange(length, device=items.device)
        distance = place[:, None] - place[None, :]
        # a padded place may look at itself only: its output is never used, and a softmax over nothing would be NaN
        allowed = ((distance >= 0) & (items >= 0)[:, None, :]) | (distance == 0)
        for block in range(self.blocks):
            normed = functional.layer_norm(hidden, (self.width,), weights[f"norm1_{block}"])
            query, key, value = (
                part.view(batch, length, self.heads, self.width // self.heads).transpose(1, 2)
                for part in (normed @ weights[f"attend_{block}"].T).chunk(3, dim=2)
            )
            logits = query @ key.transpose(2, 3) / math.sqrt(self.width / self.heads)
            near = functional.embedding(distance.clamp(min=0), weights[f"distance_{block}"].T)
            logits = logits + near.permute(2, 0, 1)
            attention = torch.softmax(logits.masked_fill(~allowed[:, None], -1e9), dim=3)
            mixed = (attention @ value).transpose(1, 2).reshape(batch, length, self.width)
            hidden = hidden + self._drop(mixed @ weights[f"merge_{block}"].T, generator)
            normed = functional.layer_norm(hidden, (self.width,), weights[f"norm2_{block}"])
            inner = functional.gelu(normed @ weights[f"widen_{block}"].T)
            hidden = hidden + self._drop(inner @ weights[f"narrow_{block}"].T, generator)
        return functional.layer_norm(hidden, (self.width,), weights["norm_out"])

    def _drop(self, hidden: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None or self.dropout == 0.0:
            return hidden
        keep = torch.rand(hidden.shape, generator=generator) >= self.dropout
        return hidden * keep.to(hidden.device) / (1.0 - self.dropout)

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        generator = seeding.torch_generator(seed, "train")
        weights = self._initial(rows.n_items, seeding.torch_generator(seed, "weights"))
        # log popularity: the model starts from the best ranking that ignores the history
        weights["item_bias"] = torch.log((rows.counts() + 0.5) / rows.item.numel())
        weights = {key: weight.to(rows.device).requires_grad_() for key, weight in weights.items()}
        decayed = [weight for weight in weights.values() if weight.ndim == 2]
        others = [weight for weight in weights.values() if weight.ndim != 2]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=self.learning_rate,
            betas=(0.9, 0.98),
        )
        with single_thread():
            self._descend(weights, rows, generator, optimizer)
        for key, weight in weights.items():
            setattr(self, key, weight.detach().cpu())

    def _descend(
        self, weights: dict[str, Tensor], rows: FitRows, generator: torch.Generator, optimizer: torch.optim.Optimizer
    ) -> None:
        for step, drawn in enumerate(self._batches(rows, generator)):
            batch = drawn.to(rows.device)
            done = step / self.steps
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * min(1.0, 10 * done + 1e-2, (1.0 - done) / 0.9)
            state = self._forward(weights, batch[:, :-1], generator)
            predicted = (batch[:, :-1] >= 0) & (batch[:, 1:] >= 0)
            logits = state[predicted] @ weights["item_embedding"].T + weights["item_bias"]
            loss = functional.cross_entropy(logits, batch[:, 1:][predicted])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _batches(self, rows: FitRows, generator: torch.Generator) -> Iterator[Tensor]:
        """`steps` batches of windows, each epoch cut and shuffled anew; none where no user has two events."""
        given = 0
        while given < self.steps:
            windows = _windows(rows, self.max_length + 1, generator)
            if windows.shape[0] == 0:
                return
            for batch in windows[torch.randperm(windows.shape[0], generator=generator)].split(self.batch_size):
                if given < self.steps:
                    given += 1
                    # columns that are padding in the whole batch cost time and change nothing
                    yield batch[:, int((batch >= 0).sum(dim=1).max()) * -1 :]

    def _score(self, histories: Tensor) -> Tensor:
        weights = {key: buffer for key, buffer in self._buffers.items() if buffer is not None}
        # the newest column of an empty history is padding; any finite row will do, so one column at least must exist
        newest = functional.pad(histories, (1, 0), value=-1)[:, -self.max_length :]
        state = self._forward(weights, newest)[:, -1]
        return state @ weights["item_embedding"].T + weights["item_bias"]

    def _flops(self) -> float:
        length, width = self.max_length, self.width
        block = 2.0 * length * width * (3 * width + width + 4 * width) + 4.0 * length**2 * width
        return self.blocks * block + 2.0 * width * self.n_items

    def _settings(self) -> dict[str, JSON]:
        return {
            "width": self.width,
            "blocks": self.blocks,
            "heads": self.heads,
            "max_length": self.max_length,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "dropout": self.dropout,
        }


def _windows(rows: FitRows, length: int, generator: torch.Generator) -> Tensor:
    """Cuts each user's events into windows of `length`, from a random start; int64 (n_windows, length), -1 on the left.

    Neighbouring windows share one item, so that every event but a user's first is predicted once.
    """
    counts = torch.bincount(rows.user, minlength=rows.n_users)
    starts = counts.cumsum(0) - counts
    # where the first window ends varies from epoch to epoch, so that early and late places see every item
    first_end = 2 + torch.rand(rows.n_users, generator=generator).mul(length - 1).long()
    windows = []
    for begin, count, end in zip(starts.tolist(), counts.tolist(), first_end.tolist(), strict=True):
        items = rows.item[begin : begin + count]
        low = 0
        while low < count - 1:
            high = min(end, count)
            windows.append(functional.pad(items[low:high], (length - (high - low), 0), value=-1))
            low, end = high - 1, high - 1 + length
    return torch.stack(windows) if windows else torch.zeros(0, length, dtype=torch.int64)
