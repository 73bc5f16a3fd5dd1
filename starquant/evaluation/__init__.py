"""Scoring through lm-eval: one LM class over any family, task suites, results as `Score`s."""
