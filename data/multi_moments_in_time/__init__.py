"""Multi-Moments in Time: three seconds of anything, with all verbs that fit."""
