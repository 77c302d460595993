"""Jobs of a running QEMU, over its QMP monitor."""
