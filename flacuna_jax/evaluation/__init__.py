"""Benchmarks in InstructEval's protocol, lm-evaluation-harness, and tables comparable with published ones."""
