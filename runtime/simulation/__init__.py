"""A plan under a load, with steps that take the time that is predicted, and no device."""
