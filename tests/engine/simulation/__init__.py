"""The real engine and journal in a simulated world: one seed, one run, in virtual time."""
