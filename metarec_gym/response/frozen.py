"""The frozen judge: what a user does with a slate. Loaded, never trained; only torch is needed to run it.

For user u, item i, outcome o and the state s that the user's history gives:

    logit p_o(u, i, s) = scale_o * (tower_o(s) . v_oi + b_oi + z_uo . phi(i, s) + sd_o * eps_ui) + shift_o + position

* `s` is a linear recurrent state (exponential averages of item vectors at several decays, their running mean, the count): the
  diagonal recurrence of linear recurrent units (Orvieto et al., ICML 2023) with fixed decays; `tower` is a small network on it.
* `phi` are named, frozen features: static ones of the item, and its co-occurrence with the recent and the whole history.
* `z_u` are the user's random coefficients, drawn once per (world seed, user) from their posterior; no policy ever sees them.
* The first outcome is the gate (the user takes the item at all); the others are conditional on it.

Nothing here knows which strategy showed the item: the same item in the same state and position gives the same answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from metarec_gym.seeding import fold_in, mix, normal

ROW_MULTIPLE = 16
"""Batches are padded to a multiple of this many rows: matrix kernels then give each row the same bits in any batch on CPU."""

DYNAMIC_FEATURES = ("cooccurrence_recent", "cooccurrence_history")
"""The last two entries of phi, computed from the state; the ones before them are static."""

_SHAPES = {
    "item_input": "(n_items, d) frozen item vectors of the recurrence",
    "decays": "(n_decays,) in (0, 1); the first is the fastest and defines `recent`",
    "hidden_weight": "(hidden, (n_decays + 1) * d + 1)",
    "hidden_bias": "(hidden,)",
    "tower_weight": "(n_outcomes * rank, hidden)",
    "tower_bias": "(n_outcomes * rank,)",
    "item_output": "(n_items, n_outcomes, rank)",
    "item_bias": "(n_items, n_outcomes)",
    "calibration": "(n_outcomes, 2): scale, shift",
    "static_features": "(n_items, n_static)",
    "dynamic_scale": "(2,) multiplies the two co-occurrence features",
    "effect_mean": "(n_users, n_outcomes, n_static + 2) posterior mean of z_u",
    "effect_chol": "(n_users, n_outcomes, n_static + 2, n_static + 2) Cholesky factor of its covariance",
    "pair_sd": "(n_outcomes,) sd of eps_user,item; 0 where the log cannot identify it",
    "position_logit": "(max_slate_size,) added to the gate's logit",
    "leaving": "(2,) logit of leaving after a request: intercept, weight per request since the last engagement; -inf = never",
}


def logistic(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)); unlike torch.sigmoid its vector and scalar paths agree bit for bit on CPU."""
    return 1.0 / (1.0 + torch.exp(-x))


class FrozenResponse:
    """One judge, frozen: evaluation mode, no gradients, a content hash.

    Args:
        tensors: The named tensors of `_SHAPES`, float32.
        outcomes: Outcome names, the gate first.
        feature_names: Names of phi, length n_static + 2.

    Raises:
        ValueError: When a tensor is missing, has the wrong shape, or is not finite where it must be.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], outcomes: tuple[str, ...], feature_names: tuple[str, ...]
    ) -> None:
        missing = sorted(set(_SHAPES) - set(tensors))
        if missing:
            raise ValueError(f"the response model lacks {missing}; expected the tensors {sorted(_SHAPES)}")
        self.tensors = {name: tensors[name].detach().to(torch.float32).contiguous() for name in _SHAPES}
        self.outcomes = tuple(outcomes)
        self.feature_names = tuple(feature_names)
        t = self.tensors
        self.n_items, self.dim = t["item_input"].shape
        self.n_users, self.n_outcomes, self.n_features = t["effect_mean"].shape
        self.n_decays = t["decays"].shape[0]
        self.rank = t["item_output"].shape[2]
        self.n_static = t["static_features"].shape[1]
        self.state_dim = (self.n_decays + 1) * self.dim + 1
        self._check()
        # one row an item and outcome, [v_o, e, static, b_o]: a slate then costs one gather and one product with the user's
        # row [tower_o, effects' part on the state, effects' part on static features, 1]
        shared = torch.cat([t["item_input"], t["static_features"]], dim=1)[:, None].expand(-1, self.n_outcomes, -1)
        self._table = torch.cat([t["item_output"], shared, t["item_bias"][..., None]], dim=2).contiguous()
        self._log_decays = torch.log(t["decays"])
        self._scale, self._shift = t["calibration"][:, 0].contiguous(), t["calibration"][:, 1].contiguous()
        self.has_pair_noise = bool((t["pair_sd"] > 0).any())
        self.hash = self._content_hash()

    def _check(self) -> None:
        t = self.tensors
        expected = {
            "item_input": (self.n_items, self.dim),
            "decays": (self.n_decays,),
            "hidden_weight": (t["hidden_bias"].shape[0], self.state_dim),
            "tower_weight": (self.n_outcomes * self.rank, t["hidden_bias"].shape[0]),
            "tower_bias": (self.n_outcomes * self.rank,),
            "item_output": (self.n_items, self.n_outcomes, self.rank),
            "item_bias": (self.n_items, self.n_outcomes),
            "calibration": (self.n_outcomes, 2),
            "static_features": (self.n_items, self.n_features - 2),
            "dynamic_scale": (2,),
            "effect_chol": (self.n_users, self.n_outcomes, self.n_features, self.n_features),
            "pair_sd": (self.n_outcomes,),
            "leaving": (2,),
        }
        for name, shape in expected.items():
            if tuple(t[name].shape) != shape:
                raise ValueError(
                    f"response tensor {name} has shape {tuple(t[name].shape)}, expected {shape}: {_SHAPES[name]}"
                )
        if len(self.outcomes) != self.n_outcomes or len(self.feature_names) != self.n_features:
            raise ValueError("one name is needed for each outcome and each feature of phi")
        for name, value in t.items():
            if name != "leaving" and not bool(torch.isfinite(value).all()):
                raise ValueError(f"response tensor {name} has values that are not finite; fit the world again")

    def _content_hash(self) -> str:
        digest = hashlib.sha256(repr((self.outcomes, self.feature_names)).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        """Where the tables lie."""
        return self._table.device

    def to(self, device: torch.device | str) -> FrozenResponse:
        """The same judge with its tables on `device` (self when they are there already)."""
        if self.device == torch.device(device):
            return self
        return FrozenResponse({k: v.to(device) for k, v in self.tensors.items()}, self.outcomes, self.feature_names)

    def effects(self, world_seed: int, member: int = 0) -> Tensor:
        """Random coefficients z of every user: one draw from each posterior, keyed by (world seed, member, user).

        Args:
            world_seed: Which draw of the users' tastes.
            member: Member of an ensemble.

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
        rows, taken = state.shape[0], engaged.to(torch.float32)
        vectors = self.tensors["item_input"][items] * taken[..., None]
        # number of items taken after position j: the exponent of the decay that item j has met by the end of the slate
        count = taken.sum(dim=1, keepdim=True)
        after = count - taken.cumsum(dim=1)
        decays = self.tensors["decays"]
        averages = state[:, : self.n_decays * self.dim].view(rows, self.n_decays, self.dim)
        # s' = d^m s + sum_j (1 - d) d^(taken after j) e_j, with m items taken
        kept = averages * torch.exp(count * self._log_decays)[..., None]
        weight = (1.0 - decays)[:, None] * torch.exp(after[:, None, :] * self._log_decays[:, None])
        gained = torch.stack([(weight[:, n, :, None] * vectors).sum(dim=1) for n in range(self.n_decays)], dim=1)
        total = state[:, self.n_decays * self.dim : -1] + vectors.sum(dim=1)
        return torch.cat([(kept + gained).flatten(1), total, state[:, -1:] + count], dim=1)

    def inputs(self, state: Tensor) -> Tensor:
        """What the tower reads: averages, mean vector of the whole history, log count; (rows, state_dim) both."""
        count = state[:, -1:]
        mean = state[:, self.n_decays * self.dim : -1] / count.clamp(min=1.0)
        return torch.cat([state[:, : self.n_decays * self.dim], mean, torch.log1p(count) / 7.0], dim=1)

    def tower(self, inputs: Tensor) -> Tensor:
        """User vectors; (rows, state_dim) -> (rows, n_outcomes, rank). Rows must be a multiple of 16 for equal bits."""
        t = self.tensors
        hidden = torch.relu(torch.nn.functional.linear(inputs, t["hidden_weight"], t["hidden_bias"]))
        out = torch.nn.functional.linear(hidden, t["tower_weight"], t["tower_bias"])
        return out.view(inputs.shape[0], self.n_outcomes, self.rank)

    def features(self, inputs: Tensor, items: Tensor) -> Tensor:
        """phi(item, state): inputs (rows, state_dim) and items (rows, m) -> (rows, m, n_features)."""
        t = self.tensors
        vectors = t["item_input"][items]
        recent = (vectors * inputs[:, None, : self.dim]).sum(dim=-1, keepdim=True)
        whole = (vectors * inputs[:, None, self.n_decays * self.dim : -1]).sum(dim=-1, keepdim=True)
        return torch.cat([t["static_features"][items], torch.cat([recent, whole], dim=-1) * t["dynamic_scale"]], dim=-1)

    def conditional_probs(
        self, state: Tensor, effects: Tensor, items: Tensor, *, position: bool = True, pair_noise: Tensor | None = None
    ) -> Tensor:
        """Probability of each outcome, the ones after the gate given the gate.

        Args:
            state: float32 (rows, state_dim); rows a multiple of 16 for equal bits in any batch.
            effects: float32 (rows, n_outcomes, n_features), the users' z.
            items: int64 (rows, m).
            position: Column j of `items` is position j of a slate; False asks without position effect.
            pair_noise: float32 (rows, m), eps_user,item in standard deviations; None = 0.

        Returns:
            float32 (rows, m, n_outcomes) in (0, 1).
        """
        inputs = self.inputs(state)
        scale = self.tensors["dynamic_scale"]
        split = self.n_static
        # z . phi of the two co-occurrence features is e_i . (z_recent scale recent + z_history scale mean): linear in e_i
        recent = inputs[:, None, : self.dim] * (effects[..., split, None] * scale[0])
        whole = inputs[:, None, self.n_decays * self.dim : -1] * (effects[..., split + 1, None] * scale[1])
        ones = torch.ones_like(effects[..., :1])
        user = torch.cat([self.tower(inputs), recent + whole, effects[..., :split], ones], dim=2)
        score = (self._table[items] * user[:, None]).sum(dim=-1)
        if pair_noise is not None:
            score = score + self.tensors["pair_sd"] * pair_noise[..., None]
        stacked = score * self._scale + self._shift
        if position:
            # only the gate depends on being looked at; what follows is given that the item was taken
            stacked = torch.cat(
                [stacked[..., :1] + self.tensors["position_logit"][: items.shape[1], None], stacked[..., 1:]], dim=-1
            )
        return logistic(stacked)

    def leave_prob(self, unrewarded: Tensor) -> Tensor:
        """Probability of leaving after a request; unrewarded = requests since the last engagement, float32 (rows,)."""
        intercept, weight = self.tensors["leaving"][0], self.tensors["leaving"][1]
        return logistic(intercept + weight * unrewarded)


def joint_probs(conditional: Tensor) -> Tensor:
    """Probability of each outcome without condition: the gate, then gate times what follows; (..., n_outcomes) both."""
    return torch.cat([conditional[..., :1], conditional[..., :1] * conditional[..., 1:]], dim=-1)


def pad_rows(x: Tensor, multiple: int = ROW_MULTIPLE) -> Tensor:
    """Zero rows appended until their number is a multiple of `multiple`."""
    missing = -x.shape[0] % multiple
    return x if missing == 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
