"""First-party plug-ins, a file or a package each; imported as peel_plugins."""
