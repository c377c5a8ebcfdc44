"""`python -m bench`: all benchmarks, one report."""

from bench.run_all import main

main()
