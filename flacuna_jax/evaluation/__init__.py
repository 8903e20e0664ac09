"""Benchmarks: InstructEval to the letter, lm-evaluation-harness, tables that can be set beside the published ones."""
