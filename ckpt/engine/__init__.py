"""Carries plans out within limits: save, load, verify, reshard."""
