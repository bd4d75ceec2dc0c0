"""A forest laid out for the kernels: as nodes to walk, or as splits in order of their thresholds (QuickScorer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cascade.columns import Array, Float32, Float64, Int32, Int64
from stages.screener.forest import Forest, Tree


@dataclass(frozen=True, slots=True)
class WalkTables:
    """All trees in one array of nodes, for walking from root to leaf; a leaf is its own child.

    `column` int32 [nodes], `threshold` float32 [nodes], `child` int32 [2 × nodes] (left, right), `value` float64
    [nodes], `root` int32 [trees], `depth` int32 [groups of `group` trees]: steps that reach every leaf.
    """

    column: Int32
    threshold: Float32
    child: Int32
    value: Float64
    root: Int32
    depth: Int32


def walk_tables(forest: Forest, group: int) -> WalkTables:
    """Lay a forest out for walking."""
    columns, thresholds, children, values, roots, depths = [], [], [], [], [], []
    start = 0
    for tree in forest.trees:
        splits, leaves = len(tree.column), tree.leaves
        own: Int64 = np.arange(start, start + splits + leaves, dtype=np.int64)
        sides = [np.where(side >= 0, start + side, start + splits + ~side) for side in (tree.left, tree.right)]
        columns.append(np.concatenate([tree.column, np.zeros(leaves, np.int32)]))
        thresholds.append(np.concatenate([tree.threshold, np.full(leaves, np.inf, np.float32)]))
        children.append(np.stack([np.concatenate([side, own[splits:]]) for side in sides], axis=1).ravel())
        values.append(np.concatenate([np.zeros(splits), tree.value]))
        roots.append(start)
        depths.append(_depth(tree))
        start += splits + leaves
    steps = [max(depths[first : first + group]) for first in range(0, len(depths), group)]
    return WalkTables(
        column=_joined(columns, np.int32),
        threshold=_joined(thresholds, np.float32),
        child=_joined(children, np.int32),
        value=_joined(values, np.float64),
        root=np.array(roots, np.int32),
        depth=np.array(steps, np.int32),
    )


def _joined(parts: list[Array], kind: DTypeLike) -> Array:
    return np.concatenate([np.zeros(0, kind), *parts]).astype(kind)


def _depth(tree: Tree) -> int:
    depth, level = 0, [0] if len(tree.column) else []
    while level:
        depth += 1
        level = [child for split in level for child in (tree.left[split], tree.right[split]) if child >= 0]
    return depth


@dataclass(frozen=True, slots=True)
class MaskTables:
    """All splits in order of their thresholds, for QuickScorer: a split that sends a row right rules leaves out.

    The leaves of a tree are numbered from left to right, a bit each. Trees are cut into blocks; of a block, segment s
    holds the splits `start[s]` to `start[s + 1]`, all of column `column[s]`, thresholds ascending; segments
    `block[b]` to `block[b + 1]` are those of block b, whose trees are `tree_block[b]` to `tree_block[b + 1]`.
    `threshold` float32 [splits], `tree` int32 [splits] counted from the block's first, `ruled_out` uint32 or uint64
    [splits], `value` float64 [trees, leaves at most].
    """

    block: Int64
    tree_block: Int64
    column: Int64
    start: Int64
    threshold: Float32
    tree: Int64
    ruled_out: Array
    value: Float64


def mask_dtype(forest: Forest) -> np.dtype[Any]:
    """The masks' dtype: a bit for each leaf of the largest tree."""
    return np.dtype(np.uint32 if forest.leaves_max <= 32 else np.uint64)


def mask_tables(forest: Forest, trees_per_block: int) -> MaskTables:
    """Lay a forest out for QuickScorer; no tree may have more than 64 leaves."""
    kind = mask_dtype(forest)
    numbered = [_numbered(tree, kind) for tree in forest.trees]
    block, tree_block, column, start = [0], [0], [], [0]
    thresholds, trees, ruled_out = [], [], []
    for first in range(0, len(forest.trees), trees_per_block):
        members = forest.trees[first : first + trees_per_block]
        of_column = _joined([tree.column for tree in members], np.int32)
        threshold = _joined([tree.threshold for tree in members], np.float32)
        owner = np.repeat(np.arange(len(members)), [len(tree.column) for tree in members])
        masks = _joined([masks for masks, _ in numbered[first : first + trees_per_block]], kind)
        order = np.lexsort((owner, threshold, of_column))
        present, counts = np.unique(of_column, return_counts=True)
        column.extend(present.tolist())
        start.extend((start[-1] + np.cumsum(counts)).tolist())
        block.append(len(column))
        tree_block.append(first + len(members))
        thresholds.append(threshold[order])
        trees.append(owner[order])
        ruled_out.append(masks[order])
    value = np.zeros((len(forest.trees), forest.leaves_max))
    for row, (_, leaf_order) in enumerate(numbered):
        value[row, : len(leaf_order)] = forest.trees[row].value[leaf_order]
    return MaskTables(
        block=np.array(block), tree_block=np.array(tree_block), column=np.array(column, np.int64),
        start=np.array(start), threshold=_joined(thresholds, np.float32), tree=_joined(trees, np.int64),
        ruled_out=_joined(ruled_out, kind), value=value,
    )  # fmt: skip


def _numbered(tree: Tree, kind: np.dtype[Any]) -> tuple[Array, Int64]:
    """(the bits of the leaves below each split's left child, the leaves from left to right)."""
    masks = [0] * len(tree.column)
    order: list[int] = []
    left, right = tree.left.tolist(), tree.right.tolist()
    if not masks:
        return np.zeros(0, kind), np.zeros(1, np.int64)
    # each split comes twice: before its left side, and between its sides
    waiting: list[tuple[int, int]] = [(0, -1)]
    while waiting:
        node, began = waiting.pop()
        if node < 0:
            order.append(~node)
        elif began < 0:
            waiting += [(node, len(order)), (left[node], -1)]
        else:
            masks[node] = (1 << len(order)) - (1 << began)
            waiting.append((right[node], -1))
    return np.array(masks, np.uint64).astype(kind), np.array(order, np.int64)
