"""Timings. Never imported by tests: a timing is no test."""
