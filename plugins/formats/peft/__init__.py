"""Adapters of PEFT (LoRA, DoRA), merged in memory with the base model that they were trained on."""
