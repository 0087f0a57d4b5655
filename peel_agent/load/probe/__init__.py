"""The probe: token ids or text read from a file, cut into sequences, split into fit, select and confirm."""

from peel_agent.load.probe.cutting import cut
from peel_agent.load.probe.reading import load_probe, read_tokens
from peel_agent.load.probe.splitting import ProbeSizes, check_vocabulary, split
from peel_agent.load.probe.tokens import Tokens
from peel_agent.load.probe.vocabularies import difference_of_vocabularies

__all__ = [
    "ProbeSizes",
    "Tokens",
    "check_vocabulary",
    "cut",
    "difference_of_vocabularies",
    "load_probe",
    "read_tokens",
    "split",
]
