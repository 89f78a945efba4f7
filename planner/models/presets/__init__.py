"""Configs of the published sizes; the numbers of their `config.json`, text model only."""
