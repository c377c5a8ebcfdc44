"""The process per rank that keeps snapshots in memory: who protects whom, which bytes where, and how they come back."""
