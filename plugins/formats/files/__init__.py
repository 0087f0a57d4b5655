"""What several formats share: a checkpoint's files, read by offset, held open and remembered by their stamps."""
