"""Where candidates come from. Each engine is a module here; all meet the `Proposal` protocol of `base`."""

from daemon_fast.proposals.base import Prefix, Proposal, ProposalSettings
from daemon_fast.proposals.candidates import Candidates

__all__ = ["Candidates", "Prefix", "Proposal", "ProposalSettings"]
