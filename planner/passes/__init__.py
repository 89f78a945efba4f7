"""The passes, each a pure function of a graph; `pipeline` has all of them in order."""
