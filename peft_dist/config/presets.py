"""What one wants to do, and the recipe to begin with."""

PRESETS = {
    "qlora-1gpu": "llama-3.1-8b-qlora",
    "qlora-node": "llama-3.3-70b-qlora",
    "qlora-slurm": "llama-3.1-405b-qlora",
    "qlora-cpu": "quickstart",
    "lora-1gpu": "llama-2-7b-lora",
    "chat": "chat",
    "classify": "classify",
    "dpo-cpu": "dpo",
}
