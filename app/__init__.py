"""blockjobd: merge the disk layers of running QEMU virtual machines over HTTP."""
