"""How much a block could win: the backward sweep, better output matrices, a witness (method.md 5)."""
