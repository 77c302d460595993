"""QEMU over QMP, its block graph, and image files."""
