"""A policy as a small decision tree: rules that can be read, played, saved and compared with what they stand for."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metarec_gym.policy import StatelessPolicy, one_hot_probs

if TYPE_CHECKING:
    from metarec_gym.evaluation.explain.features import Feature

TREE_SCHEMA = 1
LEAF = -1
SMALLEST_LEAF = 0.005
"""Share of the training weight that a leaf holds at least: rules about a handful of requests are not worth reading."""


@dataclass(frozen=True)
class Node:
    """A question with two answers, or a leaf.

    Attributes:
        feature: Entry of the observation; `LEAF` in a leaf.
        threshold: The left branch is taken where the entry is at most this.
        left: Node of "at most".
        right: Node of "above".
        yes: The left branch in words.
        no: The right branch in words.
        share: Weight of each strategy among the training requests that reached the node, sums to 1; (K,).
    """

    feature: int
    threshold: float
    left: int
    right: int
    yes: str
    no: str
    share: tuple[float, ...]


class TreePolicy(StatelessPolicy):
    """A decision tree over the observation; each leaf names a strategy.

    Where that strategy is out of service, the one with the next largest share in the leaf serves.

    Args:
        nodes: The root first.
        strategies: Strategy names in order of `share`.
        obs_dim: Width of the observation.
        meta: JSON-able facts that travel with the policy (world hash, what it imitates, how well ...).

    Raises:
        ValueError: When a node points nowhere, asks about an entry that does not exist, or has a share of the wrong length.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        strategies: Sequence[str],
        obs_dim: int,
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.nodes, self.strategies, self.obs_dim = tuple(nodes), tuple(strategies), int(obs_dim)
        self.meta = dict(meta or {})
        count = len(self.nodes)
        for at, node in enumerate(self.nodes):
            if len(node.share) != len(self.strategies):
                raise ValueError(f"node {at} weighs {len(node.share)} strategies, the tree has {len(self.strategies)}")
            # children stand behind their parents, so that walking down ends
            inside = at < node.left < count and at < node.right < count and 0 <= node.feature < self.obs_dim
            if node.feature != LEAF and not inside:
                raise ValueError(
                    f"node {at} of {count} asks entry {node.feature} and leads to {node.left}, {node.right}"
                )
        if not self.nodes:
            raise ValueError("a tree needs at least one node")
        self._table = {
            "feature": torch.tensor([max(n.feature, 0) for n in self.nodes]),
            "threshold": torch.tensor([n.threshold for n in self.nodes], dtype=torch.float32),
            # a leaf leads to itself
            "left": torch.tensor([i if n.feature == LEAF else n.left for i, n in enumerate(self.nodes)]),
            "right": torch.tensor([i if n.feature == LEAF else n.right for i, n in enumerate(self.nodes)]),
        }
        root = torch.tensor(self.nodes[0].share)
        # strategies that a leaf has never seen stand in by how common they are in the whole tree
        self._score = torch.tensor([n.share for n in self.nodes]) + 1e-6 * root

    def joined(self) -> TreePolicy:
        """The same choices with fewer leaves: branches whose leaves all choose alike become one."""
        nodes: list[Node] = []

        def write(at: int) -> int:
            node, here = self.nodes[at], len(nodes)
            below = {self._choice(leaf) for leaf in self._leaves_below(at)}
            nodes.append(replace(node, feature=LEAF, left=LEAF, right=LEAF, yes="", no=""))
            if len(below) > 1:
                left, right = write(node.left), write(node.right)
                nodes[here] = replace(node, left=left, right=right)
            return here

        write(0)
        return TreePolicy(nodes, self.strategies, self.obs_dim, self.meta)

    def _choice(self, leaf: int) -> int:
        return int(self._score[leaf].argmax())

    def _leaves_below(self, at: int) -> list[int]:
        node = self.nodes[at]
        return [at] if node.feature == LEAF else [*self._leaves_below(node.left), *self._leaves_below(node.right)]

    @property
    def leaves(self) -> tuple[int, ...]:
        """Indices of the leaves, in the order of the rules."""
        return tuple(at for at, node, _ in self._walk() if node.feature == LEAF)

    def serves(self, leaf: int) -> str:
        """Name of the strategy that a leaf serves."""
        return self.strategies[self._choice(leaf)]

    def leaf_of(self, obs: Tensor) -> Tensor:
        """The leaf that each state reaches; float32 (rows, obs_dim) -> int64 (rows,), indices into `nodes`.

        Raises:
            ValueError: When the observation has another width.
        """
        if obs.shape[1] != self.obs_dim:
            raise ValueError(f"observations have {obs.shape[1]} entries, the tree was made for {self.obs_dim}")
        table = {name: value.to(obs.device) for name, value in self._table.items()}
        at = torch.zeros(obs.shape[0], dtype=torch.int64, device=obs.device)
        for _ in range(len(self.nodes)):
            low = obs.gather(1, table["feature"][at][:, None])[:, 0] <= table["threshold"][at]
            below = torch.where(low, table["left"][at], table["right"][at])
            if torch.equal(below, at):
                break
            at = below
        return at

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Probability 1 for the leaf's strategy."""
        score = self._score.to(obs.device)[self.leaf_of(obs)].masked_fill(~action_mask, -1.0)
        return one_hot_probs(score.argmax(dim=1), len(self.strategies))

    def _walk(self) -> list[tuple[int, Node, tuple[str, ...]]]:
        """Every node, left before right, with the conditions that lead to it."""
        found: list[tuple[int, Node, tuple[str, ...]]] = []
        stack: list[tuple[int, tuple[str, ...]]] = [(0, ())]
        while stack:
            at, path = stack.pop()
            node = self.nodes[at]
            found.append((at, node, path))
            if node.feature != LEAF:
                stack += [(node.right, (*path, node.no)), (node.left, (*path, node.yes))]
        return found

    def conditions(self, leaf: int) -> tuple[str, ...]:
        """The conditions that lead to a leaf; of several about one entry and side the last, which is the strictest."""
        parent = {child: at for at, n in enumerate(self.nodes) if n.feature != LEAF for child in (n.left, n.right)}
        way = [leaf]
        while way[-1] in parent:
            way.append(parent[way[-1]])
        strictest: dict[tuple[int, bool], str] = {}
        for at, child in itertools.pairwise(reversed(way)):
            node = self.nodes[at]
            low = child == node.left
            strictest[node.feature, low] = node.yes if low else node.no
        return tuple(strictest.values())

    def rules(self, notes: dict[int, str] | None = None) -> str:
        """The tree as indented rules, one line a branch.

        Args:
            notes: What to add behind a leaf's strategy, by leaf.
        """
        notes = notes or {}
        lines = []
        for at, node, path in self._walk():
            lead = "    " * (len(path) - 1) + f"{path[-1]}: " if path else ""
            if node.feature == LEAF:
                lines.append(f"{lead}{self.serves(at)}{notes.get(at, '')}")
            elif path:
                lines.append(lead.rstrip())
        return "\n".join(lines)

    # ---- files
    def save(self, path: str | Path) -> Path:
        """Writes one JSON file, atomically; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": TREE_SCHEMA,
            "kind": "tree policy",
            "strategies": self.strategies,
            "obs_dim": self.obs_dim,
            "nodes": [vars(node) for node in self.nodes],
            "meta": self.meta,
        }
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> TreePolicy:
        """Reads a saved tree.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the file is no tree or comes from a newer schema.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tree at {path}; make one: python -m experiments.explain --policy FILE")
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict) or content.get("kind") != "tree policy":
            raise ValueError(f"{path} is no tree policy; expected a file that TreePolicy.save wrote")
        if content["schema"] > TREE_SCHEMA:
            raise ValueError(
                f"{path} has tree schema {content['schema']}, this metarec_gym reads up to {TREE_SCHEMA}; "
                "upgrade metarec_gym"
            )
        nodes = [Node(**{**node, "share": tuple(node["share"])}) for node in content["nodes"]]
        return cls(nodes, content["strategies"], content["obs_dim"], content["meta"])


@dataclass(frozen=True)
class TreeData:
    """What a tree learns from; N requests.

    Attributes:
        obs: float32 (N, D).
        label: int64 (N,), the strategy that the imitated policy chose.
        weight: float64 (N,), what is lost by a wrong choice there.
    """

    obs: Tensor
    label: Tensor
    weight: Tensor


def fit_tree(
    data: TreeData,
    strategies: Sequence[str],
    features: Sequence[Feature],
    *,
    max_leaves: int = 16,
    meta: dict[str, Any] | None = None,
) -> TreePolicy:
    """Fits a tree to weighted choices.

    Args:
        data: What to imitate.
        strategies: Strategy names.
        features: Entries of the observation that the tree may ask about, in words.
        max_leaves: Leaves at most; branches whose leaves agree are joined, so there may be fewer.
        meta: Facts that travel with the tree.

    Returns:
        The tree.

    Raises:
        ValueError: When no request has a weight: then every choice is as good as another.
    """
    from sklearn.tree import DecisionTreeClassifier

    weight = data.weight.numpy().astype(np.float64)
    if not weight.sum() > 0.0:
        raise ValueError(
            "no request has a weight above 0: every strategy is worth the same, there is nothing to explain"
        )
    model = DecisionTreeClassifier(
        max_leaf_nodes=max(max_leaves, 2),
        min_weight_fraction_leaf=SMALLEST_LEAF,
        # ties between equally good splits are broken by it
        random_state=0,
    )
    model.fit(data.obs[:, [f.index for f in features]].numpy(), data.label.numpy(), sample_weight=weight)
    return TreePolicy(_export(model, len(strategies), features), strategies, data.obs.shape[1], meta).joined()


def _export(model: Any, n_strategies: int, features: Sequence[Feature]) -> list[Node]:
    """Nodes of a fitted scikit-learn tree, parents before children."""
    tree = model.tree_
    nodes = []
    for at in range(tree.node_count):
        share = np.zeros(n_strategies)
        # weights of the classes that occurred
        share[model.classes_] = tree.value[at][0] / tree.value[at][0].sum()
        left, right = int(tree.children_left[at]), int(tree.children_right[at])
        shares = tuple(float(x) for x in share)
        if left < 0:
            nodes.append(Node(LEAF, 0.0, LEAF, LEAF, "", "", shares))
            continue
        # observations are float32: rounded down to one, "at most" means the same here as in scikit-learn
        threshold = np.float32(tree.threshold[at])
        if threshold > tree.threshold[at]:
            threshold = np.nextafter(threshold, np.float32(-np.inf))
        feature, border = features[int(tree.feature[at])], float(threshold)
        nodes.append(Node(feature.index, border, left, right, feature.below(border), feature.above(border), shares))
    return nodes
