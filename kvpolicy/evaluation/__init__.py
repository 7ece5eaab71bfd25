"""Measure what a policy costs: tasks x policies x budgets x models x seeds, in one table."""
