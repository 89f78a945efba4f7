"""Grammars of answers: compiled in a process of their own, matched token by token, as masks."""
