"""Moments in Time: three seconds of anything that happens, 339 verbs."""
