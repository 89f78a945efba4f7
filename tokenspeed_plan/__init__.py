"""Compile a language model's deployment into a frozen plan, and replay it.

The folders beside this file are links to `planner/`, `codegen/`, `runtime/` and `plans/` at the top
of the checkout, so that a plain checkout on the path, an installed package and every tool resolve
the same names.
"""
