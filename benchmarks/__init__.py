"""Benchmarks and parity checks that anyone can run; they are not part of the installed package."""
