"""Every reader of the package."""

from fuzzing.configurations import CONFIGURATIONS
from fuzzing.corpora import CORPORA
from fuzzing.models import MODELS
from fuzzing.runs import RUNS
from fuzzing.searches import SEARCHES

READERS = [*SEARCHES, *CORPORA, *RUNS, *MODELS, *CONFIGURATIONS]
