"""First-party plug-ins, one file each; imported as peel_plugins."""
