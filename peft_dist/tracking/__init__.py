"""Where progress is shown. The ledger is the truth; the rest are views of its records."""

from peft_dist.tracking.base import Ledger, Record, Tracker
from peft_dist.tracking.nodes import watch_machine
from peft_dist.tracking.system import SystemSampler
from peft_dist.tracking.terminal import Terminal

__all__ = ["Ledger", "Record", "SystemSampler", "Terminal", "Tracker", "watch_machine"]
