"""Whether a checkpoint counts: receipts, publish, find, retention, garbage."""
