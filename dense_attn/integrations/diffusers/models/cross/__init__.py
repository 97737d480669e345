"""Images whose transformers attend to themselves, and across to the text."""
