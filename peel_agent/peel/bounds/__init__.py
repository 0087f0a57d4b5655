"""Target maps, chains of fitted blocks along them, and the bounds that they give (method.md 3)."""
