"""Mixture of experts: few rows, and groups of many."""
