"""Ways of editing an image beside one another, and semantic guidance over two of its options."""
