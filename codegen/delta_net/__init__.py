"""Gated DeltaNet: one step, several rows, the chunked form."""
