"""Files of torch.save without torch.load: the machine that runs a pickle's harmless part, and the archive around it."""
