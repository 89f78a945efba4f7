"""The advisor: which deployment is best for a spec.

`candidate.py` says what a deployment is, `search_space.py` which ones are tried, `legality.py`
which are legal, `memory_model.py` what fits, `step_model.py`, `workload.py` and `prediction.py`
what it costs, `ranking.py` what is best, and `reasons.py` why. `search.py` is the loop over them,
and `resolve.py` turns its result into decisions.
"""
