"""Which bytes move: saves, reads, exchanges, reshards. Pure."""
