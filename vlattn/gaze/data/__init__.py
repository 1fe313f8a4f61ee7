"""Gaze data sets as they are published, read into `vlattn.gaze.trial.GazeSet`; none of them needs torch."""
