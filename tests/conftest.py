"""What every test gets: one thread, no network, and the folder of the helpers on the path."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small tensors need no more, and a process forked after OpenMP has started threads hangs in its first operator.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
