"""The parts of `make demo`: what is run, how it is run and watched, and what is made of the results."""
