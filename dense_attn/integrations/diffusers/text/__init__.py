"""Where the phrases of a prompt stand among its tokens, and their embeddings on their own."""
