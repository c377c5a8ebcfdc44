"""The process per rank that holds snapshots in memory, protects them with its peers, and gives them back after a failure."""
