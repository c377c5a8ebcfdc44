"""The parts of `make demo-recovery`: the job, the nodes it runs on, what is done to them, and what is made of it."""
