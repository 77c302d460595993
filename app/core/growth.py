"""How much a job lets an image file grow."""

from __future__ import annotations

from app.core.chain import Layer


def growth(target: Layer, size: int, new: int, *, zeroed: int = 0, crowded: bool = False) -> int:
    """The most bytes by which the file of `target` grows: `new` bytes of data and the tables that tell where they are.

    `size` is the virtual size that the image has then, in bytes. In a qcow2 file a table of 8-byte entries maps one
    cluster each, a refcount block of 2-byte entries counts one each; both come in whole clusters
    (docs/interop/qcow2.txt). A new cluster needs at most one new table, so a thin image does not need all of its
    tables. No image grows beyond its full size and its tables, unless it is `crowded`: what it has stays beside what is
    written over it. `zeroed` are bytes that are marked as zeros where the image becomes longer, which takes tables, and
    a cluster for what does not fill one.
    """
    if target.format != "qcow2":
        return max(0, min(new, size - target.actual_size)) if target.format == "raw" else new
    if not new and size <= target.virtual_size:
        return 0
    cluster = target.cluster_size
    covered = cluster * cluster // 8
    added, full = -(-new // cluster) + bool(zeroed), -(-size // cluster)
    tables = -(-size // covered)
    marked = -(-zeroed // covered) + bool(zeroed)
    least = added * cluster + _metadata(added, min(added + marked, tables), tables, cluster)
    if crowded:
        return least
    return min(least, max(0, size + _metadata(full, tables, tables, cluster) - target.actual_size))


def _metadata(clusters: int, l2: int, entries: int, cluster: int) -> int:
    """Bytes of the tables of that many data clusters, in `l2` tables, with that many `entries` in the L1 table."""
    l1 = -(-entries * 8 // cluster)
    counted = clusters + l2 + l1 + 1
    # Each refcount block counts itself too, and its entry in the table of them. One cluster more is for a last one
    # that the size does not fill.
    blocks = -(-counted // (cluster // 2 - 2))
    return (l2 + l1 + 1 + blocks + -(-blocks * 8 // cluster) + 1) * cluster
