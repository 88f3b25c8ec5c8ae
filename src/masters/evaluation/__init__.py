"""Evaluation of models: statistics, promotion gate, studies and benchmarks."""
