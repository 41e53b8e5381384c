"""The frozen judge: what a user does with a slate. Loaded, never trained; only torch is needed to run it.

For user u, item i, outcome o and the state s that the user's history gives:

    logit p_o(u, i, s) = scale_o * (tower_o(s) . v_oi + b_oi + z_uo . phi(i, s) + sd_o * eps_ui) + shift_o + position

* A judge has one or more members: networks of equal standing, fitted on resampled users. tower, v, b, scale and shift are a
  member's own; the state and the users' coefficients are shared. An episode meets one member, so what the log leaves open about
  f shows as a difference between episodes.
* `s` is a linear recurrent state (exponential averages of item vectors at several decays, their running mean, the count): the
  diagonal recurrence of linear recurrent units (Orvieto et al., ICML 2023) with fixed decays; `tower` is a small network on it.
* `phi` are named, frozen features: static ones of the item, its popularity trend at the time, and its co-occurrence with the
  recent and the whole history.
* `z_u` are the user's random coefficients, drawn once per (world seed, user) from their posterior; no policy ever sees them.
* The first outcome is the gate (the user takes the item at all); the others are conditional on it.

Nothing here knows which strategy showed the item: the same item in the same state and position gives the same answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from metarec_gym.fixed_shapes import may_look
from metarec_gym.seeding import fold_in, mix, normal

ROW_MULTIPLE = 16
"""Batches are padded to a multiple of this many rows: matrix kernels then give each row the same bits in any batch on CPU."""

_FEW_ROWS = 64
"""Up to this many rows it is faster to ask every member about all of them than to sort the rows."""

_CACHED_ROWS = 512
"""Rows whose items are scored at once on CPU."""

DYNAMIC_FEATURES = ("trend", "cooccurrence_recent", "cooccurrence_history")
"""The last entries of phi: of the date, and of the state (two); the ones before them are static."""

RETURN_FEATURES = ("log_session_engaged", "log_sessions", "log_previous_gap", "first_session")
"""What the time to a user's next session depends on: log(1 + items taken in the session just ended), log(1 + sessions so far, it
included), log(1 + hours of the gap before it, 0 if none), and 1 if it was the user's first."""

EXPOSURE_DECAY = 0.8
"""What is left of the exposure to a category after one more slate."""

_SHAPES = {
    "item_input": "(n_items, d) frozen item vectors of the recurrence",
    "decays": "(n_decays,) in (0, 1); the first is the fastest and defines `recent`",
    "hidden_weight": "(n_members, hidden, (n_decays + 1) * d + 1)",
    "hidden_bias": "(n_members, hidden)",
    "tower_weight": "(n_members, n_outcomes * rank, hidden)",
    "tower_bias": "(n_members, n_outcomes * rank)",
    "item_output": "(n_members, n_items, n_outcomes, rank)",
    "item_bias": "(n_members, n_items, n_outcomes)",
    "calibration": "(n_members, n_outcomes, 2): scale, shift",
    "static_features": "(n_items, n_static)",
    "trend": "(n_periods, n_items): log popularity of the period before against all time, standardised; row 0 is 0",
    "dynamic_scale": "(2,) multiplies the two co-occurrence features",
    "effect_mean": "(n_users, n_outcomes, n_static + 3) posterior mean of z_u",
    "effect_chol": "(n_users, n_outcomes, n_static + 3, n_static + 3) Cholesky factor of its covariance",
    "pair_sd": "(n_outcomes,) sd of eps_user,item; 0 where the log cannot identify it",
}
_TIMING_SHAPES = {
    "position_logit": "(max_slate_size,) added to the gate's logit",
    "fatigue": "(1,) added to the gate's logit for each unit of exposure to the item's categories in the session",
    "leaving": "(4,) logit of leaving after a request: intercept (-inf = never), weight per request since the last engagement, "
    "per share of the slate taken, per mean exposure of the slate",
    "return_edges": "(n_bins + 1,) hours, ascending; n_bins 0 = the log does not say when users come back",
    "return_baseline": "(n_bins,) logit of coming back in a bin, given not before",
    "return_weight": f"({len(RETURN_FEATURES)},) weights of RETURN_FEATURES, the same in every bin",
}


def logistic(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)); unlike torch.sigmoid its vector and scalar paths agree bit for bit on CPU."""
    return 1.0 / (1.0 + torch.exp(-x))


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]` for an index of any shape; on CPU a whole row is copied at once, several times as fast as by `[]`."""
    return table.index_select(0, index.reshape(-1)).view(*index.shape, *table.shape[1:])


class Judge:
    """What every frozen judge has: outcomes, content hash, device, and how its users leave and come back.

    Args:
        tensors: Named tensors, float32 unless a subclass says otherwise.
        outcomes: Outcome names, the gate first.
        feature_names: Names of phi; empty for a judge without random coefficients.
    """

    n_users: int
    n_items: int
    n_outcomes: int
    n_members: int
    state_dim: int
    has_pair_noise: bool

    def __init__(
        self, tensors: Mapping[str, Tensor], outcomes: tuple[str, ...], feature_names: tuple[str, ...]
    ) -> None:
        self.tensors: dict[str, Tensor] = dict(tensors)
        self.outcomes = tuple(outcomes)
        self.feature_names = tuple(feature_names)
        self.hash = self._content_hash()

    def _content_hash(self) -> str:
        digest = hashlib.sha256(repr((self.outcomes, self.feature_names)).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _check_timing(self) -> None:
        t = self.tensors
        bins = t["return_baseline"].shape[0]
        expected = {
            "fatigue": (1,),
            "leaving": (4,),
            "return_edges": (bins + 1 if bins else t["return_edges"].shape[0],),
            "return_weight": (len(RETURN_FEATURES),),
        }
        _check_shapes(t, expected)

    @property
    def device(self) -> torch.device:
        """Where the tables lie."""
        return self.tensors["leaving"].device

    def to(self, device: torch.device | str) -> Self:
        """The same judge with its tables on `device` (self when they are there already)."""
        if self.device == torch.device(device):
            return self
        return type(self)({k: v.to(device) for k, v in self.tensors.items()}, self.outcomes, self.feature_names)

    def replaced(self, **tensors: Tensor) -> Self:
        """The same judge with some tensors replaced, e.g. `replaced(leaving=...)`."""
        unknown = sorted(set(tensors) - set(self.tensors))
        if unknown:
            raise ValueError(f"the judge has no tensors {unknown}; it has {sorted(self.tensors)}")
        return type(self)({**self.tensors, **tensors}, self.outcomes, self.feature_names)

    @property
    def has_leaving(self) -> bool:
        """Whether users may leave after a request."""
        return bool(torch.isfinite(self.tensors["leaving"][0]))

    @property
    def has_return(self) -> bool:
        """Whether the log said when users come back."""
        return int(self.tensors["return_baseline"].shape[0]) > 0

    def leave_prob(self, unrewarded: Tensor, quality: Tensor | None = None, repetition: Tensor | None = None) -> Tensor:
        """Probability of leaving after a request; float32 (rows,) all.

        Args:
            unrewarded: Requests since the last one in which an item was taken, the present one included.
            quality: Share of the slate that was taken; None = 0.
            repetition: Mean exposure to the categories of the slate's items before it was shown; None = 0.
        """
        weight = self.tensors["leaving"]
        logit = weight[0] + weight[1] * unrewarded
        if quality is not None:
            logit = logit + weight[2] * quality
        if repetition is not None:
            logit = logit + weight[3] * repetition
        return logistic(logit)

    def return_hazards(self, covariates: Tensor) -> Tensor:
        """Probability of coming back in each bin of the gap, given not before.

        Args:
            covariates: float32 (rows, 4), `RETURN_FEATURES`.

        Returns:
            float32 (rows, n_bins).
        """
        # a product of 4 columns written as a sum: a matrix kernel would round rows by their number
        linear = (covariates * self.tensors["return_weight"]).sum(dim=1, keepdim=True)
        return logistic(self.tensors["return_baseline"][None, :] + linear)


class FrozenResponse(Judge):
    """One learned judge, frozen: evaluation mode, no gradients, a content hash.

    Args:
        tensors: The named tensors of `_SHAPES` and `_TIMING_SHAPES`, float32.
        outcomes: Outcome names, the gate first.
        feature_names: Names of phi, length n_static + 3.

    Raises:
        ValueError: When a tensor is missing, has the wrong shape, or is not finite where it must be.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], outcomes: tuple[str, ...], feature_names: tuple[str, ...]
    ) -> None:
        names = [*_SHAPES, *_TIMING_SHAPES]
        missing = sorted(set(names) - set(tensors))
        if missing:
            raise ValueError(f"the response model lacks {missing}; expected the tensors {sorted(names)}")
        t = {name: tensors[name].detach().to(torch.float32).contiguous() for name in names}
        self.n_items, self.dim = t["item_input"].shape
        self.n_users, self.n_outcomes, self.n_features = t["effect_mean"].shape
        self.n_decays = t["decays"].shape[0]
        self.n_members = t["item_output"].shape[0]
        self.n_periods = t["trend"].shape[0]
        self.rank = t["item_output"].shape[3]
        self.n_static = t["static_features"].shape[1]
        self.state_dim = (self.n_decays + 1) * self.dim + 1
        self.tensors, self.outcomes, self.feature_names = t, tuple(outcomes), tuple(feature_names)
        self._check()
        # one row a member, item and outcome, [v_o, e, static, b_o]: a slate then costs one gather and one product with the
        # user's row [tower_o, effects' part on the state, effects' part on static features, 1]
        shared = torch.cat([t["item_input"], t["static_features"]], dim=1)[None, :, None]
        shared = shared.expand(self.n_members, -1, self.n_outcomes, -1)
        self._table = torch.cat([t["item_output"], shared, t["item_bias"][..., None]], dim=3).flatten(0, 1).contiguous()
        self._log_decays = torch.log(t["decays"])
        self._scale, self._shift = t["calibration"][..., 0].contiguous(), t["calibration"][..., 1].contiguous()
        self.has_pair_noise = bool((t["pair_sd"] > 0).any())
        self.has_trend = bool((t["trend"] != 0).any())
        super().__init__(t, outcomes, feature_names)

    def _check(self) -> None:
        t, members, hidden = self.tensors, self.n_members, self.tensors["hidden_bias"].shape[-1]
        expected = {
            "item_input": (self.n_items, self.dim),
            "decays": (self.n_decays,),
            "hidden_weight": (members, hidden, self.state_dim),
            "hidden_bias": (members, hidden),
            "tower_weight": (members, self.n_outcomes * self.rank, hidden),
            "tower_bias": (members, self.n_outcomes * self.rank),
            "item_output": (members, self.n_items, self.n_outcomes, self.rank),
            "item_bias": (members, self.n_items, self.n_outcomes),
            "calibration": (members, self.n_outcomes, 2),
            "static_features": (self.n_items, self.n_features - len(DYNAMIC_FEATURES)),
            "trend": (self.n_periods, self.n_items),
            "dynamic_scale": (2,),
            "effect_chol": (self.n_users, self.n_outcomes, self.n_features, self.n_features),
            "pair_sd": (self.n_outcomes,),
        }
        _check_shapes(t, expected)
        self._check_timing()
        if self.n_members < 1 or self.n_periods < 1:
            raise ValueError("a judge has one member and one period at least; fit the world again")
        if len(self.outcomes) != self.n_outcomes or len(self.feature_names) != self.n_features:
            raise ValueError("one name is needed for each outcome and each feature of phi")
        for name, value in t.items():
            if name != "leaving" and not bool(torch.isfinite(value).all()):
                raise ValueError(f"response tensor {name} has values that are not finite; fit the world again")

    def effects(self, world_seed: int, member: int = 0) -> Tensor:
        """Random coefficients z of every user: one draw from each posterior, keyed by (world seed, member, user).

        Args:
            world_seed: Which draw of the users' tastes.
            member: Member of the ensemble.

        Returns:
            float32 (n_users, n_outcomes, n_features).
        """
        users = torch.arange(self.n_users, device=self.device)
        root = mix(torch.tensor([world_seed], dtype=torch.int64, device=self.device)) + member
        slots = torch.arange(self.n_outcomes * self.n_features, device=self.device)
        noise = normal(fold_in(fold_in(root, users)[:, None], slots[None, :]))
        noise = noise.view(self.n_users, self.n_outcomes, self.n_features, 1)
        return self.tensors["effect_mean"] + (self.tensors["effect_chol"] @ noise)[..., 0]

    def start(self, histories: Tensor) -> Tensor:
        """State after a history.

        Args:
            histories: int64 (batch, H), newest last, -1 padding on the left.

        Returns:
            float32 (batch, state_dim): averages at each decay, the sum of item vectors, the count.
        """
        valid = (histories >= 0).to(torch.float32)[..., None]
        vectors = self.tensors["item_input"][histories.clamp(min=0)] * valid
        age = torch.arange(histories.shape[1] - 1, -1, -1, device=histories.device, dtype=torch.float32)
        decays = self.tensors["decays"]
        averages = [((1.0 - d) * d**age)[None, :, None].mul(vectors).sum(dim=1) for d in decays]
        return torch.cat([*averages, vectors.sum(dim=1), valid.sum(dim=1)], dim=1)

    def step(self, state: Tensor, items: Tensor, engaged: Tensor) -> Tensor:
        """State after a slate; the items the user took enter in slate order, the others leave no trace.

        Args:
            state: float32 (rows, state_dim).
            items: int64 (rows, slate_size).
            engaged: bool (rows, slate_size).

        Returns:
            float32 (rows, state_dim).
        """
        if may_look(state) and state.shape[0] > _FEW_ROWS:
            # who took nothing stays as he was; row 0 fills the last block up
            moved = torch.nonzero(engaged.any(dim=1))[:, 0]
            block = torch.nn.functional.pad(moved, (0, -len(moved) % ROW_MULTIPLE))
            after = self._after_slate(*(x.index_select(0, block) for x in (state, items, engaged)))
            stepped = state.clone()
            # numpy copies whole rows, torch number by number
            stepped.numpy()[moved.numpy()] = after[: len(moved)].numpy()
            return stepped
        return self._after_slate(state, items, engaged)

    def _after_slate(self, state: Tensor, items: Tensor, engaged: Tensor) -> Tensor:
        rows, width, taken = state.shape[0], self.n_decays * self.dim, engaged.to(torch.float32)
        vectors = rows_of(self.tensors["item_input"], items).mul_(taken[..., None])
        # number of items taken after position j: the exponent of the decay that item j has met by the end of the slate
        count = taken.sum(dim=1, keepdim=True)
        after = count - taken.cumsum(dim=1)
        # s' = d^m s + sum_j (1 - d) d^(taken after j) e_j, with m items taken; every part is written where it belongs,
        # in place and not by `out=`: torch.compile does not follow `out=` into a part of a tensor
        moved = state.clone()
        averages = moved[:, :width].view(rows, self.n_decays, self.dim)
        averages *= torch.exp(count * self._log_decays)[..., None]
        weight = (1.0 - self.tensors["decays"])[:, None] * torch.exp(after[:, None, :] * self._log_decays[:, None])
        for n in range(self.n_decays):
            averages[:, n] += (weight[:, n, :, None] * vectors).sum(dim=1)
        moved[:, width:-1] += vectors.sum(dim=1)
        moved[:, -1:] += count
        return moved

    def inputs(self, state: Tensor) -> Tensor:
        """What the tower reads: averages, mean vector of the whole history, log count; (rows, state_dim) both."""
        seen = state.clone()
        count = seen[:, -1:]
        seen[:, self.n_decays * self.dim : -1] /= count.clamp(min=1.0)
        count.copy_(torch.log1p(count) / 7.0)
        return seen

    def tower(self, inputs: Tensor, member: Tensor | int = 0) -> Tensor:
        """User vectors of a member. Rows must be a multiple of 16 for equal bits.

        Args:
            inputs: float32 (rows, state_dim).
            member: int64 (rows,), or one number for all rows.

        Returns:
            float32 (rows, n_outcomes, rank).
        """
        t, rows, linear = self.tensors, inputs.shape[0], torch.nn.functional.linear
        if isinstance(member, int) or self.n_members == 1:
            m = member if isinstance(member, int) else 0
            hidden = torch.relu(linear(inputs, t["hidden_weight"][m], t["hidden_bias"][m]))
            out = linear(hidden, t["tower_weight"][m], t["tower_bias"][m])
            return out.view(rows, self.n_outcomes, self.rank)
        # the bits of a narrow layer hang on a row's place in the batch, so there the rows stay where they are
        wide = min(t["hidden_bias"].shape[1], t["tower_bias"].shape[1]) >= ROW_MULTIPLE
        if may_look(inputs) and rows > _FEW_ROWS and wide:
            return self._own_towers(inputs, member)
        # all members, then each row's own: no shape depends on the members that the rows have
        outs = torch.stack([self.tower(inputs, m) for m in range(self.n_members)], dim=1)
        index = member[:, None, None, None].expand(rows, 1, self.n_outcomes, self.rank)
        return outs.gather(1, index)[:, 0]

    def _own_towers(self, inputs: Tensor, member: Tensor) -> Tensor:
        """`tower` with every row asked of its own member alone; the same bits, as rows come in whole blocks there and here."""
        out = inputs.new_empty(inputs.shape[0], self.n_outcomes, self.rank)
        for m in range(self.n_members):
            mine = torch.nonzero(member == m)[:, 0]
            # row 0 fills the last block up
            block = torch.nn.functional.pad(mine, (0, -len(mine) % ROW_MULTIPLE))
            if len(mine):
                out.index_copy_(0, mine, self.tower(inputs.index_select(0, block), m)[: len(mine)])
        return out

    def _scores(self, index: Tensor, row: Tensor) -> Tensor:
        """Products of rows of the table with the users' rows; (rows, m) and (rows, n_outcomes, d) -> (rows, m, n_outcomes)."""
        if not may_look(index) or index.shape[0] <= _CACHED_ROWS:
            return rows_of(self._table, index).mul_(row[:, None]).sum(dim=-1)
        # what is gathered for one block stays in the cache until it is summed
        parts = zip(index.split(_CACHED_ROWS), row.split(_CACHED_ROWS), strict=True)
        return torch.cat([rows_of(self._table, some).mul_(of[:, None]).sum(dim=-1) for some, of in parts])

    def features(self, inputs: Tensor, items: Tensor, period: Tensor | None = None) -> Tensor:
        """phi(item, state, date).

        Args:
            inputs: float32 (rows, state_dim).
            items: int64 (rows, m).
            period: int64 (rows,), row of `trend`; None = 0, where there is none.

        Returns:
            float32 (rows, m, n_features).
        """
        t = self.tensors
        vectors = t["item_input"][items]
        recent = (vectors * inputs[:, None, : self.dim]).sum(dim=-1, keepdim=True)
        whole = (vectors * inputs[:, None, self.n_decays * self.dim : -1]).sum(dim=-1, keepdim=True)
        trend = torch.zeros_like(recent) if period is None else t["trend"][period[:, None], items][..., None]
        dynamic = torch.cat([recent, whole], dim=-1) * t["dynamic_scale"]
        return torch.cat([t["static_features"][items], trend, dynamic], dim=-1)

    def conditional_probs(
        self,
        state: Tensor,
        effects: Tensor,
        items: Tensor,
        *,
        user: Tensor | None = None,
        member: Tensor | None = None,
        period: Tensor | None = None,
        position: bool = True,
        pair_noise: Tensor | None = None,
        gate_shift: Tensor | None = None,
    ) -> Tensor:
        """Probability of each outcome, the ones after the gate given the gate.

        Args:
            state: float32 (rows, state_dim); rows a multiple of 16 for equal bits in any batch.
            effects: float32 (rows, n_outcomes, n_features), the users' z.
            items: int64 (rows, m).
            user: Not read: the user is in `effects`.
            member: int64 (rows,), which member answers; None = the first.
            period: int64 (rows,), row of `trend`; None = 0.
            position: Column j of `items` is position j of a slate; False asks without position effect.
            pair_noise: float32 (rows, m), eps_user,item in standard deviations; None = 0.
            gate_shift: float32 (rows, m), added to the gate's logit (fatigue and settings of an environment); None = 0.

        Returns:
            float32 (rows, m, n_outcomes) in (0, 1).
        """
        inputs = self.inputs(state)
        scale = self.tensors["dynamic_scale"]
        split = self.n_static
        # z . phi of the two co-occurrence features is e_i . (z_recent scale recent + z_history scale mean): linear in e_i
        # of rows that lie apart a product costs twice as much
        average, mean = inputs[:, None, : self.dim], inputs[:, None, self.n_decays * self.dim : -1]
        recent = average.contiguous() * (effects[..., split + 1, None] * scale[0])
        recent += mean.contiguous() * (effects[..., split + 2, None] * scale[1])
        ones = torch.ones_like(effects[..., :1])
        tower = self.tower(inputs, 0 if member is None else member)
        row = torch.cat([tower, recent, effects[..., :split], ones], dim=2)
        of_member = items if member is None or self.n_members == 1 else items + (member * self.n_items)[:, None]
        score = self._scores(of_member, row)
        if self.has_trend and period is not None:
            trend = self.tensors["trend"].view(-1).take(items + (period * self.n_items)[:, None])
            score = score + trend[..., None] * effects[:, None, :, split]
        if pair_noise is not None:
            score = score + self.tensors["pair_sd"] * pair_noise[..., None]
        if member is None or self.n_members == 1:
            stacked = score * self._scale[0] + self._shift[0]
        else:
            scale, shift = self._scale.index_select(0, member), self._shift.index_select(0, member)
            stacked = score * scale[:, None] + shift[:, None]
        gate = stacked[..., :1]
        if position:
            # only the gate depends on being looked at; what follows is given that the item was taken
            gate = gate + self.tensors["position_logit"][: items.shape[1], None]
        if gate_shift is not None:
            gate = gate + gate_shift[..., None]
        return logistic(torch.cat([gate, stacked[..., 1:]], dim=-1))


class LoggedResponse(Judge):
    """A judge that looks the answer up in a (nearly) fully observed log, and refuses pairs that the log never saw.

    No state, no taste to draw, one member: a user's answer to an item is the logged one, whatever was shown before.

    Args:
        tensors: `answers` (n_users, n_items, n_outcomes), NaN = never observed, later outcomes given the gate; and the tensors of
            `_TIMING_SHAPES`.
        outcomes: Outcome names, the gate first.
        feature_names: Empty.

    Raises:
        ValueError: When a tensor is missing or has the wrong shape.
    """

    state_dim = 1
    n_members = 1
    n_periods = 1
    has_pair_noise = False
    has_trend = False

    def __init__(
        self, tensors: Mapping[str, Tensor], outcomes: tuple[str, ...], feature_names: tuple[str, ...] = ()
    ) -> None:
        names = ["answers", *_TIMING_SHAPES]
        missing = sorted(set(names) - set(tensors))
        if missing:
            raise ValueError(f"the logged response lacks {missing}; expected the tensors {sorted(names)}")
        t = {name: tensors[name].detach().to(torch.float32).contiguous() for name in names}
        self.n_users, self.n_items, self.n_outcomes = t["answers"].shape
        self.tensors = t
        self._check_timing()
        super().__init__(t, outcomes, feature_names)

    @property
    def observed(self) -> Tensor:
        """Pairs that the log answers; bool (n_users, n_items)."""
        return ~torch.isnan(self.tensors["answers"][..., 0])

    def effects(self, world_seed: int, member: int = 0) -> Tensor:
        """Nothing is drawn; float32 (n_users, n_outcomes, 0)."""
        return torch.zeros(self.n_users, self.n_outcomes, 0, device=self.device)

    def start(self, histories: Tensor) -> Tensor:
        """No state; int64 (batch, H) -> zeros (batch, 1)."""
        return torch.zeros(histories.shape[0], 1, device=histories.device)

    def step(self, state: Tensor, items: Tensor, engaged: Tensor) -> Tensor:
        """The state stays as it is."""
        return state

    def conditional_probs(
        self,
        state: Tensor,
        effects: Tensor,
        items: Tensor,
        *,
        user: Tensor | None = None,
        member: Tensor | None = None,
        period: Tensor | None = None,
        position: bool = True,
        pair_noise: Tensor | None = None,
        gate_shift: Tensor | None = None,
    ) -> Tensor:
        """The logged answers; arguments as `FrozenResponse.conditional_probs`, of which only `user` (int64 (rows,)) is read.

        Raises:
            ValueError: When `user` is missing, a setting would change logged answers, or a pair was never observed.
        """
        if user is None:
            raise ValueError("a logged response needs the users (int64 (rows,)); hand them over as `user`")
        if gate_shift is not None:
            raise ValueError(
                "fatigue, drift, position_decay and base_rate_factor would change answers that were logged; leave them at "
                "their defaults, or build the world with --response model"
            )
        answers = self.tensors["answers"][user[:, None], items]
        if bool(torch.isnan(answers[..., 0]).any()):
            row, column = (int(i) for i in torch.nonzero(torch.isnan(answers[..., 0]))[0])
            raise ValueError(
                f"user {int(user[row])} was never observed with item {int(items[row, column])}; a logged response answers "
                "observed pairs only: rank lists with World.top_lists, which leaves the others out"
            )
        return answers


AnyJudge = FrozenResponse | LoggedResponse


def make_judge(
    tensors: Mapping[str, Tensor], outcomes: tuple[str, ...], feature_names: tuple[str, ...]
) -> FrozenResponse | LoggedResponse:
    """The judge that the tensors describe: logged answers or a model."""
    kind = LoggedResponse if "answers" in tensors else FrozenResponse
    return kind(tensors, outcomes, feature_names)


def untimed(max_slate: int = 64) -> dict[str, Tensor]:
    """Timing tensors of a judge whose log identifies neither position nor fatigue, leaving or return."""
    return {
        "position_logit": torch.zeros(max_slate),
        "fatigue": torch.zeros(1),
        "leaving": torch.tensor([-torch.inf, 0.0, 0.0, 0.0]),
        "return_edges": torch.zeros(1),
        "return_baseline": torch.zeros(0),
        "return_weight": torch.zeros(len(RETURN_FEATURES)),
    }


def item_exposure(exposure: Tensor, categories: Tensor) -> Tensor:
    """Exposure of items through their categories: (rows, C) and (rows, m, C) -> (rows, m)."""
    return (categories * exposure[:, None]).sum(dim=-1)


def next_exposure(exposure: Tensor, categories: Tensor, valid: Tensor) -> Tensor:
    """Exposure to each category after a slate: what was there fades, the mean of the slate's items comes on top.

    Args:
        exposure: float32 (rows, C).
        categories: float32 (rows, m, C), shares that sum to 1 or 0 for each item.
        valid: bool (rows, m), places of the slate that hold an item.

    Returns:
        float32 (rows, C).
    """
    weight = valid.to(torch.float32)
    mean = (categories * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1.0)
    return EXPOSURE_DECAY * exposure + mean


def _check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            meaning = (_SHAPES | _TIMING_SHAPES)[name]
            raise ValueError(
                f"response tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}: {meaning}"
            )


def joint_probs(conditional: Tensor) -> Tensor:
    """Probability of each outcome without condition: the gate, then gate times what follows; (..., n_outcomes) both."""
    return torch.cat([conditional[..., :1], conditional[..., :1] * conditional[..., 1:]], dim=-1)


def pad_rows(x: Tensor, multiple: int = ROW_MULTIPLE) -> Tensor:
    """Zero rows appended until their number is a multiple of `multiple`."""
    missing = -x.shape[0] % multiple
    return x if missing == 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
