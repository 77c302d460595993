"""The rules of jobs and chains: pure, standard library only."""
