"""The process per rank that outlives its trainer and holds its snapshots in memory.

In: images that the trainer stages in shared memory. Out: the same bytes, to the next trainer, to peers and to the store. Nothing
here imports torch. Modules are imported where they are used, so that the process starts fast.
"""
