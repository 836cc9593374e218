"""Kills the real command line at seeded random moments, and compares what comes of it with an undisturbed run.

``python -m torture`` with ``tests`` on the path, or ``make torture``. A moment is a signal at the k-th change of a file
under a stage's folder, or after a share of the processor time that the stage takes undisturbed. Both are counted inside
the process by ``inside/sitecustomize.py``, so a moment does not depend on how busy the machine is.
"""
