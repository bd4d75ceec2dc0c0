"""Converts a forest to the tables of the kernels: nodes to walk, or splits in order of threshold (QuickScorer)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cascade.columns import Array, Float32, Float64, Int32, Int64
from stages.screener.forest import ColumnKind, Forest, Tree


@dataclass(frozen=True, slots=True)
class WalkTables:
    """The nodes of all trees, for walking from root to leaf.

    - `column` int32 [nodes], `threshold` float32 [nodes]: what a split compares.
    - `child` int32 [2 × nodes]: left and right child of each node; a leaf is its own child.
    - `value` float64 [nodes]: value of a leaf.
    - `root` int32 [trees]: root of each tree.
    - `depth` int32 [groups]: number of steps that reach every leaf of a group of trees.
    """

    column: Int32
    threshold: Float32
    child: Int32
    value: Float64
    root: Int32
    depth: Int32


def walk_tables(forest: Forest, group: int) -> WalkTables:
    """Tables for walking a forest. `group`: trees that take each step together."""
    columns, thresholds, children, values, roots, depths = [], [], [], [], [], []
    start = 0
    for tree in forest.trees:
        splits, leaves = len(tree.column), tree.leaves
        nodes: Int64 = np.arange(start, start + splits + leaves, dtype=np.int64)
        sides = [np.where(side >= 0, start + side, start + splits + ~side) for side in (tree.left, tree.right)]
        columns.append(np.concatenate([tree.column, np.zeros(leaves, np.int32)]))
        thresholds.append(np.concatenate([tree.threshold, np.full(leaves, np.inf, np.float32)]))
        children.append(np.stack([np.concatenate([side, nodes[splits:]]) for side in sides], axis=1).ravel())
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


def _joined(parts: Sequence[Array], dtype: DTypeLike) -> Array:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)


def _depth(tree: Tree) -> int:
    depth, level = 0, [0] if len(tree.column) else []
    while level:
        depth += 1
        level = [child for split in level for child in (tree.left[split], tree.right[split]) if child >= 0]
    return depth


@dataclass(frozen=True, slots=True)
class MaskTables:
    """The splits of all trees in order of threshold, for QuickScorer.

    The bits of a mask are the leaves of a tree from left to right. The trees are divided into blocks. The splits of a
    block are divided into segments, of which each compares another column. The splits by category have no place in this
    order: a category has a mask for each tree, of the leaves that its rows can reach. The fields are in the order of
    the kernel's parameters.

    - `columns` int32 [columns, 4]: those of `Columns.table` that are no CATEGORY; the segments count them.
    - `category_feature` int64 [n]: the features that splits by category read.
    - `category_first` int64 [n + 1]: the first mask of each of these features. A feature's masks are those of its
      categories 0, 1, …, and last that of a value in no set.
    - `block_segment`, `block_tree` int64 [blocks + 1]: first segment and first tree of each block.
    - `segment_column` int64 [segments]: the column that a segment compares.
    - `segment_split` int64 [segments + 1]: first split of each segment.
    - `threshold` float32 [splits]: ascending within a segment.
    - `tree` int64 [splits]: tree of a split, counted from the first of the block.
    - `left_leaves` uint32 or uint64 [splits]: mask of the leaves below a split's left child, which a row cannot reach
      if it exceeds the threshold.
    - `reachable` uint32 or uint64 [trees, masks of all features]: the leaves that a category's rows can reach.
    - `value` float64 [trees, leaves of the largest tree]: values of the leaves from left to right.
    """

    columns: Int32
    category_feature: Int64
    category_first: Int64
    block_segment: Int64
    block_tree: Int64
    segment_column: Int64
    segment_split: Int64
    threshold: Float32
    tree: Int64
    left_leaves: Array
    reachable: Array
    value: Float64


MASK_DTYPES = (np.dtype(np.uint32), np.dtype(np.uint64))


def mask_dtype(forest: Forest) -> np.dtype[Any]:
    """The dtype of the masks, with a bit for each leaf of the largest tree."""
    return MASK_DTYPES[0 if forest.leaves_max <= 32 else 1]


def mask_tables(forest: Forest, trees_per_block: int) -> MaskTables:
    """Tables for QuickScorer; no tree may have more than 64 leaves."""
    dtype = mask_dtype(forest)
    masks, leaf_orders = zip(*(_masks(tree, dtype) for tree in forest.trees), strict=True)
    by_category = forest.columns.table[:, 1] == ColumnKind.CATEGORY
    compared_at = np.cumsum(~by_category) - 1
    category_feature, category_first, reachable = _reachable(forest, masks, dtype)
    block_segment, block_tree, segment_column, segment_split = [0], [0], [], [0]
    thresholds, trees, left_leaves = [], [], []
    for first in range(0, len(forest.trees), trees_per_block):
        block = slice(first, first + trees_per_block)
        members = forest.trees[block]
        column = _joined([tree.column for tree in members], np.int32)
        threshold = _joined([tree.threshold for tree in members], np.float32)
        owner = np.repeat(np.arange(len(members)), [len(tree.column) for tree in members])
        order = np.lexsort((owner, threshold, column))
        order = order[~by_category[column[order]]]
        present, counts = np.unique(column[order], return_counts=True)
        segment_column.extend(compared_at[present].tolist())
        segment_split.extend((segment_split[-1] + np.cumsum(counts)).tolist())
        block_segment.append(len(segment_column))
        block_tree.append(first + len(members))
        thresholds.append(threshold[order])
        trees.append(owner[order])
        left_leaves.append(_joined(masks[block], dtype)[order])
    value = np.zeros((len(forest.trees), forest.leaves_max))
    for row, (tree, leaf_order) in enumerate(zip(forest.trees, leaf_orders, strict=True)):
        value[row, : len(leaf_order)] = tree.value[leaf_order]
    return MaskTables(
        columns=np.ascontiguousarray(forest.columns.table[~by_category]),
        category_feature=category_feature,
        category_first=category_first,
        block_segment=np.array(block_segment),
        block_tree=np.array(block_tree),
        segment_column=np.array(segment_column, np.int64),
        segment_split=np.array(segment_split),
        threshold=_joined(thresholds, np.float32),
        tree=_joined(trees, np.int64),
        left_leaves=_joined(left_leaves, dtype),
        reachable=reachable,
        value=value,
    )


def category_masks(forest: Forest) -> int:
    """The number of masks in `MaskTables.reachable`."""
    _, _, first = _categories(forest)
    return len(forest.trees) * int(first[-1])


def _categories(forest: Forest) -> tuple[Int64, Int64, Int64]:
    """(columns that compare a category, `MaskTables.category_feature`, `category_first`)."""
    table = forest.columns.table
    by_category = np.flatnonzero(table[:, 1] == ColumnKind.CATEGORY)
    features = np.unique(table[by_category, 0]).astype(np.int64)
    counts = [32 * int(table[by_category[table[by_category, 0] == one], 3].max()) for one in features]
    return by_category, features, np.cumsum([0, *(count + 1 for count in counts)], dtype=np.int64)


def _reachable(forest: Forest, masks: Sequence[Array], dtype: np.dtype[Any]) -> tuple[Int64, Int64, Array]:
    """`MaskTables.category_feature`, `category_first` and `reachable`. `masks`: of the leaves left of each split."""
    table = forest.columns.table
    by_category, features, first = _categories(forest)
    reachable: Array = np.full((len(forest.trees), first[-1]), ~dtype.type(0), dtype)
    for number, tree in enumerate(forest.trees):
        for split in np.flatnonzero(np.isin(tree.column, by_category)):
            feature, _, start, words = table[tree.column[split]]
            at = int(np.searchsorted(features, feature))
            members = np.unpackbits(forest.columns.sets[start : start + words].view(np.uint8), bitorder="little")
            goes_right: Array = np.ones(first[at + 1] - first[at], np.bool_)
            goes_right[: len(members)] = members == 0
            reachable[number, first[at] : first[at + 1]][goes_right] &= ~masks[number][split]
    return features, first, reachable


def _masks(tree: Tree, dtype: np.dtype[Any]) -> tuple[Array, Int64]:
    """(mask of the leaves below each split's left child, the leaves from left to right)."""
    masks = [0] * len(tree.column)
    order: list[int] = []
    left, right = tree.left.tolist(), tree.right.tolist()
    if not masks:
        return np.zeros(0, dtype), np.zeros(1, np.int64)
    # Depth first, with two visits of each split: before its left side (first leaf -1), and between its sides.
    pending: list[tuple[int, int]] = [(0, -1)]
    while pending:
        node, first_leaf = pending.pop()
        if node < 0:
            order.append(~node)
        elif first_leaf < 0:
            pending += [(node, len(order)), (left[node], -1)]
        else:
            masks[node] = (1 << len(order)) - (1 << first_leaf)
            pending.append((right[node], -1))
    return np.array(masks, np.uint64).astype(dtype), np.array(order, np.int64)
