"""Fine-tune adapters on a frozen, 4-bit, sharded base model.

Importing this package imports nothing else: the control plane must start without torch.
"""

__version__ = "0.1.0"
